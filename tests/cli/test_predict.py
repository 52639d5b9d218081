"""Predicting classes of new files: pictures, texts, short and long sounds, and files that cannot be read."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from epitaxy.core.errors import EpitaxyError
from epitaxy.data.audio.decoding import OpenSound
from epitaxy.data.inputs import Windows
from tests.cli.conftest import COLOURS, SIZES, Epitaxy
from tests.cli.test_modalities import ear, reader  # noqa: F401  (fixtures)
from tests.data.makers import tone


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_pictures_get_what_the_test_of_the_run_gave_them(
    epitaxy: Epitaxy, finished: Path, data: Path, tmp_path: Path
) -> None:
    outcome = epitaxy("predict", finished, data / "test", "--out", tmp_path / "scores.csv")
    assert outcome.code == 0, outcome.err
    told = json.loads((finished / "predictions.json").read_text())
    known = {
        Path(name).resolve(): (told["classes"][said], confidence)
        for name, said, confidence in zip(told["names"], told["predictions"], told["confidences"], strict=True)
    }
    found = rows(tmp_path / "scores.csv")
    assert len(found) == len(known) == SIZES["test"] * len(COLOURS)
    for row in found:
        label, confidence = known[Path(row["file"]).resolve()]
        assert row["label"] == label
        assert float(row["confidence"]) == pytest.approx(confidence, abs=2e-5)
        assert (row["part"], row["start"], row["end"]) == ("file", "", "")
        scores = [float(row[f"score {name}"]) for name in told["classes"]]
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        assert max(scores) == float(row["confidence"])
    adapter = epitaxy("predict", finished / "adapter", data / "test", "--batch", "4", "--json")
    plain = json.loads(adapter.out)
    assert [one["label"] for one in plain] == [row["label"] for row in found]
    merged = epitaxy("predict", finished, data / "test", "--merge", "--json")
    assert "merged" in merged.err
    for one, other in zip(plain, json.loads(merged.out), strict=True):
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-4)
    wrong = epitaxy("predict", finished, data / "test", "--window", "1")
    assert "reads no sounds, and only sounds are cut into windows" in wrong.err


def test_unreadable_inputs_are_named_and_the_rest_goes_on(
    epitaxy: Epitaxy, finished: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "inbox"
    shutil.copytree(data / "test/red", folder)
    (folder / "1b.png").write_bytes(b"")
    (folder / "9.png").write_text("no picture")
    (folder / "notes.md").write_text("not looked at")
    outcome = epitaxy("predict", finished, folder, "--out", tmp_path / "deep" / "scores.json")
    assert outcome.code == 1
    assert len(json.loads((tmp_path / "deep/scores.json").read_text())) == SIZES["test"]
    assert outcome.err.splitlines() == [
        f"left out: {folder / '1b.png'}: the file is empty",
        f"left out: {folder / '9.png'}: not a picture in a known format",
        f"error: 2 of {SIZES['test'] + 2} inputs could not be read",
    ]
    stopped = epitaxy("predict", finished, folder, "--stop")
    assert stopped.code == 1
    assert stopped.err.strip() == f"error: {folder / '1b.png'}: the file is empty"
    assert len(stopped.out.splitlines()) == 2  # the files before it


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.png"], "nowhere.png: no such file or folder"),
        (["{empty}"], "no pictures in this folder, 0 other files"),
        (["{data}", "--out", "scores.xml"], "the scores go to a file that ends in .csv or .json"),
        (["{data}", "--aggregate", "median"], "no way is called 'median'"),
    ],
)
def test_mistakes(epitaxy: Epitaxy, finished: Path, data: Path, tmp_path: Path, words: list[str], said: str) -> None:
    outcome = epitaxy("predict", finished, *(word.format(empty=tmp_path, data=data) for word in words))
    assert outcome.code == 1
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_fully_fine_tuned_run(epitaxy: Epitaxy, recipe: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "full"
    assert epitaxy("train", recipe, "method=full", "train.epochs=1", f"out={run}").code == 0
    told = json.loads((run / "predictions.json").read_text())
    found = json.loads(epitaxy("predict", run, *told["names"], "--json").out)
    assert [one["label"] for one in found] == [told["classes"][place] for place in told["predictions"]]
    assert "nothing to merge" in epitaxy("predict", run, data / "test", "--merge").err


@pytest.fixture(scope="module")
def listening(ear: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run that tells low from high tones in clips of 0.32 s."""
    from epitaxy.cli import main

    root = tmp_path_factory.mktemp("tones")
    for number in range(10):
        tone(root / "sounds/low" / f"{number}.wav", 300 + 5 * number, 0.3)
        tone(root / "sounds/high" / f"{number}.wav", 3000 + 50 * number, 0.3)
    words = ["train", "own/sounds", f"base={ear}", f"data.source={root / 'sounds'}", f"out={root / 'run'}"]
    words += ["method=[{method: lora, rank: 2}, head]", "train.epochs=8", "train.learning_rate=3e-2"]
    assert main([*words, "train.patience=null"]) == 0
    return root / "run"


@pytest.mark.parametrize("rate", [16000, 22050])
def test_long_recordings_are_windows_and_a_file(
    epitaxy: Epitaxy, listening: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int
) -> None:
    if rate != 16000:
        pytest.importorskip("soxr")
    time = np.arange(10 * rate) / rate
    wave = 0.5 * np.sin(2 * np.pi * np.where(time < 5, 320.0, 3200.0) * time)
    soundfile.write(tmp_path / "long.flac", wave, rate)
    tone(tmp_path / "short.wav", 310.0, 0.3)
    reads: list[int] = []
    read = OpenSound.read

    def counted(self: OpenSound, start: int, stop: int | None, *more: Any) -> Any:
        reads.append((self.count if stop is None else stop) - start)
        return read(self, start, stop, *more)

    monkeypatch.setattr(OpenSound, "read", counted)
    outcome = epitaxy("predict", listening, tmp_path, "--out", tmp_path / "scores.csv", "--batch", "7")
    assert outcome.code == 0, outcome.err
    found = rows(tmp_path / "scores.csv")
    windows = [row for row in found if row["part"] == "window"]
    whole = [row for row in found if row["part"] == "file"]
    assert [Path(row["file"]).name for row in whole] == ["long.flac", "short.wav"]
    assert len(windows) == 62
    assert max(reads) < 0.9 * rate  # a window and what resampling needs around it, never the recording
    assert [float(row["start"]) for row in windows[:3]] == pytest.approx([0.0, 0.16, 0.32])
    assert float(windows[-1]["end"]) == pytest.approx(10.0)
    assert {row["label"] for row in windows if float(row["end"]) < 5} == {"low"}
    assert {row["label"] for row in windows if float(row["start"]) > 5} == {"high"}
    mean = np.mean([float(row["score low"]) for row in windows])
    assert float(whole[0]["score low"]) == pytest.approx(mean, abs=1e-5)
    assert whole[1]["label"] == "low"
    assert float(whole[1]["end"]) == pytest.approx(0.3)
    options = ["--window", "0.3", "--hop", "0.3", "--aggregate", "max", "--json"]
    first = json.loads(epitaxy("predict", listening, tmp_path / "long.flac", *options).out)[0]
    assert len(first["windows"]) == 34
    assert first["scores"]["low"] == max(window["scores"]["low"] for window in first["windows"])


def test_a_window_hears_what_a_file_of_it_would(epitaxy: Epitaxy, listening: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    soundfile.write(tmp_path / "all.wav", noise, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "part.wav", noise[5120:10240], 16000, subtype="FLOAT")
    whole, part = json.loads(epitaxy("predict", listening, tmp_path, "--hop", "0.32", "--json").out)
    window = whole["windows"][1]
    assert (window["start"], window["end"]) == pytest.approx((0.32, 0.64))
    assert window["scores"] == pytest.approx(part["scores"], abs=1e-6)


def test_torn_sounds_beside_whole_ones(epitaxy: Epitaxy, listening: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        tone(tmp_path / f"{name}.wav", 310.0, 2.0)
    torn = (tmp_path / "b.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(torn[: len(torn) // 2])
    outcome = epitaxy("predict", listening, tmp_path, "--out", tmp_path / "scores.json")
    assert outcome.code == 1
    assert outcome.err.splitlines()[0] == f"left out: {tmp_path / 'b.wav'}: the sound is truncated"
    found = json.loads((tmp_path / "scores.json").read_text())
    assert [Path(one["file"]).name for one in found] == ["a.wav", "c.wav"]
    assert found[0]["scores"] == pytest.approx(found[1]["scores"], abs=1e-6)
    assert len(found[0]["windows"]) == len(found[1]["windows"]) == 12


def test_windows_leave_nothing_out() -> None:
    windows = Windows(2.0, 1.5, 16000)
    assert windows.starts(2.04) == [0.0]
    assert windows.starts(5.0) == [0.0, 1.5, 3.0]
    assert windows.starts(5.2) == pytest.approx([0.0, 1.5, 3.0, 3.2])
    for length, hop in ((0.0, 1.0), (2.0, 0.0), (2.0, 2.5)):
        with pytest.raises(EpitaxyError):
            Windows(length, hop, 16000)


def test_a_window_is_no_longer_than_the_clips_of_the_training(
    epitaxy: Epitaxy, listening: Path, tmp_path: Path
) -> None:
    tone(tmp_path / "a.wav")
    outcome = epitaxy("predict", listening, tmp_path / "a.wav", "--window", "1")
    assert "as long as the clips of the training, 0.32 seconds, got 1" in outcome.err


def test_texts(epitaxy: Epitaxy, reader: Path, tmp_path: Path) -> None:  # noqa: F811
    table = tmp_path / "table.csv"
    moods = (("up", "good"), ("down", "bad"))
    lines = [f"the day was {3 * (word + ' ')}<i>{number},{mood}" for number in range(12) for mood, word in moods]
    table.write_text("text,label\n" + "\n".join(lines) + "\n")
    run = tmp_path / "run"
    outcome = epitaxy(
        *("train", "own/texts", f"base={reader}", f"data.source={table}", f"out={run}"),
        *("train.epochs=20", "train.batch=8", "train.learning_rate=3e-2", "train.patience=null"),
    )
    assert outcome.code == 0, outcome.err
    for name, text in (("a.txt", "the day was good good good"), ("b.txt", "the day was bad bad bad"), ("c.txt", " \n")):
        (tmp_path / name).write_text(text)
    outcome = epitaxy("predict", run, tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt", "--json")
    assert outcome.code == 1
    assert f"left out: {tmp_path / 'c.txt'}: the text is empty" in outcome.err
    assert [one["label"] for one in json.loads(outcome.out)] == ["up", "down"]


def test_a_merged_model_hears_what_its_adapter_did(epitaxy: Epitaxy, listening: Path, tmp_path: Path) -> None:
    """Windows of a long recording, with the front end of the training: length, filling and statistics."""
    base = json.loads((listening / "result.json").read_text())["base"]["source"]
    merged = tmp_path / "merged"
    outcome = epitaxy("merge", base, listening, "--out", merged)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "inbox"
    tone(folder / "a.wav", 310.0, 0.2)  # shorter than the clips
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.3, 0.3, 2 * 44100).astype(np.float32)
    soundfile.write(folder / "b.wav", np.stack([noise, 0.2 * noise], 1), 44100)
    one, other = (json.loads(epitaxy("predict", target, folder, "--json").out) for target in (listening, merged))
    assert [len(found["windows"]) for found in other] == [1, 12]
    for ours, theirs in zip(one, other, strict=True):
        assert [(w["start"], w["end"]) for w in ours["windows"]] == [(w["start"], w["end"]) for w in theirs["windows"]]
        for first, second in zip(ours["windows"], theirs["windows"], strict=True):
            assert list(first["scores"]) == list(second["scores"])
            assert list(first["scores"].values()) == pytest.approx(list(second["scores"].values()), abs=1e-4)
    assert (
        "a whole model without an adapter, there is nothing to merge"
        in epitaxy("predict", merged, folder, "--merge").err
    )
    assert "stands on no base" in epitaxy("predict", merged, folder, "--base", base).err
    words = ["--data", listening.parent / "sounds", "--json"]
    told = [json.loads(epitaxy("eval", target, *words).out)["results"] for target in (listening, merged)]
    assert [row["adapter"] for row in told[1]] == [None]
    assert told[0][-1]["loss"] == pytest.approx(told[1][0]["loss"], abs=1e-4)
    (merged / "front_end.json").write_text('{"short": "louder"}')
    broken = epitaxy("predict", merged, folder)
    assert broken.code == 1
    assert "front_end.json: its front end cannot be read (data.audio.short is one of" in broken.err
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**config, "id2label": None}))
    assert "names no classes (id2label)" in epitaxy("predict", merged, folder).err


def test_a_model_without_a_head_predicts_nothing(epitaxy: Epitaxy, listening: Path, ear: Path, tmp_path: Path) -> None:  # noqa: F811
    from transformers import ASTModel

    trunk = tmp_path / "trunk"
    shutil.copytree(ear, trunk)
    ASTModel.from_pretrained(ear).save_pretrained(trunk)
    config = json.loads((trunk / "config.json").read_text())
    (trunk / "config.json").write_text(json.dumps({**config, "id2label": {"0": "high", "1": "low"}}))
    tone(tmp_path / "a.wav", 310.0, 0.2)
    outcome = epitaxy("predict", trunk, tmp_path / "a.wav")
    assert outcome.code == 1
    assert outcome.err.strip() == f"error: {trunk}: this model has no head for its classes, so it is no classifier"
