"""How to train, and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from epitaxy.core.errors import EpitaxyError, meant

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["no", "bf16", "fp16"]
Decay = Literal["matrices", "weights", "everything"]
Optimiser = Literal["adamw", "hf_adamw"]
Idle = Literal["lazy", "momentum"]
BaseMode = Literal["eval", "train"]
DEFAULT_EPOCHS = 10.0
FREE = ("workers", "trackers", "checkpoint_every", "max_skipped")  # may change between a run and its resumption
SEEDS = 2**63  # torch takes no larger ones


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    The length is ``steps`` of the optimiser or ``epochs`` over the training data (default: 10 epochs).  ``batch``
    counts the examples of one forward pass over all processes together, so that a recipe means the same on one device
    and on eight; ``accumulate`` forward passes make one step.  ``warmup`` is a number of steps, or below 1 a fraction
    of all.  ``clip`` bounds the norm of the gradient (None: no bound).  ``evaluate_every`` and ``checkpoint_every``
    count steps (default: once per epoch, and at every evaluation).  After ``patience`` evaluations without a better
    ``metric`` on the validation data training stops; ``keep_best`` returns to the best state in the end.  ``betas`` and
    ``epsilon`` are AdamW's; biases, norms and other vectors do not decay, unless ``decay`` is "weights" (all but
    biases) or "everything".  ``optimiser="hf_adamw"`` is the older AdamW of transformers, for published recipes:
    ``epsilon`` before bias correction, decay after the step.  Methods whose parameters are in parts (MoSA): parts that
    no process drew rest, or with ``idle="momentum"`` go on by momentum and decay; with ``own_draws`` every process of
    a distributed run draws for itself.
    ``base_mode``: a frozen base stands in evaluation mode while its adapter trains; "train" switches its dropout,
    stochastic depth and masking on, as much published code does.  A step whose loss or gradient is not finite is
    skipped and counted; after more than ``max_skipped`` of them in a row training stops with an error.
    """

    steps: int | None = None
    epochs: float | None = None
    batch: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    decay: Decay = "matrices"
    optimiser: Optimiser = "adamw"
    idle: Idle = "lazy"
    own_draws: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    warmup: int | float = 0
    schedule: Schedule = "cosine"
    clip: float | None = 1.0
    precision: Precision = "no"
    seed: int = 0
    evaluate_every: int | None = None
    evaluation_batch: int | None = None
    metric: str = "accuracy"
    patience: int | None = None
    keep_best: bool = True
    checkpoint_every: int | None = None
    log_every: int = 10
    workers: int = 0
    trackers: tuple[str, ...] = ()
    base_mode: BaseMode = "eval"
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise EpitaxyError(
                "train.steps and train.epochs both say how long to train; give one and let the other be null"
            )
        at_least_one = [
            "steps",
            "batch",
            "accumulate",
            "evaluate_every",
            "evaluation_batch",
            "patience",
            "checkpoint_every",
            "log_every",
        ]
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EpitaxyError(f"train.{name} must be at least 1, got {value}")
        for name in ("epochs", "learning_rate", "clip", "epsilon"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise EpitaxyError(f"train.{name} must be above 0 and finite, got {value}")
        for name in ("weight_decay", "warmup", "workers", "seed", "max_skipped"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise EpitaxyError(f"train.{name} must not be negative and must be finite, got {value}")
        if self.seed >= SEEDS:
            raise EpitaxyError(f"train.seed must be below 2^63, got {self.seed}")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise EpitaxyError(f"train.warmup is a whole number of steps or a fraction below 1, got {self.warmup}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise EpitaxyError(f"train.betas lie in [0, 1), got {list(self.betas)}")
        choices = {
            "schedule": get_args(Schedule),
            "precision": get_args(Precision),
            "decay": get_args(Decay),
            "optimiser": get_args(Optimiser),
            "idle": get_args(Idle),
            "base_mode": get_args(BaseMode),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise EpitaxyError(
                    f"train.{name} is one of {', '.join(known)}, got {value!r}{meant(str(value), known)}"
                )


@dataclass(frozen=True)
class TrainResult:
    """What came out of a training run.

    ``history`` holds the lines of ``metrics.jsonl``; ``best_step`` and ``best_metric`` are None without validation;
    ``resumed_at`` is the step a killed run was taken up at; ``skipped_steps`` of the ``steps`` changed nothing, because
    their loss or gradient was not finite.
    """

    steps: int
    best_step: int | None
    best_metric: float | None
    train_seconds: float
    stopped_early: bool
    history: list[dict[str, Any]]
    trained_parameters: int
    resumed_at: int | None = None
    skipped_steps: int = 0


def count_steps(config: TrainConfig, examples: int) -> int:
    """Optimiser steps of a run over ``examples`` training examples."""
    if config.steps is not None:
        return config.steps
    epochs = DEFAULT_EPOCHS if config.epochs is None else config.epochs
    return max(1, math.ceil(epochs * examples / (config.batch * config.accumulate)))


def evaluation_interval(config: TrainConfig, examples: int) -> int:
    """Steps between two evaluations."""
    return config.evaluate_every or max(1, math.ceil(examples / (config.batch * config.accumulate)))
