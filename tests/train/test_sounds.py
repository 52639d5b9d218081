"""Runs on sounds: what decides a batch, what an adapter keeps of its front end, and what uses it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from epitaxy.cli.opening import open_base
from epitaxy.core.errors import EpitaxyError
from epitaxy.core.files import inspect
from epitaxy.data.splits import DataSpec, load_splits
from epitaxy.train.evaluate import evaluate
from epitaxy.train.feeding import batches
from epitaxy.train.order import Order
from epitaxy.train.plan import plan
from epitaxy.train.prepare import prepare
from epitaxy.train.recipe import Recipe, RecipeError, from_dict
from epitaxy.train.recipe_files import change
from epitaxy.train.run import run
from tests.data.makers import tone
from tests.tasks.bases import save_ast, save_vit, save_wav2vec2


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Two classes of tones, some shorter and some longer than the model's 32 frames."""
    for number in range(24):
        label, seconds = ("low", "high")[number % 2], 0.15 + 0.03 * number
        tone(tmp_path / "sounds" / label / f"{number}.wav", 200 + 2500 * (number % 2) + 10 * number, seconds)
    return tmp_path / "sounds"


AUDIO: dict[str, Any] = {
    "frames": 40,
    "statistics": "train",
    "long": "random",
    "short": "silence",
    "augment": {"frequency": 4, "time": 9},
}


def recipe(base: Path, sounds: Path, out: Path, audio: dict[str, Any] | None) -> Recipe:
    data = {"source": str(sounds), "kind": "audio_folder", **({} if audio is None else {"audio": audio})}
    method = [{"method": "lora", "rank": 2}, "head"]
    train = {"steps": 6, "batch": 4, "learning_rate": 1e-2}
    values = {"base": str(base), "out": str(out), "method": method, "data": data, "train": train, "samples": 4}
    return from_dict(values, "test")


def test_batches_do_not_depend_on_workers_nor_on_where_a_run_was_taken_up(sounds: Path, tmp_path: Path) -> None:
    ready = prepare(recipe(save_ast(tmp_path / "ast"), sounds, tmp_path / "run", AUDIO))

    def fed(first: int, workers: int) -> list[torch.Tensor]:
        order = Order(len(ready.splits.train), 4, 1, 11, first, 9)
        cpu = torch.device("cpu")
        return [batch["input_values"] for batch in batches(ready.splits.train, ready.task, order, workers, cpu)]

    alone = fed(0, 0)
    assert len(alone) == 9
    for others, start in ((fed(0, 2), 0), (fed(4, 0), 4), (fed(7, 2), 7)):
        assert all(torch.equal(one, other) for one, other in zip(alone[start:], others, strict=True))
    rows = torch.cat(alone)
    assert len(torch.unique(rows.flatten(1), dim=0)) == len(rows)  # each epoch shows an example in another way
    plain = ready.task.batch([ready.splits.train[0]])["input_values"]
    assert torch.equal(plain, ready.task.batch([ready.splits.train[0]])["input_values"])


def test_an_adapter_keeps_its_front_end_and_is_measured_with_it(sounds: Path, tmp_path: Path) -> None:
    base = save_ast(tmp_path / "ast", ["high", "low"])
    trained = recipe(base, sounds, tmp_path / "run", AUDIO | {"cache": str(tmp_path / "cache")})
    result = run(trained, progress=False)
    kept = inspect(tmp_path / "run/adapter").provenance["front_end"]
    assert kept == result["data"]["front_end"]
    assert (kept["frames"], kept["mels"], kept["short"], kept["long"]) == (40, 16, "silence", "random")
    assert len(kept["statistics"]) == 2  # the numbers themselves, not the word "train"
    assert "augment" not in kept
    assert len(list((tmp_path / "cache").glob("*/*.features"))) == 24
    plain = recipe(base, sounds, tmp_path / "other", None)  # says nothing of 40 frames
    (row,) = [row for row in evaluate(plain, [tmp_path / "run/adapter"], "test", 3) if row.adapter]
    assert row.loss == pytest.approx(result["test"]["loss"], rel=1e-5)
    predictions = json.loads((tmp_path / "run/predictions.json").read_text())
    assert all(sample["kind"] == "audio" and max(sample["envelope"]) > 0.4 for sample in predictions["samples"])
    again = open_base(str(base), inspect(tmp_path / "run/adapter"))
    assert again.processor.max_length == again.model.config.max_length == 40  # type: ignore[union-attr]
    assert [again.processor.mean, again.processor.std] == kept["statistics"]


def test_adapters_for_clips_of_different_lengths_are_not_measured_on_one_base(sounds: Path, tmp_path: Path) -> None:
    base = save_ast(tmp_path / "ast")
    for name, frames in (("one", 40), ("two", 48)):
        run(recipe(base, sounds, tmp_path / name, {"frames": frames}), progress=False)
    both = [tmp_path / "one/adapter", tmp_path / "two/adapter"]
    with pytest.raises(EpitaxyError, match=r"two.*was trained on 48 frames and 16 mel bins, .*one.* on 40 and 16"):
        evaluate(recipe(base, sounds, tmp_path / "x", None), both, "test", 4)


def test_windows_average_the_probabilities_of_a_clip(sounds: Path, tmp_path: Path) -> None:
    audio = {"long": "windows", "windows": 3, "frames": 16}
    ready = prepare(recipe(save_ast(tmp_path / "ast"), sounds, tmp_path / "run", audio))
    model, test = ready.opened.model.eval(), ready.splits.test
    examples = [test[row] for row in range(len(test))]
    batch = ready.task.batch(examples)
    assert max(batch["windows"].tolist()) == 3
    with torch.no_grad():
        found = ready.task.logits(model, batch).softmax(-1)
        rows = model(input_values=batch["input_values"]).logits.softmax(-1)
    expected = torch.stack([part.mean(0) for part in rows.split(batch["windows"].tolist())])
    assert found.shape == (len(test), 2)
    assert torch.allclose(found, expected, atol=1e-6)
    one, many = (ready.task.evaluate(model, test, size) for size in (1, 5))
    assert one.loss == pytest.approx(many.loss, rel=1e-4)
    trained = ready.task.training_batch(examples[:3], [(0, 0, row) for row in range(3)])
    assert trained["input_values"].shape[0] == 3
    assert torch.isfinite(ready.task.loss(model, trained))


def test_the_plan_and_the_resolved_recipe_show_the_settings(sounds: Path, tmp_path: Path) -> None:
    wanted = recipe(save_ast(tmp_path / "ast"), sounds, tmp_path / "run", {"statistics": "esc50"})
    found = plan(wanted, measure=False).data["front_end"]
    assert (found["frames"], found["mels"], found["statistics"]) == (32, 16, [-6.6268, 5.3585])
    assert wanted.to_dict()["data"]["audio"]["short"] == "pad"
    assert from_dict(wanted.to_dict(), "again") == wanted
    unsaid = recipe(tmp_path / "ast", sounds, tmp_path / "run", None)
    assert unsaid.to_dict()["data"]["audio"]["long"] == "cut"  # defaults are written out for sounds


def test_overrides_reach_into_the_sections(sounds: Path, tmp_path: Path) -> None:
    plain = recipe(tmp_path / "ast", sounds, tmp_path / "run", None)
    changed = change(plain, ["data.audio.augment.time=80", "data.audio.frames=500", "data.audio.statistics=[-6, 5]"])
    assert changed.data.audio is not None
    assert (changed.data.audio.augment.time, changed.data.audio.augment.frequency) == (80, 0)
    assert (changed.data.audio.frames, changed.data.audio.statistics) == (500, (-6.0, 5.0))
    for override, message in (
        ("data.audio.frame=5", r"'data.audio.frame' is no key of a recipe; did you mean 'frames'"),
        ("data.audio.augment.times=5", r"'data.audio.augment.times' is no key"),
        ("data.audio.frames.x=5", r"'data.audio.frames' is one value"),
        ("data.audio.long=wrap", r"data.audio.long"),
        ("data.audio.frames=0", r"data.audio.frames must be at least 1, got 0"),
    ):
        with pytest.raises(RecipeError, match=message):
            change(plain, [override])


def test_settings_for_sounds_are_refused_where_there_are_none(tmp_path: Path) -> None:
    for label in ("red", "green"):
        for number in range(8):
            (tmp_path / "pictures" / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (number * 9, 40, 90 if label == "red" else 10)).save(
                tmp_path / "pictures" / label / f"{label}{number}.png"
            )
    values = {"source": str(tmp_path / "pictures"), "audio": {"frames": 10}}
    with pytest.raises(EpitaxyError, match=r"data.audio: is for sounds, and these data are pictures; leave it out"):
        prepare(from_dict({"base": str(save_vit(tmp_path / "v")), "method": "head", "data": values}, "x"))


def test_a_raw_model_with_a_wrong_setting_says_which(sounds: Path, tmp_path: Path) -> None:
    base = save_wav2vec2(tmp_path / "w", ["high", "low"])
    with pytest.raises(EpitaxyError, match=r"data.audio.statistics is for models that read log-mel spectrograms"):
        prepare(recipe(base, sounds, tmp_path / "run", {"statistics": "train"}))
    result = run(recipe(base, sounds, tmp_path / "run", {"frames": 30, "long": "center"}), progress=False)
    assert result["data"]["front_end"]["frames"] == 30


def test_left_channels_where_asked_for(tmp_path: Path) -> None:
    from epitaxy.data.audio.spec import AudioSpec

    for number in range(6):
        tone(tmp_path / "d" / ("a", "b")[number % 2] / f"{number}.wav", 300 + number, channels=2)
    for mono in ("mean", "left"):
        spec = DataSpec(str(tmp_path / "d"), audio=AudioSpec(mono=mono))  # type: ignore[arg-type]
        splits = load_splits(spec)
        assert splits.train.mono == splits.lazily().train[0].value.mono == mono


def test_no_layer_is_dropped_under_an_adapter(sounds: Path, tmp_path: Path) -> None:
    """A head that pools the last block's output needs that block to run, and every block's adapter should train."""
    base = save_wav2vec2(tmp_path / "w", ["high", "low"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "layerdrop": 1.0}))
    pooled = change(recipe(base, sounds, tmp_path / "run", None), ["method.head.pool=all"])
    ready = prepare(pooled)
    assert ready.opened.model.config.layerdrop == 0.0
    ready.opened.model.config.layerdrop = 1.0
    batch = ready.task.batch([ready.splits.train[0]])
    with pytest.raises(EpitaxyError, match="set its `layerdrop` to 0"):
        ready.task.loss(ready.opened.model.train(), batch)
    ready.opened.model.config.layerdrop = 0.0
    assert ready.task.loss(ready.opened.model, batch).item() > 0


def test_the_pass_for_statistics_and_cache_is_shown(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("epitaxy.train.progress.PLAIN_INTERVAL", 0.0)
    base = save_ast(tmp_path / "ast")
    told = recipe(base, sounds, tmp_path / "run", AUDIO | {"cache": str(tmp_path / "cache")})
    capsys.readouterr()
    ready = prepare(told, progress=True)
    lines = capsys.readouterr().err.splitlines()
    count = len(ready.splits.train)
    assert len(lines) == count
    assert lines[0].startswith(f"statistics and features of the training sounds: 1/{count}  ")
    assert lines[-1].startswith(f"statistics and features of the training sounds: {count} in 0:0")
    prepare(told)
    prepare(recipe(base, sounds, tmp_path / "run", {"frames": 40}), progress=True)  # nothing to measure
    assert capsys.readouterr().err == ""
