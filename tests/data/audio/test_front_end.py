"""From files to a model's input: equality with transformers, clip lengths, windows, statistics, the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.audio import front_end as module
from epitaxy.data.audio.cache import FeatureCache, trim
from epitaxy.data.audio.front_end import LogMel, Processed, build
from epitaxy.data.audio.sound import Sound
from epitaxy.data.audio.spec import AudioSpec, Augment
from epitaxy.data.audio.waveform import Waveform
from epitaxy.data.splits import Example
from epitaxy.data.stored import File

MEAN, STD = -4.2677393, 4.5689974


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def heard(*lengths: int) -> list[Example]:
    return [Example(Waveform(noise(length, length), 16000), 0, f"{length}.wav") for length in lengths]


def written(folder: Path, *seconds: float, rate: int = 16000) -> list[Example]:
    examples = []
    for number, length in enumerate(seconds):
        file = folder / f"{number}.wav"
        soundfile.write(file, noise(round(length * rate), number), rate, subtype="FLOAT")
        examples.append(Example(Sound(File(str(file)), file.name), 0, file.name))
    return examples


def test_default_settings_equal_the_extractor_of_transformers(tmp_path: Path) -> None:
    for extractor in (ASTFeatureExtractor(), ASTFeatureExtractor(max_length=98, num_mel_bins=40, mean=-6.6, std=5.4)):
        examples = [*heard(8000, 40000, 16560, 300000), *written(tmp_path, 1.3)]
        sounds = [example.value.samples for example in examples]
        expected = extractor(sounds, sampling_rate=16000, return_tensors="pt")["input_values"]
        found = build(AudioSpec(), extractor).inputs(examples)
        assert found.keys() == {"input_values"}
        assert found["input_values"].shape == expected.shape
        assert (found["input_values"] - expected).abs().max() < 2e-6


def test_an_extractor_that_does_not_normalise() -> None:
    extractor = ASTFeatureExtractor(max_length=50, do_normalize=False)
    expected = extractor([noise(8000)], sampling_rate=16000, return_tensors="pt")["input_values"]
    found = build(AudioSpec(), extractor).inputs([Example(Waveform(noise(8000), 16000), 0, "x")])["input_values"]
    assert (found - expected).abs().max() < 1e-5
    assert not extractor.do_normalize


def test_short_policies_and_what_they_mean_after_normalising() -> None:
    examples = heard(8000)  # 48 frames
    tails = {}
    for short in ("pad", "silence", "mean", "repeat"):
        values = build(AudioSpec(frames=120, short=short), ASTFeatureExtractor()).inputs(examples)["input_values"][0]  # type: ignore[arg-type]
        assert values.shape == (120, 128)
        tails[short] = values[48:]
        head = values[:48]
    assert tails["pad"] == pytest.approx(0.467, abs=1e-3)  # louder than silence: padding is not silence
    assert tails["silence"] == pytest.approx(-1.278, abs=1e-3)
    assert tails["mean"] == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(tails["repeat"], torch.cat([head, head[:24]]))


@pytest.mark.parametrize("wave", [np.zeros(200, np.float32), np.full(5000, 0.7, np.float32), noise(1), noise(399)])
def test_silent_constant_and_tiny_clips_are_finite(wave: np.ndarray) -> None:
    values = build(AudioSpec(frames=64), ASTFeatureExtractor()).inputs([Example(Waveform(wave, 16000), 0, "x")])
    assert torch.isfinite(values["input_values"]).all()
    assert values["input_values"][0, 0] == pytest.approx(-1.278, abs=1e-3) or wave.std() > 0 or len(wave) < 400


def test_samples_that_are_not_numbers_are_refused_by_name() -> None:
    broken = noise(900)
    broken[17] = np.nan
    for extractor in (ASTFeatureExtractor(), Wav2Vec2FeatureExtractor()):
        with pytest.raises(FormatError, match=r"^ear\.wav: holds NaN or infinite samples$"):
            build(AudioSpec(), extractor).inputs([Example(Waveform(broken, 16000), 0, "ear.wav")])


def test_windows_cover_a_long_clip_in_evaluation_only() -> None:
    front_end = build(AudioSpec(frames=50, long="windows", windows=3), ASTFeatureExtractor())
    assert isinstance(front_end, LogMel)
    examples = heard(48000, 8000)
    made = front_end.inputs(examples)
    assert made["windows"].tolist() == [3, 1]
    whole = front_end.features(examples[0].value, "x")
    for row, start in zip(made["input_values"], (0, 124, 248), strict=False):
        assert torch.allclose(row, (whole[start : start + 50] - MEAN) / (2 * STD))
    trained = front_end.inputs(examples, [(0, 0, 0), (0, 0, 1)])
    assert trained["windows"].tolist() == [1, 1]


def test_random_crops_and_masks_belong_to_the_draw_not_to_the_batch() -> None:
    spec = AudioSpec(frames=40, long="random", augment=Augment(8, 12))
    front_end = build(spec, ASTFeatureExtractor(num_mel_bins=32))
    examples, draws = heard(16000, 17000, 18000), [(1, 0, 4), (1, 0, 9), (1, 0, 2)]
    together = front_end.inputs(examples, draws)["input_values"]
    for number in range(3):
        alone = front_end.inputs(examples[number : number + 1], draws[number : number + 1])["input_values"][0]
        assert torch.equal(alone, together[number])
    next_epoch = front_end.inputs(examples, [(1, 1, row) for _, _, row in draws])["input_values"]
    assert not torch.equal(together, next_epoch)
    assert (together == 0).any()
    plain = front_end.inputs(examples)["input_values"]
    assert not (plain == 0).any()
    assert torch.equal(plain, front_end.inputs(examples)["input_values"])


def test_statistics_of_the_training_split(tmp_path: Path) -> None:
    examples = written(tmp_path, 1.0, 0.5, 0.7)
    extractor = ASTFeatureExtractor(max_length=100, num_mel_bins=24)
    front_end = build(AudioSpec(statistics="train"), extractor, examples)
    assert isinstance(front_end, LogMel)
    values = torch.cat([front_end.features(example.value, "x") for example in examples]).double()
    assert (front_end.mean, front_end.std) == pytest.approx((float(values.mean()), float(values.std())), rel=1e-9)
    used = torch.cat(
        [
            front_end.inputs([example])["input_values"][0, : len(front_end.features(example.value, "x"))]
            for example in examples
        ]
    )
    assert (float(used.mean()), float(used.std())) == pytest.approx((0.0, 0.5), abs=1e-3)
    assert (extractor.mean, extractor.std) == front_end.spec.statistics  # saved with the model, it makes the same
    again = build(AudioSpec.from_stored(front_end.spec.stored(), "a"), ASTFeatureExtractor())
    assert torch.equal(again.inputs(examples)["input_values"], front_end.inputs(examples)["input_values"])
    published = build(AudioSpec(statistics="esc50"), ASTFeatureExtractor())
    assert published.spec.statistics == (-6.6268, 5.3585)


def test_a_long_file_is_read_in_stretches_as_if_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = written(tmp_path, 4.0, rate=44100)
    for long in ("cut", "center", "windows"):
        spec = AudioSpec(frames=90, long=long)  # type: ignore[arg-type]
        whole = build(spec, ASTFeatureExtractor()).inputs([example])["input_values"]
        monkeypatch.setattr(module, "WHOLE", 1.0)
        monkeypatch.setattr(Sound, "at", None)  # reading all of it would fail
        parts = build(spec, ASTFeatureExtractor()).inputs([example])["input_values"]
        monkeypatch.undo()
        assert parts.shape == whole.shape
        assert (parts - whole).abs().max() < 2e-3


def cached(folder: Path, **values: Any) -> LogMel:
    made = build(AudioSpec(cache=str(folder), **values), ASTFeatureExtractor(max_length=64, num_mel_bins=32))
    assert isinstance(made, LogMel)
    return made


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the sound was decoded again")

    monkeypatch.setattr(Sound, "at", refuse)
    monkeypatch.setattr(Sound, "_shape", property(refuse))
    monkeypatch.setattr(LogMel, "_computed", refuse)


def values_of(front_end: LogMel, examples: Sequence[Example]) -> torch.Tensor:
    return front_end.inputs(examples)["input_values"]


def test_the_second_epoch_reads_no_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, folder = written(tmp_path, 0.5, 1.5, 0.2), tmp_path / "cache"
    plain = build(AudioSpec(), ASTFeatureExtractor(max_length=64, num_mel_bins=32)).inputs(examples)["input_values"]
    assert torch.equal(values_of(cached(folder), examples), plain)
    assert len(list(folder.glob("*/*.features"))) == 3
    (tmp_path / "1.wav").rename(tmp_path / "renamed.wav")  # the content is the key, not the name
    examples[1] = Example(Sound(File(str(tmp_path / "renamed.wav")), "renamed"), 0, "renamed")
    forbid_reading(monkeypatch)
    assert torch.equal(values_of(cached(folder), examples), plain)
    other = cached(folder, statistics="esc50", long="center", short="silence")  # settings of later steps
    assert len(values_of(other, examples)) == 3
    with pytest.raises(AssertionError, match="decoded again"):
        values_of(cached(folder, mels=16), examples)


def test_changed_content_and_changed_settings_make_new_entries(tmp_path: Path) -> None:
    examples, folder = written(tmp_path, 0.5), tmp_path / "cache"
    before = values_of(cached(folder), examples)
    soundfile.write(tmp_path / "0.wav", noise(9000, 77), 16000, subtype="FLOAT")
    fresh = [Example(Sound(File(str(tmp_path / "0.wav")), "0.wav"), 0, "0.wav")]
    assert not torch.equal(values_of(cached(folder), fresh), before)
    left = [Example(Sound(File(str(tmp_path / "0.wav")), "0.wav", "left"), 0, "0.wav")]
    for front_end, sounds in ((cached(folder, mels=16), fresh), (cached(folder), left)):
        entries = len(list(folder.glob("*/*.features")))
        front_end.inputs(sounds)
        assert len(list(folder.glob("*/*.features"))) == entries + 1


@pytest.mark.parametrize("damage", ["emptied", "cut", "flipped", "foreign"])
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: str) -> None:
    examples, folder = written(tmp_path, 0.5), tmp_path / "cache"
    expected = values_of(cached(folder), examples)
    (entry,) = folder.glob("*/*.features")
    whole = entry.read_bytes()
    flipped = whole[:-300] + bytes([whole[-300] ^ 64]) + whole[-299:]
    entry.write_bytes({"emptied": b"", "cut": whole[:-9], "flipped": flipped, "foreign": b"\x80\x04K\x01."}[damage])
    assert torch.equal(values_of(cached(folder), examples), expected)
    assert entry.read_bytes() == whole


def test_a_full_cache_takes_no_more_and_sheds_the_oldest(tmp_path: Path) -> None:
    import os

    features = torch.zeros(10, 10)
    cache = FeatureCache(tmp_path / "c", 2000)
    for number in range(9):
        cache.keep(str(number), {}, features)
    entries = sorted((tmp_path / "c").glob("*/*.features"))
    assert 2 <= len(entries) < 9
    assert sum(entry.stat().st_size for entry in entries) <= 2000
    assert cache.find("8", {}) is None
    for age, entry in enumerate(entries):
        os.utime(entry, (1000 + age, 1000 + age))
    size = entries[0].stat().st_size
    assert trim(tmp_path / "c", size * len(entries)) == size * len(entries)
    assert trim(tmp_path / "c", round(size * 1.3)) == size
    assert [entry for entry in entries if entry.exists()] == entries[-1:]
    (tmp_path / "file").write_text("x")
    with pytest.raises(EpitaxyError, match="expected a directory for the cache of features, found a file"):
        FeatureCache(tmp_path / "file", 10)


def test_raw_models_get_clips_of_zero_mean_and_unit_variance_with_masks() -> None:
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    made = build(AudioSpec(), extractor).inputs(heard(16000, 5000, 90))
    assert made["attention_mask"].sum(1).tolist() == [16000, 5000, 400]
    for row, seen in zip(made["input_values"], made["attention_mask"].bool(), strict=True):
        assert float(row[seen].mean()) == pytest.approx(0, abs=1e-4)
        assert float(row[seen].var(unbiased=False)) == pytest.approx(1, abs=1e-2)
        assert not row[~seen].any()


@pytest.mark.parametrize(("masked", "width"), [(True, 12000), (False, 16000)])
def test_raw_models_with_frames(masked: bool, width: int, tmp_path: Path) -> None:
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=masked)
    spec = AudioSpec(frames=100, long="windows", windows=2)
    short = build(spec, extractor).inputs(heard(12000, 4000))
    assert short["input_values"].shape == (2, width)  # without a mask every clip gets the same length in every batch
    long = build(spec, extractor).inputs([*heard(40000), *written(tmp_path, 2.5)])
    assert long["windows"].tolist() == [2, 2]
    assert long["input_values"].shape == (4, 16000)
    repeated = build(AudioSpec(frames=100, short="repeat"), extractor).inputs(heard(8000))["input_values"][0]
    assert torch.equal(repeated[:8000], repeated[8000:])


def test_whisper_clips_are_as_long_as_asked_for() -> None:
    made = build(AudioSpec(frames=120), WhisperFeatureExtractor()).inputs(heard(16000, 30000))
    assert made["input_features"].shape == (2, 80, 120)
    stock = build(AudioSpec(), WhisperFeatureExtractor()).inputs(heard(16000))
    assert stock["input_features"].shape == (1, 80, 3000)
    assert isinstance(build(AudioSpec(), WhisperFeatureExtractor()), Processed)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"mels": 64}, "mels"),
        ({"statistics": "train"}, "statistics"),
        ({"cache": "somewhere"}, "cache"),
        ({"augment": Augment(time=3)}, "augment"),
        ({"short": "silence"}, "short"),
    ],
)
def test_settings_that_a_model_does_not_have_are_refused(values: dict[str, Any], name: str) -> None:
    with pytest.raises(EpitaxyError, match=f"data.audio.{name}.* Wav2Vec2FeatureExtractor"):
        build(AudioSpec(**values), Wav2Vec2FeatureExtractor())
