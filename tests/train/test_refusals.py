"""What cannot be trained is told before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from epitaxy import activate, detach
from epitaxy.core.errors import EpitaxyError, FormatError, StateError, UnsupportedError
from epitaxy.train.loop import TrainConfig, train
from tests.train.small import (
    small_model,
    small_run,
)


def test_bad_examples_are_named_with_and_without_workers(tmp_path: Path) -> None:
    for workers in (0, 1):
        model, adapter, task, splits = small_run(tmp_path / "data")
        victim = Path(splits.train.names[0])
        data = victim.read_bytes()
        victim.write_bytes(b"")
        config = TrainConfig(epochs=1, batch=4, workers=workers)
        with pytest.raises(FormatError, match=rf"^{victim}: the file is empty$"):
            train(model, adapter, task, splits.train, None, config, tmp_path / f"out{workers}", progress=False)
        victim.write_bytes(data)


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")
    run = (task, splits.train, splits.validation, TrainConfig(steps=2), tmp_path / "out")
    activate(model, None)
    with pytest.raises(StateError, match="is not active, so it would get no gradient"):
        train(model, adapter, *run)
    activate(model, "default")
    adapter.trainable = False
    with pytest.raises(StateError, match=r"is frozen; set adapter.trainable = True"):
        train(model, adapter, *run)
    with pytest.raises(StateError, match="nothing would train"):
        train(model, None, *run)
    adapter.trainable = True
    model.classifier.weight.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(StateError, match=r"1 parameters of the base ask for gradients .* 'classifier.weight'"):
        train(model, adapter, *run)
    model.classifier.weight.requires_grad_(False)  # type: ignore[union-attr]
    detach(model)
    with pytest.raises(StateError, match="is not attached to this model"):
        train(model, adapter, *run)
    half = small_model().model.half()
    with pytest.raises(UnsupportedError, match="is float16, in which training underflows"):
        train(half, None, *run)
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_fit_are_told_before_training(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")

    def refused(message: str, config: TrainConfig, data: Any = splits.train) -> None:
        with pytest.raises(EpitaxyError, match=message):
            train(model, adapter, task, data, splits.validation, config, tmp_path / "out", progress=False)

    refused("no metric is called 'acuracy'; did you mean 'accuracy'", TrainConfig(metric="acuracy"))
    refused("no tracker is called 'tensorbord'; did you mean 'tensorboard'", TrainConfig(trackers=("tensorbord",)))
    if not torch.cuda.is_available():
        refused("fp16 needs a GPU", TrainConfig(precision="fp16"))
    refused("the training data are empty", TrainConfig(), [])
    assert not (tmp_path / "out").exists()
