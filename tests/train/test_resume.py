"""Runs that break off and are taken up again, to the bit; and checkpoints that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from epitaxy import Head, LoRA, attach
from epitaxy.core.errors import FormatError, StateError
from epitaxy.models.opening import open_classifier
from epitaxy.tasks.classification import Classification
from epitaxy.train.checkpoint import FOLDER, PATTERN
from epitaxy.train.loop import METRICS, TrainConfig, train
from tests.tasks.bases import SAVERS
from tests.tasks.test_classification import data_for
from tests.train.small import (
    CONFIG,
    BrokenOffError,
    Scripted,
    Stopping,
    break_off,
    digest,
    interrupted,
    small_model,
    small_run,
    whole,
    without_times,
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"accumulate": 1, "checkpoint_every": 1},
        {"checkpoint_every": 5, "log_every": 7},
        {"precision": "bf16"},
        {"keep_best": False, "schedule": "linear"},
        {"schedule": "constant", "clip": None, "weight_decay": 0.3, "metric": "loss"},
        {"workers": 1},
    ],
    ids=str,
)
def test_a_resumed_run_has_the_same_bits(change: dict[str, Any], tmp_path: Path) -> None:
    config = replace(CONFIG, **change)
    expected, first = whole(tmp_path, "whole", config)
    losses = 18 * config.accumulate
    found, second = interrupted(tmp_path, "torn", config, [1, losses // 2, losses // 3, 2])
    assert found == expected
    assert without_times(second.history) == without_times(first.history)
    assert (second.best_step, second.best_metric) == (first.best_step, first.best_metric)
    assert first.resumed_at is None
    assert second.resumed_at is not None
    assert second.resumed_at > 0


@pytest.mark.parametrize("kind", [kind for kind in SAVERS if kind != "vit"])
def test_sounds_and_texts_resume_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    splits = data_for(kind, tmp_path / "data")
    base = str(SAVERS[kind](tmp_path / "model"))
    config = TrainConfig(steps=6, batch=4, learning_rate=0.01, evaluate_every=2)
    digests = []
    for out, stop in (("whole", None), ("torn", 4), ("torn", None)):
        opened = open_classifier(base, splits.classes)
        adapter = attach(opened.model, LoRA(rank=2, dropout=0.1) + Head())
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.fill_(0.01)
        task = Classification(opened, splits.classes)
        used = task if stop is None else Stopping(task, stop)
        run = (opened.model, adapter, used, splits.train, splits.validation, config, tmp_path / out)
        if stop is None:
            result = train(*run, progress=False)
            digests.append((digest(adapter.tensors()), without_times(result.history)))
        else:
            with pytest.raises(BrokenOffError):
                train(*run, progress=False)
    assert result.resumed_at == 2
    assert digests[0] == digests[1]


def test_full_fine_tuning_resumes_too(tmp_path: Path) -> None:
    digests = []
    for out, stops in (("whole", []), ("torn", [11, 9])):
        for stop in [*stops, None]:
            _, _, task, splits = small_run(tmp_path / "data")
            model = small_model().model
            tested = task if stop is None else Stopping(task, stop)
            run = (model, None, tested, splits.train, splits.validation, CONFIG, tmp_path / out)
            if stop is not None:
                with pytest.raises(BrokenOffError):
                    train(*run, progress=False)
            else:
                result = train(*run, progress=False)
        assert result.trained_parameters == sum(p.numel() for p in model.parameters())
        digests.append(digest(dict(model.state_dict())))
    assert digests[0] == digests[1]
    assert digests[0] != digest(dict(small_model().model.state_dict()))


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    expected, first = whole(tmp_path, "out", CONFIG)
    before = (tmp_path / "out" / METRICS).read_bytes()
    model, adapter, task, splits = small_run(tmp_path / "data")
    stopping = Stopping(task, 1)
    result = train(model, adapter, stopping, splits.train, splits.validation, CONFIG, tmp_path / "out", progress=False)
    assert stopping.losses == 0
    assert digest(adapter.tensors()) == expected
    assert result.history == first.history
    assert result.train_seconds == first.train_seconds
    assert (tmp_path / "out" / METRICS).read_bytes() == before


def test_starting_anew_forgets_what_was_there(tmp_path: Path) -> None:
    expected, first = whole(tmp_path, "out", CONFIG)
    model, adapter, task, splits = small_run(tmp_path / "data")
    again = train(
        model, adapter, task, splits.train, splits.validation, CONFIG, tmp_path / "out", resume=False, progress=False
    )
    assert again.resumed_at is None
    assert without_times(again.history) == without_times(first.history)
    assert digest(adapter.tensors()) == expected
    assert len(list((tmp_path / "out" / FOLDER).glob(PATTERN))) == 1


def test_patience_survives_a_resumption(tmp_path: Path) -> None:
    values = [0.3, 0.5, 0.5, 0.4, 0.6, 0.1, 0.2, 0.3]
    config = TrainConfig(steps=50, batch=4, evaluate_every=2, patience=3)
    model, adapter, task, splits = small_run(tmp_path / "data")
    scripted = Scripted(Stopping(task, 14), values)
    with pytest.raises(BrokenOffError):
        train(model, adapter, scripted, splits.train, splits.validation, config, tmp_path / "out", progress=False)
    model, adapter, task, splits = small_run(tmp_path / "data")
    scripted = Scripted(task, values[len(scripted.seen) :])
    result = train(model, adapter, scripted, splits.train, splits.validation, config, tmp_path / "out", progress=False)
    assert (result.steps, result.best_step, result.resumed_at) == (16, 10, 12)


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"differs in train.learning_rate: 0.02 there, 0.5 now"):
        _refused(tmp_path, replace(CONFIG, learning_rate=0.5))
    with pytest.raises(AssertionError, match="differs in method"):
        _refused(tmp_path, CONFIG, LoRA(rank=3) + Head())
    with pytest.raises(AssertionError, match="differs in training data"):
        _refused(tmp_path, CONFIG, rows=6)
    with pytest.raises(AssertionError, match="differs in base"):
        _refused(tmp_path, CONFIG, seed=3)


def _refused(root: Path, config: TrainConfig, method: Any = None, rows: int | None = None, seed: int = 0) -> None:
    if not (root / "out").exists():
        break_off(root, "out", CONFIG, 20)
    _, _, task, splits = small_run(root / "data")
    model = small_model(seed=seed).model
    torch.manual_seed(1)
    adapter = attach(model, method or LoRA(rank=2, dropout=0.2) + Head())
    if rows is not None:
        splits.train.rows, splits.train.labels = splits.train.rows[:rows], splits.train.labels[:rows]
    start = digest(adapter.tensors())
    try:
        train(model, adapter, task, splits.train, splits.validation, config, root / "out", progress=False)
    except StateError as error:
        assert digest(adapter.tensors()) == start, "a refusal leaves the adapter as it was"
        raise AssertionError(str(error)) from None


def test_settings_that_change_nothing_may_change(tmp_path: Path) -> None:
    expected, _ = whole(tmp_path, "whole", CONFIG)
    break_off(tmp_path, "torn", CONFIG, 20)
    found, _ = whole(tmp_path, "torn", replace(CONFIG, checkpoint_every=1, trackers=("tensorboard",)))
    assert found == expected


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    break_off(tmp_path, "out", CONFIG, 20)
    path = next((tmp_path / "out" / FOLDER).glob(PATTERN))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=rf"{path.name}: truncated or not a safetensors file"):
        whole(tmp_path, "out", CONFIG)
    torch.save({"a": 1}, path)
    with pytest.raises(FormatError, match=rf"{path.name}: a pickle, which is never opened"):
        whole(tmp_path, "out", CONFIG)
