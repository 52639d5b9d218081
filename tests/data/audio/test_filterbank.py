"""Log-mel features: equal to the golden vectors and to transformers, finite at every edge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import ASTFeatureExtractor

from epitaxy.core.errors import EpitaxyError
from epitaxy.data.audio.filterbank import SILENCE, Filterbank

GOLDEN = Path(__file__).parents[3].parent / "shared" / "golden" / "ast_petl" / "fbank.safetensors"
MEAN, STD = -4.2677393, 4.5689974


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden vectors lie beside the repository, and are not there")
@pytest.mark.parametrize("case", ["pad", "trunc"])
@pytest.mark.parametrize("reference", ["input_values", "input_values_own_f64"])
def test_equal_to_both_references(case: str, reference: str) -> None:
    golden = load_file(GOLDEN)
    expected, wave = golden[f"{case}.{reference}"].double(), golden[f"{case}.waveform"]
    features, lengths = Filterbank(expected.shape[1])([wave])
    padded = torch.zeros(expected.shape, dtype=torch.float64)
    used = min(int(lengths[0]), len(padded))
    padded[:used] = features[0, :used]
    assert ((padded - MEAN) / (2 * STD) - expected).abs().max() < 2e-6


def waves(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [0.1 * torch.randn(length) for length in lengths]


def test_a_batch_of_mixed_lengths_gives_each_sound_its_own_features() -> None:
    bank, sounds = Filterbank(64), waves(16000, 400, 5000, 559)
    features, lengths = bank(sounds)
    assert lengths.tolist() == [98, 1, 29, 1]
    assert features.shape == (4, 98, 64)
    assert features.dtype == torch.float32
    for row, length, wave in zip(features, lengths.tolist(), sounds, strict=True):
        assert torch.equal(row[:length], bank([wave])[0][0])
        assert (row[length:] == torch.tensor(SILENCE)).all()


@pytest.mark.parametrize(
    ("samples", "frames"), [(16000, 98), (64000, 398), (80000, 498), (160000, 998), (1, 1), (399, 1)]
)
def test_numbers_of_frames(samples: int, frames: int) -> None:
    assert Filterbank().frames(samples) == frames == Filterbank()(waves(samples))[1][0]


def test_clips_below_one_frame_are_filled_up_to_one() -> None:
    short = waves(123)[0]
    filled = torch.cat([short, torch.zeros(277)])
    assert torch.equal(Filterbank()([short])[0], Filterbank()([filled])[0])


@pytest.mark.parametrize("level", [0.0, 0.5, -1.0])
def test_silence_and_constants_are_finite_and_quiet(level: float) -> None:
    features, _ = Filterbank()([torch.full((4000,), level)])
    normalised = (features - MEAN) / (2 * STD)
    assert torch.isfinite(features).all()
    assert normalised == pytest.approx(-1.278, abs=1e-3)


def test_the_clip_mean_is_gone_already_as_each_frame_loses_its_own() -> None:
    wave = waves(8000)[0] + 0.3
    plain, subtracted = Filterbank()([wave])[0], Filterbank(subtract_clip_mean=True)([wave])[0]
    assert (plain - subtracted).abs().max() < 1e-4
    assert (plain - Filterbank()([wave - 0.3])[0]).abs().max() < 1e-3


def test_integers_taken_as_samples_would_shift_everything() -> None:
    wave = waves(8000)[0]
    shift = (Filterbank()([wave * 2**15])[0] - Filterbank()([wave])[0]) / (2 * STD)
    assert shift.median() == pytest.approx(2.2756, abs=1e-3)  # why 16-bit samples are scaled when they are read


@pytest.mark.parametrize("mels", [16, 64, 128])
def test_equal_to_the_extractor_of_transformers(mels: int) -> None:
    extractor = ASTFeatureExtractor(num_mel_bins=mels, max_length=120)
    rng = np.random.default_rng(mels)
    sounds = [rng.normal(0, scale, 19000).astype(np.float32) for scale in (1e-4, 0.03, 0.5)]
    expected = extractor(sounds, sampling_rate=16000, return_tensors="pt")["input_values"]
    features, lengths = Filterbank(mels)([torch.from_numpy(sound) for sound in sounds])
    padded = torch.nn.functional.pad(features, (0, 0, 0, 120 - int(lengths[0])))
    assert ((padded - MEAN) / (2 * STD) - expected).abs().max() < 2e-6


def test_long_sounds_are_computed_in_blocks_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = waves(50000)
    whole, _ = Filterbank()(wave)
    monkeypatch.setattr("epitaxy.data.audio.filterbank.BLOCK", 37)
    assert torch.allclose(Filterbank()(wave)[0], whole, atol=1e-6)


def test_other_rates_keep_frames_of_25_milliseconds() -> None:
    bank = Filterbank(40, rate=8000)
    assert (bank.length, bank.hop) == (200, 80)
    time = torch.arange(8000) / 8000
    features, _ = bank([torch.sin(2 * torch.pi * 1000 * time)])
    edges = np.linspace(*(1127 * np.log1p(np.array([20, 4000]) / 700)), 42)[1:-1]
    centre = np.abs(edges - 1127 * np.log1p(1000 / 700)).argmin()
    assert (features[0].argmax(-1) == int(centre)).all()


def test_bad_settings_and_inputs_are_refused() -> None:
    with pytest.raises(EpitaxyError, match="at least one mel bin, got 0"):
        Filterbank(0)
    with pytest.raises(EpitaxyError, match=r"got 20.0 to 9000.0 Hz at 16000 Hz"):
        Filterbank(high=9000.0)
    for bad in ([], [torch.zeros(0)], [torch.zeros(2, 400)]):
        with pytest.raises(EpitaxyError, match="at least one sound, each of one dimension"):
            Filterbank()(bad)
