"""One run in the making: its model, optimiser and standing; how it steps and how it evaluates."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.errors import EpitaxyError, nearest
from epitaxy.methods.draws import at_step, clocks
from epitaxy.tasks.group import Group
from epitaxy.tasks.metrics import OTHER_NAMES
from epitaxy.tasks.objective import Objective, Turn, backward
from epitaxy.train.config import TrainConfig
from epitaxy.train.lazy_adam import LazyAdamW
from epitaxy.train.optimizers import optimizer_of
from epitaxy.train.schedule import learning_rate
from epitaxy.train.trainable import Trainable

Batch = dict[str, Tensor]
LossFunction = Callable[[nn.Module, Batch, Callable[[nn.Module, Batch], Tensor]], Tensor]


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
    skipped: int = 0
    skipped_in_a_row: int = 0


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
        objective: Objective | LossFunction | None,
    ) -> None:
        self.accelerator, self.model, self.trainable = accelerator, model, trainable
        self.task, self.config, self.steps = task, config, steps
        self.objective = objective
        for clock in clocks(model):
            clock.rank = accelerator.process_index if config.own_draws else 0
        self.optimizer = accelerator.prepare(optimizer_of(model, trainable, config))
        self.standing = Standing()
        self.best: dict[str, Tensor] = {}
        self.start = trainable.copy()
        self.window = torch.zeros((), device=accelerator.device)  # sum of the losses since the last line of the log
        self.window_steps = 0

    def step(self, batches: list[Batch]) -> Tensor:
        """One optimiser step over ``batches``; returns the norm of the gradient before clipping.

        A step whose loss or gradient is not finite changes nothing but the count of skipped steps.
        """
        rate = learning_rate(self.config, self.standing.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        kept = {key: buffer.clone() for key, buffer in self.trainable.buffers.items()}
        loss = torch.zeros_like(self.window)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                batch = {key: value.to(self.accelerator.device) for key, value in batch.items()}
                loss += self._carry_back(batch, number, len(batches))
        norm: Tensor = self.accelerator.clip_grad_norm_(
            self.trainable.parameters.values(), math.inf if self.config.clip is None else self.config.clip
        )
        fault = self._fault(loss, norm)
        if fault is None:
            self.optimizer.step()
            self.window += loss
            self.window_steps += 1
            self.standing.skipped_in_a_row = 0
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # looks for a smaller scale
        self.optimizer.zero_grad()
        self.standing.step += 1
        if fault is not None:
            for key, buffer in self.trainable.buffers.items():
                buffer.copy_(kept[key])
            if isinstance(self.optimizer.optimizer, LazyAdamW):
                self.optimizer.optimizer.forget()
            self._count_skipped(fault)
        return norm

    def _carry_back(self, batch: Batch, number: int, count: int) -> Tensor:
        """The gradient of one of ``count`` batches; returns its share of the loss."""
        turn = Turn(self.standing.step, number, partial(self.accelerator.no_sync, self.model))
        if isinstance(self.objective, Objective):
            parts = self.objective.parts(self.model, batch, self.task, turn)
            return backward(parts, lambda loss: self.accelerator.backward(loss / count)) / count
        with at_step(self.model, turn.step, turn.micro):
            loss = self._loss(batch) / count
            self.accelerator.backward(loss)
        return loss.detach()

    def _loss(self, batch: Batch) -> Tensor:
        if self.objective is not None:
            assert not isinstance(self.objective, Objective)
            return self.objective(self.model, batch, self.task.loss)
        loss: Tensor = self.task.loss(self.model, batch)
        return loss

    def _fault(self, loss: Tensor, norm: Tensor) -> str | None:
        """What is not finite in this step, if anything; the same in all processes."""
        faults = torch.stack([~torch.isfinite(loss), ~torch.isfinite(norm.to(loss.device))]).float()
        if self.accelerator.num_processes > 1:
            faults = self.accelerator.reduce(faults, "sum")
        of_loss, of_gradient = faults.tolist()
        if of_loss:
            return "the loss is not a finite number"
        return "the gradient is not finite" if of_gradient else None

    def _count_skipped(self, fault: str) -> None:
        """Count a skipped step; raises after too many in a row."""
        self.standing.skipped += 1
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() > 1 and "gradient" in fault:
            return  # fp16 starts with too large a scale and finds the right one by such steps
        self.standing.skipped_in_a_row += 1
        row = self.standing.skipped_in_a_row
        in_a_row = f", {row} steps in a row" if row > 1 else ""
        self._require_finite(row <= self.config.max_skipped, f"{fault}{in_a_row}")

    def train_record(self, norm: Tensor) -> dict[str, Any]:
        """The mean loss since the last record, over all processes; None when every step was skipped."""
        total = self.accelerator.reduce(self.window.clone(), "mean")
        loss = float(total) / self.window_steps if self.window_steps else None
        self.window.zero_()
        self.window_steps = 0
        rate = learning_rate(self.config, self.standing.step - 1, self.steps)
        return {
            "loss": loss,
            "lr": rate,
            "grad_norm": float(norm) if math.isfinite(norm) else None,
            "skipped_steps": self.standing.skipped,
        }

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
        meant = OTHER_NAMES.get(name.lower())
        hint = f"; did you mean {meant!r}?" if meant in known else nearest(name, known)
        raise EpitaxyError(f"train.metric: no metric is called {name!r}{hint}")


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether ``value`` beats ``best``: losses and perplexities fall, everything else rises."""
    falls = any(word in metric for word in ("loss", "perplexity", "error"))
    return value < best if falls else value > best
