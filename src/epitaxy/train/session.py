"""One run in the making: its model, optimiser and standing; how it steps and how it evaluates."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.errors import EpitaxyError, nearest
from epitaxy.tasks.group import Group
from epitaxy.train.config import TrainConfig
from epitaxy.train.schedule import learning_rate
from epitaxy.train.trainable import Trainable

Batch = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch, Callable[[nn.Module, Batch], Tensor]], Tensor]


@dataclass
class Standing:
    """Where a run stands, besides its tensors."""

    step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_metric: float | None = None
    stale: int = 0
    stopped_early: bool = False
    finished: bool = False


class DivergenceError(EpitaxyError):
    """Training went astray: the loss or the parameters are no finite numbers any more."""


class Session:
    """The moving parts of one call of ``train``; every process of a distributed run has its own."""

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        trainable: Trainable,
        task: Any,
        config: TrainConfig,
        steps: int,
        objective: Objective | None,
    ) -> None:
        self.accelerator, self.model, self.trainable = accelerator, model, trainable
        self.task, self.config, self.steps = task, config, steps
        self.objective = objective
        self.optimizer = accelerator.prepare(
            torch.optim.AdamW(
                trainable.groups(config.weight_decay, config.decay == "everything"),
                lr=config.learning_rate,
                betas=config.betas,
                eps=config.epsilon,
            )
        )
        self.standing = Standing()
        self.best: dict[str, Tensor] = {}
        self.start = trainable.copy()
        self.window = torch.zeros((), device=accelerator.device)  # sum of the losses since the last line of the log
        self.window_steps = 0

    def step(self, batches: list[Batch]) -> Tensor:
        """One optimiser step over ``batches``; returns the norm of the gradient before clipping."""
        rate = learning_rate(self.config, self.standing.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = torch.zeros_like(self.window)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                part = self._loss({key: value.to(self.accelerator.device) for key, value in batch.items()})
                part = part / len(batches)
                self.accelerator.backward(part)
            loss += part.detach()
        norm: Tensor = self.accelerator.clip_grad_norm_(
            self.trainable.parameters.values(), math.inf if self.config.clip is None else self.config.clip
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.standing.step += 1
        self.window += loss
        self.window_steps += 1
        return norm

    def _loss(self, batch: Batch) -> Tensor:
        if self.objective is not None:
            return self.objective(self.model, batch, self.task.loss)
        loss: Tensor = self.task.loss(self.model, batch)
        return loss

    def train_record(self, norm: Tensor) -> dict[str, Any]:
        """The mean loss since the last record, over all processes; raises when it is not a number any more."""
        total = self.accelerator.reduce(self.window.clone(), "mean")
        loss = float(total) / self.window_steps
        self.window.zero_()
        self.window_steps = 0
        self._require_finite(math.isfinite(loss), "the loss is not a finite number")
        rate = learning_rate(self.config, self.standing.step - 1, self.steps)
        return {"loss": loss, "lr": rate, "grad_norm": float(norm) if math.isfinite(norm) else None}

    def evaluate(self, data: Any) -> dict[str, Any]:
        """Evaluate on validation data; keeps the best state so far and counts towards early stopping."""
        self.require_finite_parameters()
        config, standing = self.config, self.standing
        batch_size = config.evaluation_batch or config.batch
        extra = {"group": self._group()} if self.accelerator.num_processes > 1 else {}
        scalars: dict[str, float] = self.task.evaluate(self.model, data, batch_size, **extra).scalars()
        check_metric(config.metric, tuple(scalars))
        value = scalars[config.metric]
        best = standing.best_metric
        if math.isfinite(value) and (best is None or is_better(config.metric, value, best)):
            standing.best_metric, standing.best_step, standing.stale = value, standing.step, 0
            if config.keep_best:
                self.best = self.trainable.copy()
        else:
            standing.stale += 1
            standing.stopped_early = config.patience is not None and standing.stale >= config.patience
        record: dict[str, Any] = {f"validation_{name}": number for name, number in scalars.items()}
        return {**record, "update_norms": self.trainable.update_norms(self.start)}

    def _group(self) -> Group:
        from accelerate.utils import gather_object

        return Group(self.accelerator.process_index, self.accelerator.num_processes, gather_object)

    def require_finite_parameters(self) -> None:
        """Raise when training went astray, before anything of it is kept."""
        self._require_finite(self.trainable.finite(), "the trained parameters hold NaN or infinite values")

    def _require_finite(self, holds: bool, fault: str) -> None:
        if not holds:
            raise DivergenceError(
                f"step {self.standing.step}: {fault}; lower train.learning_rate ({self.config.learning_rate}), "
                "lengthen train.warmup or lower train.clip"
            )


def check_metric(name: str, known: tuple[str, ...]) -> None:
    """Raise when no metric is called ``name``."""
    if name not in known:
        raise EpitaxyError(f"train.metric: no metric is called {name!r}{nearest(name, known)}")


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether ``value`` beats ``best``: losses and perplexities fall, everything else rises."""
    falls = any(word in metric for word in ("loss", "perplexity", "error"))
    return value < best if falls else value > best
