"""A small real run: a tiny ViT with dropout, pictures of three colours, and everything ``train`` needs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from epitaxy import Head, LoRA, attach
from epitaxy.core.adapter import Adapter
from epitaxy.data.splits import DataSpec, Splits, load_splits
from epitaxy.models.opening import Opened
from epitaxy.tasks.classification import Classification
from epitaxy.tasks.metrics import Metrics
from epitaxy.train.loop import TrainConfig, TrainResult, train
from tests.data.makers import pictures

CLASSES = ("blue", "green", "red")
CONFIG = TrainConfig(steps=18, batch=5, accumulate=2, learning_rate=0.02, evaluate_every=4, log_every=2, warmup=3)


def small_data(root: Path, each: int = 7) -> Splits:
    """Three colours, ``each`` pictures per split."""
    if not root.exists():
        pictures(root, {f"{split}/{colour}": each for split in ("train", "val", "test") for colour in CLASSES})
    return load_splits(DataSpec(str(root)))


def small_model(dropout: float = 0.1, seed: int = 0) -> Opened:
    """The same weights every time; with dropout, so that random states matter."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        num_labels=len(CLASSES),
    )
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    return Opened(ViTForImageClassification(config).eval(), processor, "vision", "small")


def small_run(
    root: Path, method: Any = None, dropout: float = 0.1
) -> tuple[nn.Module, Adapter, Classification, Splits]:
    """Model, fresh adapter, task and data."""
    splits, opened = small_data(root), small_model(dropout)
    torch.manual_seed(1)
    adapter = attach(opened.model, method or LoRA(rank=2, dropout=0.2) + Head())
    return opened.model, adapter, Classification(opened, splits.classes), splits


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """One number for the exact bits of some tensors."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(key.encode())
        found.update(tensors[key].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the log without what depends on the clock."""
    return [{key: value for key, value in line.items() if key != "examples_per_second"} for line in history]


class BrokenOffError(Exception):
    """Stands for whatever stops a run."""


class Stopping:
    """A task that breaks off at its n-th loss, and otherwise is the task it wraps."""

    def __init__(self, task: Any, at: int) -> None:
        self.task, self.at, self.losses = task, at, 0
        self.batch, self.evaluate, self.logits = task.batch, task.evaluate, task.logits

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self._count()
        loss: Tensor = self.task.loss(model, batch)
        return loss

    def criterion(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        self._count()
        loss: Tensor = self.task.criterion(logits, batch)
        return loss

    def _count(self) -> None:
        self.losses += 1
        if self.losses == self.at:
            raise BrokenOffError


def whole(
    root: Path, out: str, config: TrainConfig, method: Any = None, objective: Any = None
) -> tuple[str, TrainResult]:
    """One uninterrupted run: the digest of what it trained, and its result."""
    model, adapter, task, splits = small_run(root / "data", method)
    data = (splits.train, splits.validation)
    result = train(model, adapter, task, *data, config, root / out, objective, progress=False)
    return digest(adapter.tensors()), result


def break_off(root: Path, out: str, config: TrainConfig, at: int, method: Any = None, objective: Any = None) -> None:
    """Begin a run and break it off at its n-th loss."""
    model, adapter, task, splits = small_run(root / "data", method)
    data = (splits.train, splits.validation)
    with pytest.raises(BrokenOffError):
        train(model, adapter, Stopping(task, at), *data, config, root / out, objective, progress=False)


def interrupted(
    root: Path, out: str, config: TrainConfig, stops: Sequence[int], method: Any = None, objective: Any = None
) -> tuple[str, TrainResult]:
    """The same run, broken off at the given losses and taken up in a model made anew."""
    for stop in stops:
        break_off(root, out, config, stop, method, objective)
        torch.randn(stop)  # the next attempt finds other random states
    return whole(root, out, config, method, objective)


class Scripted:
    """A task whose evaluations follow a script."""

    def __init__(self, task: Any, values: Sequence[float]) -> None:
        self.batch, self.loss = task.batch, task.loss
        self.values, self.seen = list(values), []

    def evaluate(self, model: nn.Module, data: Any, batch_size: int) -> Metrics:
        self.seen.append(data)
        value = self.values[len(self.seen) - 1]
        return Metrics(value, value, value, 1 - value, [], [], [], [])
