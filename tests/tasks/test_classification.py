"""Classification on pictures, sounds and texts: batches, losses, evaluation."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from epitaxy import Head, LoRA, attach
from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.decode import Waveform
from epitaxy.data.splits import DataSpec, Example, Splits, load_splits
from epitaxy.models.opening import open_classifier
from epitaxy.tasks.classification import Classification
from epitaxy.tasks.group import Group
from tests.data.makers import pictures, tone
from tests.tasks.bases import SAVERS, save_bert, save_gpt2, save_vit, save_wav2vec2


def data_for(kind: str, root: Path) -> Splits:
    """Two classes that a model of this kind can read."""
    if kind == "vit":
        counts = {f"{part}/{label}": 5 for part in ("train", "val", "test") for label in ("green", "red")}
        return load_splits(DataSpec(str(pictures(root, counts))))
    if kind in ("ast", "wav2vec2"):
        for number in range(30):
            tone(
                root / ("low", "high")[number % 2] / f"{number}.wav",
                150 + 700 * (number % 2) + number,
                0.3 + number / 400,
            )
        return load_splits(DataSpec(str(root)))
    root.mkdir(parents=True)
    lines = [f"very {word} film number {number},{word}" for word in ("good", "bad") for number in range(15)]
    (root / "t.csv").write_text("\n".join(["text,label", *lines, "good,good"]))
    return load_splits(DataSpec(str(root / "t.csv")))


@pytest.mark.parametrize("kind", SAVERS)
def test_each_kind_of_model_is_fed_scored_and_learns(kind: str, tmp_path: Path) -> None:
    splits = data_for(kind, tmp_path / "data")
    opened = open_classifier(str(SAVERS[kind](tmp_path / "model")), splits.classes)
    task = Classification(opened, splits.classes)
    attach(opened.model, LoRA(rank=2) + Head())
    examples = [splits.train[number] for number in range(6)]
    batch = task.batch(examples)
    assert batch["labels"].tolist() == splits.train.labels[:6]
    logits = task.logits(opened.model, batch)
    assert logits.shape == (6, 2)
    loss = task.loss(opened.model, batch).detach()
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits.detach(), batch["labels"])), rel=1e-5)
    optimizer = torch.optim.AdamW([p for p in opened.model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(25):
        optimizer.zero_grad()
        step = task.loss(opened.model, batch)
        step.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(step.detach()) < 0.7 * float(loss)


@pytest.mark.parametrize("kind", SAVERS)
def test_evaluation_does_not_depend_on_batches_or_modes(kind: str, tmp_path: Path) -> None:
    splits = data_for(kind, tmp_path / "data")
    opened = open_classifier(str(SAVERS[kind](tmp_path / "model")), splits.classes)
    task = Classification(opened, splits.classes)
    opened.model.train()
    quiet = next(module for module in opened.model.modules() if isinstance(module, torch.nn.Dropout))
    quiet.eval()
    one, many = task.evaluate(opened.model, splits.test, 1), task.evaluate(opened.model, splits.test, 4)
    assert opened.model.training
    assert not quiet.training
    assert one.predictions == many.predictions
    assert one.loss == pytest.approx(many.loss, rel=1e-4)
    assert one.targets == splits.test.labels
    assert sum(map(sum, one.confusion)) == len(splits.test)


def test_pictures_reach_the_model_as_its_processor_makes_them(tmp_path: Path) -> None:
    splits = data_for("vit", tmp_path / "data")
    opened = open_classifier(str(save_vit(tmp_path / "model")), splits.classes)
    example = splits.train[0]
    pixels = Classification(opened, splits.classes).batch([example])["pixel_values"]
    expected = opened.processor(images=example.value, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, expected)
    assert pixels.shape == (1, 3, 16, 16)


def test_sounds_are_resampled_and_padded_with_a_mask(tmp_path: Path) -> None:
    opened = open_classifier(str(save_wav2vec2(tmp_path / "model")), ["one", "two"])
    task = Classification(opened, ["one", "two"])
    wave = np.sin(np.arange(4000) / 20).astype(np.float32)
    batch = task.batch([Example(Waveform(wave, 8000), 0, "slow"), Example(Waveform(wave, 16000), 1, "fast")])
    assert batch["input_values"].shape == (2, 8000)
    assert batch["attention_mask"].sum(1).tolist() == [8000, 4000]


def test_long_texts_are_cut_to_what_the_model_takes(tmp_path: Path) -> None:
    for save in (save_bert, save_gpt2):
        opened = open_classifier(str(save(tmp_path / save.__name__)), ["one", "two"])
        task = Classification(opened, ["one", "two"])
        batch = task.batch([Example("good " * 100, 0, "long"), Example("bad", 1, "short")])
        assert batch["input_ids"].shape[1] <= 24
        assert torch.isfinite(task.loss(opened.model, batch))


def test_half_precision_models_get_half_precision_inputs(tmp_path: Path) -> None:
    splits = data_for("vit", tmp_path / "data")
    opened = open_classifier(str(save_vit(tmp_path / "model")), splits.classes, "bfloat16")
    found = Classification(opened, splits.classes).evaluate(opened.model, splits.test)
    assert np.isfinite(found.loss)


def test_processes_share_an_evaluation(tmp_path: Path) -> None:
    splits = data_for("vit", tmp_path / "data")
    opened = open_classifier(str(save_vit(tmp_path / "model")), splits.classes)
    task = Classification(opened, splits.classes)
    alone = task.evaluate(opened.model, splits.test, 3)
    for size in (2, 3, 7, 12):
        shares: list[Any] = [None] * size
        meeting = threading.Barrier(size)

        def gather(rank: int, own: list[Any], shares: list[Any] = shares, meeting: Any = meeting) -> list[Any]:
            shares[rank] = own
            meeting.wait()
            assert len({len(share) for share in shares}) == 1, "every process must run as many batches"
            return [item for share in shares for item in share]

        found: list[Any] = [None] * size

        def work(rank: int, size: int = size, found: list[Any] = found, gather: Any = gather) -> None:
            group = Group(rank, size, lambda own: gather(rank, own))
            found[rank] = task.evaluate(opened.model, splits.test, 3, group)

        workers = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert all(result.predictions == alone.predictions for result in found)
        assert all(result.loss == pytest.approx(alone.loss, rel=1e-5) for result in found)


def test_label_smoothing_is_part_of_the_loss_and_not_of_the_metrics(tmp_path: Path) -> None:
    splits = data_for("vit", tmp_path / "data")
    opened = open_classifier(str(save_vit(tmp_path / "model")), splits.classes)
    plain, smooth = Classification(opened, splits.classes), Classification(opened, splits.classes, label_smoothing=0.3)
    batch = plain.batch([splits.train[number] for number in range(4)])
    expected = F.cross_entropy(plain.logits(opened.model, batch), batch["labels"], label_smoothing=0.3)
    assert float(smooth.loss(opened.model, batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert smooth.evaluate(opened.model, splits.test) == plain.evaluate(opened.model, splits.test)


def test_what_does_not_fit(tmp_path: Path) -> None:
    splits = data_for("vit", tmp_path / "data")
    opened = open_classifier(str(save_bert(tmp_path / "bert")), splits.classes)
    task = Classification(opened, splits.classes)
    with pytest.raises(FormatError, match=r"bert reads texts, but .*\.png is a picture"):
        task.batch([splits.train[0]])
    with pytest.raises(EpitaxyError, match="the model has 2 outputs but the data have 3 classes"):
        Classification(opened, ["a", "b", "c"]).loss(opened.model, task.batch([Example("good", 0, "x")]))
    with pytest.raises(EpitaxyError, match="label_smoothing lies in"):
        Classification(opened, ["a", "b"], label_smoothing=1.0)
    with pytest.raises(EpitaxyError, match="the data set is empty"):
        task.evaluate(opened.model, [])  # type: ignore[arg-type]
