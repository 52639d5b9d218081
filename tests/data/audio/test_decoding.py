"""Sound files of every kind, and what is said of those that cannot be read."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.audio.decoding import check_audio, decode_audio
from epitaxy.data.audio.sound import Sound
from epitaxy.data.audio.waveform import Waveform, resample, to_mono
from epitaxy.data.stored import File, Member

RAMP = np.linspace(-1, 1, 4001)[:-1]


def encoded(values: np.ndarray, rate: int = 16000, subtype: str | None = None, kind: str = "WAV") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, values, rate, subtype=subtype, format=kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("subtype", "step"),
    [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-24), ("FLOAT", 2**-24)],
)
def test_every_width_has_the_same_scale(subtype: str, step: float) -> None:
    wave = decode_audio(encoded(RAMP, subtype=subtype), "ramp.wav")
    assert wave.samples.dtype == np.float32
    assert np.abs(wave.samples - RAMP).max() <= 1.01 * step


@pytest.mark.parametrize(
    ("kind", "subtype", "error"), [("FLAC", "PCM_16", 1e-4), ("OGG", "VORBIS", 0.05), ("MP3", None, 0.05)]
)
def test_compressed_files(kind: str, subtype: str | None, error: float) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    wave = decode_audio(encoded(tone, subtype=subtype, kind=kind), "tone")
    assert abs(len(wave.samples) - 16000) <= 2400  # MP3 pads with its encoder's delay
    middle = wave.samples[4000:12000]
    assert abs(float(np.sqrt((middle**2).mean())) - 0.5 / np.sqrt(2)) < error


def test_channels_become_one_by_mean_or_left() -> None:
    six = np.stack([np.full(500, level) for level in (0.6, 0, 0, 0, 0, -0.3)], 1)
    data = encoded(six, subtype="FLOAT")
    assert np.allclose(decode_audio(data, "six").samples, 0.05)
    assert np.allclose(decode_audio(data, "six", mono="left").samples, 0.6)
    few = encoded(np.array([[0.5, -0.5, 0.3]]), subtype="FLOAT")  # more channels than samples
    assert decode_audio(few, "few").samples == pytest.approx([0.1], abs=1e-6)


@pytest.mark.parametrize("shape", ["t2", "2t"])
def test_arrays_of_two_channels_are_one_sound_not_many(shape: str) -> None:
    pair = np.stack([np.full(900, 16384), np.full(900, -8192)], 1).astype(np.int16)
    wave = Waveform(pair if shape == "t2" else pair.T, 16000)  # type: ignore[arg-type]
    assert wave.samples.shape == (900,)
    assert np.allclose(wave.samples, 0.125)


def test_arrays_of_other_types_are_scaled() -> None:
    assert Waveform(np.array([0, 128, 255], np.uint8), 8000).samples == pytest.approx([-1, 0, 127 / 128])  # type: ignore[arg-type]
    assert Waveform(np.array([-(2**31), 2**30], np.int32), 8000).samples == pytest.approx([-1, 0.5])  # type: ignore[arg-type]
    double = Waveform(np.array([0.25, -0.5]), 8000)  # type: ignore[arg-type]
    assert double.samples.dtype == np.float32
    with pytest.raises(FormatError, match="samples of type complex128 are no sound"):
        Waveform(np.zeros(4, complex), 8000)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"shape \(2, 3, 4\) is no sound"):
        Waveform(np.zeros((2, 3, 4), np.float32), 8000)
    with pytest.raises(FormatError, match="at least 1 Hz, got 0"):
        Waveform(np.zeros(4, np.float32), 0)
    with pytest.raises(EpitaxyError, match="mono is one of mean, left, got 'right'"):
        to_mono(np.zeros((4, 2), np.float32), "right")  # type: ignore[arg-type]


def test_a_rate_of_192_kilohertz_comes_down_to_16() -> None:
    seconds = np.arange(192000) / 192000
    audible, ultrasound = np.sin(2 * np.pi * 1000 * seconds), np.sin(2 * np.pi * 30000 * seconds)
    wave = decode_audio(encoded(0.5 * (audible + ultrasound), 192000, "PCM_24"), "bat.wav", rate=16000)
    assert len(wave.samples) == 16000
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert np.abs(wave.samples - expected)[200:-200].max() < 1e-3


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_resampled_lengths_are_rounded_up(rate: int) -> None:
    for count in (1, 2, 399, 400, 1001, rate):
        found = resample(np.ones(count, np.float32), rate, 16000)
        assert len(found) == -(-count * 16000 // rate)
        assert found.dtype == np.float32


def _bad(kind: str) -> bytes:
    whole = encoded(0.1 * RAMP)
    return {
        "nothing": b"",
        "words": b"this is no sound at all, only words",
        "headless": whole[44:],
        "no samples": encoded(np.zeros(0)),
        "cut": whole[:3000],
        "cut flac": encoded(np.random.default_rng(0).normal(0, 0.1, 40000), kind="FLAC")[:20000],
        "nan": encoded(np.array([0.0, np.nan, 0.1]), subtype="FLOAT"),
        "infinite": encoded(np.array([0.0, np.inf, 0.1]), subtype="FLOAT"),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nothing", "the file is empty"),
        ("words", "not a sound that can be read"),
        ("headless", "not a sound that can be read"),
        ("no samples", "holds no sound"),
        ("cut", "the sound is truncated"),
        ("cut flac", "the sound is truncated|cannot be read|can be read"),
        ("nan", "holds NaN or infinite samples"),
        ("infinite", "holds NaN or infinite samples"),
    ],
)
def test_what_cannot_be_read_is_named(kind: str, reason: str, tmp_path: Path) -> None:
    data = _bad(kind)
    file = tmp_path / "bad.wav"
    file.write_bytes(data)
    sound = Sound(File(str(file)), "bad.wav")
    for read in (lambda: decode_audio(data, "bad.wav"), lambda: check_audio(file, "bad.wav"), lambda: sound.at(8000)):
        with pytest.raises(FormatError, match=f"^bad.wav: .*({reason})") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    sound = Sound(File(str(tmp_path / "gone.wav")), "gone.wav")
    for read in (lambda: sound.rate, lambda: sound.samples, lambda: sound.digest()):
        with pytest.raises(FormatError, match=r"^gone.wav: no such file"):
            read()


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_stretch_is_the_same_stretch_of_the_whole(tmp_path: Path, rate: int, kind: str) -> None:
    values = np.random.default_rng(1).normal(0, 0.2, (3 * rate, 2)).clip(-1, 1)
    file = tmp_path / f"noise.{kind.lower()}"
    soundfile.write(file, values, rate, format=kind, subtype="PCM_16")
    sound = Sound(File(str(file)), "noise")
    whole = sound.at(16000).samples
    assert (sound.count, sound.rate, sound.seconds) == (3 * rate, rate, 3.0)
    for start, count in ((0, 100), (0, 48000), (1, 400), (15999, 16000), (33333, 5000), (47000, 1000)):
        found = sound.stretch(start, count, 16000)
        assert len(found) == count
        assert np.abs(found - whole[start : start + count]).max() < 1e-5
    assert len(sound.stretch(47000, 99999, 16000)) == 1000
    with pytest.raises(FormatError, match=r"noise: holds 3.00 s, asked for 10 samples from 62.50 s"):
        sound.stretch(1000000, 10, 16000)


def test_a_sound_in_an_archive_is_read_in_place(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("s.wav", encoded(0.5 * RAMP))
    sound = Sound(Member(str(tmp_path / "a.zip"), "s.wav"), "s.wav")
    loose = tmp_path / "s.wav"
    loose.write_bytes(encoded(0.5 * RAMP))
    assert np.array_equal(sound.samples, Sound(File(str(loose)), "s").samples)
    assert sound.digest() == Sound(File(str(loose)), "other name").digest()
    loose.write_bytes(encoded(0.4 * RAMP))
    assert sound.digest() != Sound(File(str(loose)), "s").digest()


LONG = """
import sys, resource, numpy as np
from epitaxy.data.audio.front_end import LogMel
from epitaxy.data.audio.decoding import check_audio
from epitaxy.data.audio.sound import Sound
from epitaxy.data.audio.spec import AudioSpec
from epitaxy.data.splits import Example
from epitaxy.data.stored import File
from pathlib import Path
sound = Sound(File(sys.argv[1]), "long.wav")
front_end = LogMel(AudioSpec(frames=998, mels=128, statistics=(-4.27, 4.57), long="windows", windows=3), 16000)
front_end.inputs([Example(Sound(File(sys.argv[2]), "short.wav"), 0, "short.wav")])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = front_end.inputs([Example(sound, 0, "long.wav")])
assert check_audio(Path(sys.argv[1]), "long.wav") == sound.count
print(sound.seconds, tuple(made["input_values"].shape), made["windows"].tolist())
print(made["input_values"].mean((1, 2)).tolist())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_two_hours_take_little_memory(tmp_path: Path) -> None:
    rate, quiet = 8000, np.zeros(8000 * 60, np.int16)
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate, 1, subtype="PCM_16") as file:
        for minute in range(120):
            level = (
                quiet if minute != 119 else (3000 * np.random.default_rng(0).normal(size=len(quiet))).astype(np.int16)
            )
            file.write(level)
    soundfile.write(tmp_path / "short.wav", np.random.default_rng(0).normal(0, 0.1, rate * 30), rate)
    command = [sys.executable, "-c", LONG, str(tmp_path / "long.wav"), str(tmp_path / "short.wav")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    shape, means, grown = ran.stdout.splitlines()
    assert shape == "7200.0 (3, 998, 128) [3]"
    first, middle, last = (float(number) for number in means.strip("[]").split(","))
    assert first == middle < -1.2 < last  # only the last minute holds sound, and the last window reaches it
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown) * unit < 60e6  # the file itself holds 115 MB, decoded 230 MB
