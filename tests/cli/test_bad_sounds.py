"""Odd and bad sounds: what a run makes of each, going on or stopping, and that nothing is left out unsaid."""

# ruff: noqa: F811

from __future__ import annotations

import json
import re
import struct
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from epitaxy.data import inputs
from epitaxy.data.audio.waveform import Waveform
from epitaxy.train.predict import Prediction, open_predictor
from tests.cli.conftest import Epitaxy
from tests.cli.test_modalities import ear  # noqa: F401  (a fixture)
from tests.data.makers import tone

HOURS = 2
BAD = {
    "cut.wav": "the sound is truncated",
    "empty.wav": "the file is empty",
    "gone.wav": "no such file",
    "infinite.wav": "holds NaN or infinite samples",
    "nan.wav": "holds NaN or infinite samples",
    "text.wav": "not a sound that can be read (Format not recognised)",
    "zero.wav": "holds no sound",
}
ODD = ("eight-bit.wav", "fast.wav", "hours.wav", "one-sample.wav", "six.wav")


def bad(folder: Path) -> None:
    """One file of every name in ``BAD``."""
    folder.mkdir(parents=True, exist_ok=True)
    tone(folder / "cut.wav", 400, 0.3)
    (folder / "cut.wav").write_bytes((folder / "cut.wav").read_bytes()[:5000])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "gone.wav").symlink_to(folder / "nowhere.wav")
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        soundfile.write(folder / f"{name}.wav", np.array([0.1, value, 0.2] * 500), 16000, subtype="FLOAT")
    (folder / "text.wav").write_text("this is no sound, but long enough to hold the header of one")
    soundfile.write(folder / "zero.wav", np.zeros(0), 16000)


def odd(folder: Path) -> None:
    """One file of every name in ``ODD``: all of them sounds, none as expected.  The long one takes no room on disk."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "eight-bit.wav", 0.5 * np.sin(np.arange(6000) * 0.1), 16000, subtype="PCM_U8")
    soundfile.write(folder / "fast.wav", rng.normal(0, 0.1, 70000), 192000)
    soundfile.write(folder / "one-sample.wav", np.array([0.5]), 16000)
    soundfile.write(folder / "six.wav", rng.normal(0, 0.1, (6000, 6)), 16000)
    rate = 4000
    size = HOURS * 3600 * rate
    head = struct.pack("<IHHIIHH", 16, 1, 1, rate, rate, 1, 8)
    with (folder / "hours.wav").open("wb") as stream:
        stream.write(b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + head + b"data" + struct.pack("<I", size))
        stream.truncate(44 + size)


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    for number in range(10):
        tone(tmp_path / "tones/low" / f"{number}.wav", 300 + 5 * number, 0.3)
        tone(tmp_path / "tones/high" / f"{number}.wav", 3000 + 50 * number, 0.3)
    return tmp_path / "tones"


def words(ear: Path, tones: Path, out: Path) -> list[Any]:
    return ["train", "own/sounds", f"base={ear}", f"data.source={tones}", f"out={out}", "train.epochs=1", "samples=0"]


def test_bad_sounds_stop_a_run_before_it_begins(epitaxy: Epitaxy, ear: Path, tones: Path, tmp_path: Path) -> None:
    bad(tones / "low")
    outcome = epitaxy(*words(ear, tones, tmp_path / "run"))
    assert outcome.code == 1
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith(
        f"error: {tones}: 7 of 27 examples cannot be read: {tones}/low/cut.wav (the sound is truncated)"
    )
    assert line.endswith("and 2 more; mend them, or leave them out with on_bad: skip")
    assert not (tmp_path / "run").exists()


def test_bad_sounds_are_left_out_and_listed(epitaxy: Epitaxy, ear: Path, tones: Path, tmp_path: Path) -> None:
    bad(tones / "low")
    outcome = epitaxy(*words(ear, tones, tmp_path / "run"), "data.on_bad=skip")
    assert outcome.code == 0, outcome.err
    assert re.search(
        r"left out  7 examples, the first is .*cut.wav \(the sound is truncated\); the report", outcome.out
    )
    data = json.loads((tmp_path / "run/result.json").read_text())["data"]
    assert {Path(name).name: why for name, why in data["skipped"]} == BAD
    assert sum(data["counts"].values()) == 20
    page = (tmp_path / "run/report.html").read_text()
    assert all(name in page and why in page for name, why in BAD.items())
    planned = epitaxy("plan", *words(ear, tones, tmp_path / "other")[1:], "data.on_bad=skip", "--no-probe")
    assert [line for line in planned.out.splitlines() if line.startswith("left out: ")] == [
        f"left out: {tones}/low/{name}: {why}" for name, why in BAD.items()
    ]


def test_odd_sounds_are_sounds(epitaxy: Epitaxy, ear: Path, tones: Path, tmp_path: Path) -> None:
    pytest.importorskip("soxr")
    odd(tones / "low")
    outcome = epitaxy(*words(ear, tones, tmp_path / "run"))
    assert outcome.code == 0, outcome.err
    data = json.loads((tmp_path / "run/result.json").read_text())["data"]
    assert data["skipped"] == []
    assert sum(data["counts"].values()) == 25
    (tones / "low/hours.wav").unlink()  # told by the next test
    folder = tmp_path / "inbox"
    odd(folder)
    bad(folder)
    (folder / "hours.wav").unlink()
    heard = epitaxy("predict", tmp_path / "run", folder, "--out", tmp_path / "scores.json")
    assert heard.code == 1
    told = [line for line in heard.err.splitlines() if line.startswith("left out: ")]
    assert told == [f"left out: {folder / name}: {why}" for name, why in BAD.items()]
    assert heard.err.splitlines()[-1] == "error: 7 of 11 inputs could not be read"
    found = json.loads((tmp_path / "scores.json").read_text())
    assert [Path(one["file"]).name for one in found] == [name for name in ODD if name != "hours.wav"]
    stopped = epitaxy("predict", tmp_path / "run", folder, "--stop")
    assert stopped.err.strip() == f"error: {folder / 'cut.wav'}: the sound is truncated"


def test_a_long_recording_is_never_held(
    epitaxy: Epitaxy,
    ear: Path,
    tones: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all windows of a recording no more are alive at once than fit a batch."""
    assert epitaxy(*words(ear, tones, tmp_path / "run")).code == 0
    tone(tmp_path / "long.wav", 310.0, 30.0)
    windows: list[weakref.ref[Waveform]] = []
    most = 0

    def noted(*given: Any) -> Waveform:
        nonlocal most
        wave = Waveform(*given)
        windows.append(weakref.ref(wave))
        most = max(most, sum(window() is not None for window in windows))
        return wave

    monkeypatch.setattr(inputs, "Waveform", noted)
    predictor = open_predictor(tmp_path / "run")
    (found,) = predictor.predict([tmp_path / "long.wav"], predictor.windows(), batch=8)
    assert isinstance(found, Prediction)
    assert len(found.windows) == len(windows) > 150
    assert most <= 8 + 1
