"""Sound folders, decoding, and resampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from epitaxy.core.errors import FormatError
from epitaxy.data.decode import Waveform, decode_audio
from epitaxy.data.splits import DataSpec, load_splits
from tests.data.makers import picture, tone


def folder(root: Path) -> Path:
    for split in ("train", "val", "test"):
        for number, frequency in enumerate((300.0, 600.0)):
            for take in range(3):
                seconds = 0.2 + 0.01 * take + 0.001 * ("train", "val", "test").index(split)
                tone(root / split / f"note{number}" / f"{take}.wav", frequency, seconds, rate=8000)
    return root


def test_a_sound_folder_is_recognised_and_resampled(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    tone(root / "train/note0/flac.flac", 300.0, 0.5, rate=44100, channels=2)
    tone(root / "train/note0/ogg.ogg", 300.0, 0.5, rate=8000)
    splits = load_splits(DataSpec(str(root), sampling_rate=16000))
    assert splits.modality == "audio"
    assert splits.kind == "audio_folder"
    assert len(splits.train) == 8
    for example in splits.train:
        assert example.value.rate == 16000
        assert example.value.samples.dtype == np.float32
        assert example.value.samples.ndim == 1
    lengths = {Path(example.name).name: len(example.value.samples) for example in splits.train}
    assert lengths["flac.flac"] == 8000
    stored = load_splits(DataSpec(str(root)))
    assert {example.value.rate for example in stored.train} == {8000, 44100}


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = np.full(100, 0.5), np.full(100, -0.25)
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], 1), 8000, subtype="FLOAT")
    wave = decode_audio((tmp_path / "s.wav").read_bytes(), "s.wav")
    assert np.allclose(wave.samples, 0.125)


@pytest.mark.parametrize(
    ("source", "target"), [(44100, 16000), (48000, 16000), (8000, 16000), (16000, 22050), (22050, 16000)]
)
def test_resampling_keeps_what_fits_and_removes_what_does_not(source: int, target: int) -> None:
    time = np.arange(source) / source
    limit = min(source, target) / 2
    for frequency in (50.0, 1000.0, 0.85 * limit):
        wave = Waveform(np.sin(2 * np.pi * frequency * time + 0.3).astype(np.float32), source).at(target)
        assert wave.rate == target
        assert len(wave.samples) == target
        expected = np.sin(2 * np.pi * frequency * np.arange(target) / target + 0.3)
        edge = target // 50
        assert np.abs(wave.samples - expected)[edge:-edge].max() < 2e-3
    if target < source:
        above = min(1.15 * limit, 0.98 * source / 2)
        alias = Waveform(np.sin(2 * np.pi * above * time).astype(np.float32), source).at(target)
        assert np.abs(alias.samples[target // 50 : -target // 50]).max() < 1e-3


def test_resampling_keeps_a_constant_and_works_on_very_short_sounds() -> None:
    steady = Waveform(np.ones(4000, np.float32), 44100).at(16000)
    assert np.abs(steady.samples[200:-200] - 1).max() < 1e-5
    assert len(Waveform(np.ones(1, np.float32), 44100).at(16000).samples) == 1


def test_bad_sounds_have_their_reasons(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    (root / "train/note0/empty.wav").write_bytes(b"")
    (root / "train/note0/words.wav").write_text("no sound")
    whole = tone(root / "train/note1/torn.wav", 500.0, 0.3).read_bytes()
    (root / "train/note1/torn.wav").write_bytes(whole[: len(whole) // 2])
    soundfile.write(root / "train/note1/silent.wav", np.zeros(0), 8000)
    soundfile.write(root / "train/note1/nan.wav", np.full(50, np.nan), 8000, subtype="FLOAT")
    flac = tone(root / "train/note1/torn.flac", 500.0, 0.5).read_bytes()
    (root / "train/note1/torn.flac").write_bytes(flac[: len(flac) // 2])
    splits = load_splits(DataSpec(str(root), on_bad="skip"))
    reasons = {Path(name).name: reason for name, reason in splits.skipped}
    assert reasons.keys() == {"empty.wav", "words.wav", "torn.wav", "silent.wav", "nan.wav", "torn.flac"}
    assert reasons["empty.wav"] == "the file is empty"
    assert reasons["torn.wav"] == "the sound is truncated"
    assert reasons["silent.wav"] == "holds no sound"
    assert reasons["nan.wav"] == "holds NaN or infinite samples"
    assert reasons["words.wav"].startswith("not a sound that can be read")
    with pytest.raises(FormatError, match=r"6 of 24 examples cannot be read"):
        load_splits(DataSpec(str(root)))


def test_a_folder_of_both_asks_which(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    for split in ("train", "val", "test"):
        for label in ("note0", "note1"):
            picture(root / split / label / "cover.png", seed=len(split) + len(label) + int(label[-1]) * 7)
    with pytest.raises(FormatError, match=r"holds 6 pictures and 18 sounds; say which"):
        load_splits(DataSpec(str(root)))
    assert len(load_splits(DataSpec(str(root), kind="audio_folder")).train) == 6
    assert len(load_splits(DataSpec(str(root), kind="image_folder")).train) == 2
