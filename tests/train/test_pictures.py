"""Runs on pictures prepared by our own rules: what is kept, told and used again; and runs without validation data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epitaxy.cli.opening import open_base
from epitaxy.core.errors import EpitaxyError
from epitaxy.core.files import inspect
from epitaxy.data.splits import load_splits
from epitaxy.report import build_report
from epitaxy.train.evaluate import evaluate
from epitaxy.train.feeding import batches
from epitaxy.train.order import Order
from epitaxy.train.plan import plan
from epitaxy.train.predict import Prediction, open_predictor
from epitaxy.train.prepare import prepare
from epitaxy.train.recipe import Recipe, RecipeError, from_dict
from epitaxy.train.recipe_files import change
from epitaxy.train.run import run
from tests.cli.conftest import Epitaxy, epitaxy  # noqa: F401  (a fixture)
from tests.data import image_trees as trees
from tests.tasks.bases import save_vit

IMAGE = {"resize": "short_side", "crop": "random", "flip": True, "normalisation": "imagenet"}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of pictures of many shapes."""
    rng = np.random.default_rng(0)
    for number in range(30):
        label = ("red", "green")[number % 2]
        values = rng.integers(0, 256, (20 + number, 45 - number, 3), dtype=np.uint8)
        values[:, :, number % 2] = 250
        (tmp_path / "pictures" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(tmp_path / "pictures" / label / f"{number}.png")
    return tmp_path / "pictures"


def recipe(base: Path, source: Path, out: Path, image: dict[str, Any] | None, **more: Any) -> Recipe:
    data = {"source": str(source), **({} if image is None else {"image": image}), **more.pop("data", {})}
    values = {"base": str(base), "out": str(out), "method": [{"method": "lora", "rank": 2}, "head"], "data": data}
    train = {"steps": 6, "batch": 4, "learning_rate": 1e-2, **more.pop("train", {})}
    return from_dict({**values, "train": train, "samples": 4, **more}, "test")


def test_batches_do_not_depend_on_workers_nor_on_where_a_run_was_taken_up(pictures: Path, tmp_path: Path) -> None:
    ready = prepare(recipe(save_vit(tmp_path / "vit"), pictures, tmp_path / "run", IMAGE))

    def fed(first: int, workers: int) -> list[torch.Tensor]:
        order = Order(len(ready.splits.train), 4, 1, 11, first, 12)
        cpu = torch.device("cpu")
        return [batch["pixel_values"] for batch in batches(ready.splits.train, ready.task, order, workers, cpu)]

    alone = fed(0, 0)
    for others, start in ((fed(0, 2), 0), (fed(5, 0), 5)):
        assert all(torch.equal(one, other) for one, other in zip(alone[start:], others, strict=True))
    rows = torch.cat(alone)
    assert len(torch.unique(rows.flatten(1), dim=0)) > 0.9 * len(rows)  # each epoch shows a picture in another way
    one, two = (ready.task.batch([ready.splits.train[0]])["pixel_values"] for _ in range(2))
    assert torch.equal(one, two)


def test_without_the_section_the_processor_prepares_as_before(pictures: Path, tmp_path: Path) -> None:
    ready = prepare(recipe(save_vit(tmp_path / "vit"), pictures, tmp_path / "run", None))
    examples = [ready.splits.train[row] for row in range(3)]
    expected = ready.opened.processor(images=[example.value for example in examples], return_tensors="pt")
    for batch in (ready.task.batch(examples), ready.task.training_batch(examples, [(0, 0, row) for row in range(3)])):
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_an_adapter_keeps_its_preparation_and_is_used_with_it(pictures: Path, tmp_path: Path) -> None:
    base = save_vit(tmp_path / "vit", ["green", "red"])
    result = run(recipe(base, pictures, tmp_path / "run", IMAGE), progress=False)
    kept = inspect(tmp_path / "run/adapter").provenance["front_end"]
    assert kept == result["data"]["front_end"]
    assert (kept["reads"], kept["size"], kept["side"]) == ("pictures", 16, 18)
    assert kept["normalisation"] == [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    used = result["data"]["normalisation"]
    assert used == {"name": "imagenet", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

    plain = recipe(base, pictures, tmp_path / "other", None)  # says nothing of how pictures are prepared
    (row,) = [row for row in evaluate(plain, [tmp_path / "run/adapter"], "test", 3) if row.adapter]
    assert row.loss == pytest.approx(result["test"]["loss"], rel=1e-5)

    predictions = json.loads((tmp_path / "run/predictions.json").read_text())
    predictor = open_predictor(tmp_path / "run")
    files = [Path(name) for name in predictions["names"]]
    for place, found in enumerate(predictor.predict(files, None)):
        assert isinstance(found, Prediction)
        assert int(np.argmax(found.scores)) == predictions["predictions"][place]
        assert max(found.scores) == pytest.approx(predictions["confidences"][place], rel=1e-4)

    again = open_base(str(base), inspect(tmp_path / "run/adapter"))
    assert list(again.processor.image_mean) == [0.485, 0.456, 0.406]
    build_report(tmp_path / "run")
    assert "imagenet: mean 0.485, 0.456, 0.406; std 0.229, 0.224, 0.225" in (tmp_path / "run/report.html").read_text()


def test_the_processor_s_normalisation_is_told_where_nothing_was_asked(pictures: Path, tmp_path: Path) -> None:
    result = run(recipe(save_vit(tmp_path / "vit"), pictures, tmp_path / "run", None), progress=False)
    assert "front_end" not in result["data"]
    assert result["data"]["normalisation"] == {"name": "processor", "mean": [0.5] * 3, "std": [0.5] * 3}
    build_report(tmp_path / "run")
    assert "own processor: mean 0.5, 0.5, 0.5; std 0.5, 0.5, 0.5" in (tmp_path / "run/report.html").read_text()


def test_a_full_model_is_saved_with_its_preparation(pictures: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    wanted = recipe(save_vit(tmp_path / "vit"), pictures, tmp_path / "run", {"normalisation": "none"}, method="full")
    result = run(wanted, progress=False)
    saved = AutoImageProcessor.from_pretrained(tmp_path / "run/model")
    assert (list(saved.image_mean), list(saved.image_std)) == ([0.0] * 3, [1.0] * 3)
    predictions = json.loads((tmp_path / "run/predictions.json").read_text())
    found = next(iter(open_predictor(tmp_path / "run").predict([Path(predictions["names"][0])], None)))
    assert isinstance(found, Prediction)
    assert max(found.scores) == pytest.approx(predictions["confidences"][0], rel=1e-4)
    assert result["data"]["normalisation"]["name"] == "none"


def test_settings_are_shown_changed_and_refused(pictures: Path, tmp_path: Path) -> None:
    base = save_vit(tmp_path / "vit")
    wanted = recipe(base, pictures, tmp_path / "run", IMAGE)
    assert plan(wanted, measure=False).data["front_end"]["resize"] == "short_side"
    assert from_dict(wanted.to_dict(), "again") == wanted
    changed = change(wanted, ["data.image.normalisation=[[0,0,0],[1,1,1]]", "data.image.flip=false"])
    assert changed.data.image is not None
    assert (changed.data.image.normalisation, changed.data.image.flip) == (((0.0,) * 3, (1.0,) * 3), False)
    assert differs(wanted, changed) == ["data.image.flip", "data.image.normalisation"]
    with pytest.raises(RecipeError, match=r"'data.image.normalization' is no key .*; did you mean 'normalisation'"):
        change(wanted, ["data.image.normalization=half"])
    with pytest.raises(EpitaxyError, match=r"vit: the side of its pictures is a multiple of its patches of 8 .*got 20"):
        prepare(change(wanted, ["data.image.size=20"]))
    larger = prepare(change(wanted, ["data.image.size=24"]))
    batch = larger.task.batch([larger.splits.test[0]])
    assert batch["pixel_values"].shape == (1, 3, 24, 24)
    assert larger.task.logits(larger.opened.model, batch).shape == (1, 2)
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"word {n},{'ab'[n % 2]}\n" for n in range(40)))
    with pytest.raises(EpitaxyError, match=r"data.image: is for pictures, and these data are texts; leave it out"):
        prepare(recipe(base, tmp_path / "texts.csv", tmp_path / "run", IMAGE))


def differs(one: Recipe, other: Recipe) -> list[str]:
    from epitaxy.train.recipe import differences

    return sorted(differences(one, other))


FINAL = {"kind": "vtab", "task": "cifar", "protocol": "final", "verify": False}


def test_a_run_without_validation_tests_its_last_step(tmp_path: Path) -> None:
    root = trees.vtab(tmp_path / "vtab")
    wanted = recipe(
        save_vit(tmp_path / "vit"), root, tmp_path / "run", {}, data=FINAL, train={"epochs": 4, "steps": None}
    )
    told = plan(wanted)
    assert (told.steps, told.data["counts"]["validation"]) == (6, 0)
    result = run(wanted, progress=False)
    assert (result["steps"], result["validation"]["best"], result["validation"]["step"]) == (6, None, None)
    assert result["data"]["counts"] == {"train": 6, "validation": 0, "test": 6}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert not any(key.startswith("validation") for line in lines for key in line)
    build_report(tmp_path / "run")
    assert "0 validation" in (tmp_path / "run/report.html").read_text()
    with pytest.raises(EpitaxyError, match=r"train.patience: stopping early needs validation data"):
        run(change(wanted, ["train.patience=2", f"out={tmp_path / 'other'}"]), progress=False)


def test_the_union_tells_the_accuracy_of_every_set(tmp_path: Path) -> None:
    root = trees.union(tmp_path / "all")
    data = {"kind": "fgvc_union", "verify": False}
    result = run(recipe(save_vit(tmp_path / "vit"), root, tmp_path / "run", {}, data=data), progress=False)
    groups = result["groups"]
    assert list(groups) == ["cars", "cub", "dogs", "flowers", "nabirds"]
    assert {one["examples"] for one in groups.values()} == {6}
    mean = sum(one["accuracy"] for one in groups.values()) / 5
    assert mean == pytest.approx(result["test"]["accuracy"])
    splits = load_splits(recipe(tmp_path / "vit", root, tmp_path / "run", {}, data=data).data)
    predictions = json.loads((tmp_path / "run/predictions.json").read_text())
    right = [p == t for p, t in zip(predictions["predictions"], predictions["targets"], strict=True)]
    dogs = [own for own, name in zip(right, splits.test.names, strict=True) if "FGVC-dogs" in name]
    assert groups["dogs"]["accuracy"] == pytest.approx(sum(dogs) / 6)
    build_report(tmp_path / "run")
    assert "nabirds" in (tmp_path / "run/report.html").read_text()


def test_a_merged_model_prepares_pictures_as_the_adapter_did(
    pictures: Path,
    tmp_path: Path,
    epitaxy: Epitaxy,  # noqa: F811
) -> None:
    base = save_vit(tmp_path / "vit", ["green", "red"])
    run(recipe(base, pictures, tmp_path / "run", IMAGE), progress=False)
    merged = epitaxy("merge", base, tmp_path / "run", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    files = sorted(pictures.rglob("*.png"))[:5]
    for one, other in zip(
        open_predictor(tmp_path / "run").predict(files, None),
        open_predictor(tmp_path / "merged").predict(files, None),
        strict=True,
    ):
        assert isinstance(one, Prediction)
        assert isinstance(other, Prediction)
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
