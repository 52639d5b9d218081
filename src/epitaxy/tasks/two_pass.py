"""Two passes over each batch, tied by a consistency: the objective of MoSA (2312.02923), for any method.

    L = CE(p) + add CE(q) + weight (D(p, q) + deep / blocks * sum over the lower half of mean (h_p - h_q)^2)

``p`` and ``q`` are the scores of two passes with draws of their own (dropout, and the parts that a method leaves to
its ``Clock``); ``D`` is the symmetric KL with constant targets, PACE's squared distance of the scores, or nothing.
A model in which nothing is random gives the same scores twice, so ``D`` is 0 and only time is lost.

The decoupled form is exact: since every target is a constant, ``CE(p) + weight KL(q || p) / 2`` can be carried back
alone, and then ``q`` is computed a second time, with the draws it had, for the rest.  Three forward and two backward
passes hold the activations of one pass; the joint form holds those of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from epitaxy.core.errors import EpitaxyError, UnsupportedError, meant
from epitaxy.methods.draws import at_step
from epitaxy.tasks import batch_rows, random_state
from epitaxy.tasks.consistency import Consistency, distance, hidden_distance, pull
from epitaxy.tasks.hidden import blocks_of, lower_half
from epitaxy.tasks.objective import Part, Scoring, Turn, backward

Form = Literal["decoupled", "joint"]
ONE = Turn()


@dataclass(frozen=True)
class TwoPass:
    """The objective and how it is computed.

    ``form``: "decoupled" (memory of one pass, 2.5 times the work over a frozen base), or "joint" (one pass over the
    batch twice over: twice the memory, twice the work).  ``every``: only steps whose number is a multiple of it have a
    second pass, the others are plain steps on ``CE(p)``.  ``share``: the second pass sees the first
    ``round(share * b)`` examples of a batch, at least one, and all its terms are means over these; decoupled only.
    ``deep``: 0.01 as published, where it is used.  ``warmup``: ``weight`` grows in a straight line from 0 at step 0
    to its value at this step.
    """

    consistency: Consistency = "sym_kl"
    weight: float = 1.0
    add: float = 0.0
    form: Form = "decoupled"
    every: int = 1
    share: float = 1.0
    deep: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        for name, known in (("consistency", get_args(Consistency)), ("form", get_args(Form))):
            value = getattr(self, name)
            if value not in known:
                raise EpitaxyError(
                    f"objective.{name} is one of {', '.join(known)}, got {value!r}{meant(str(value), known)}"
                )
        for name in ("weight", "add", "deep", "warmup"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise EpitaxyError(f"objective.{name} must not be negative and must be finite, got {value}")
        if self.every < 1:
            raise EpitaxyError(f"objective.every must be at least 1, got {self.every}")
        if not 0 < self.share <= 1:
            raise EpitaxyError(f"objective.share lies above 0 and is at most 1, got {self.share}")
        if self.share < 1 and self.form == "joint":
            raise EpitaxyError(
                f"objective.share {self.share} needs objective.form decoupled: the joint batch has two equal halves"
            )
        if self.consistency == "none" and not (self.add or self.deep):
            raise EpitaxyError(
                "objective.consistency none leaves a second pass without use; give objective.add or objective.deep, "
                "or leave the objective out"
            )

    def paired(self, step: int) -> bool:
        """Whether this step has a second pass."""
        return step % self.every == 0

    def weight_at(self, step: int) -> float:
        """``weight`` at this step."""
        return self.weight * (min(1.0, step / self.warmup) if self.warmup else 1.0)

    def cost(self, frozen: bool = True) -> float:
        """Work of a training step as a multiple of a plain one's, on average.

        A backward pass counts as one forward pass where the base is ``frozen``, and as two where it trains.
        """
        carrying = 1 if frozen else 2
        second = 2 + carrying if self.form == "decoupled" else 1 + carrying
        return 1 + self.share * second / (1 + carrying) / self.every

    @property
    def memory(self) -> float:
        """Activations held for the backward pass, as a multiple of a plain step's."""
        return 1.0 if self.form == "decoupled" else 2.0

    def __str__(self) -> str:
        tie = {"sym_kl": "symmetric KL", "mse": "squared distance", "none": "no consistency"}[self.consistency]
        parts = [f"two passes ({self.form}), {tie}"]
        if self.consistency != "none" and self.weight != 1:
            parts.append(f"weight {self.weight:g}")
        parts += [f"{name} {getattr(self, name):g}" for name in ("add", "deep") if getattr(self, name)]
        if self.every > 1:
            parts.append(f"every {self.every} steps")
        if self.share < 1:
            parts.append(f"on {self.share:g} of the batch")
        return ", ".join(parts)

    def backward(self, model: nn.Module, batch: Any, task: Scoring, step: int = 0, micro: int = 0) -> Tensor:
        """Compute the objective of one batch and its gradient; returns its value, detached.

        ``batch`` maps names to tensors with a row for each example.  ``step`` numbers optimiser steps and ``micro``
        the batches accumulated within one: they decide what clocks draw.  Gradients add up in ``.grad`` as usual.
        """
        return backward(self.parts(model, batch, task, Turn(step, micro)))

    def parts(self, model: nn.Module, batch: Any, task: Any, turn: Turn = ONE) -> Iterator[Part]:
        """The losses to be carried back one after the other; for loops that do more than ``backward``."""
        if not isinstance(task, Scoring):
            raise UnsupportedError(
                f"two passes compare scores: they need a task with logits(model, batch) and criterion(logits, batch), "
                f"{type(task).__name__} has not both"
            )
        if not self.paired(turn.step):
            return self._plain(model, batch, task, turn)
        return (self._decoupled if self.form == "decoupled" else self._joint)(model, batch, task, turn)

    def _plain(self, model: nn.Module, batch: Any, task: Scoring, turn: Turn) -> Iterator[Part]:
        with at_step(model, turn.step, turn.micro):
            yield Part(task.criterion(task.logits(model, batch), batch), True)

    def _joint(self, model: nn.Module, batch: Any, task: Scoring, turn: Turn) -> Iterator[Part]:
        with at_step(model, turn.step, turn.micro, passes=2):
            scores, hidden = self._pass(model, batch_rows.doubled(batch), task)
            p, q = _halves(scores)
            weight = self.weight_at(turn.step)
            loss = task.criterion(p, batch) + weight * distance(self.consistency, p, q, _weights(task, batch))
            if self.add:
                loss = loss + self.add * task.criterion(q, batch)
            if self.deep:
                lower = [_halves(layer) for layer in hidden]
                one, other = [pair[0] for pair in lower], [pair[1] for pair in lower]
                loss = loss + weight * self.deep * hidden_distance(one, other, len(blocks_of(model)))
            yield Part(loss, True)

    def _decoupled(self, model: nn.Module, batch: Any, task: Scoring, turn: Turn) -> Iterator[Part]:
        rows = batch_rows.count(batch)
        paired = max(1, round(self.share * rows))
        again = batch if paired == rows else batch_rows.first(batch, paired)
        weights, weight = _weights(task, again), self.weight_at(turn.step)
        blocks = len(blocks_of(model)) if self.deep else 1
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        with turn.no_sync(), at_step(model, turn.step, turn.micro, 0):
            scores, lower = self._pass(model, batch, task)
            drawn = random_state.capture(device)
            with at_step(model, turn.step, turn.micro, 1), torch.no_grad():
                q, others = self._pass(model, again, task)
            p = scores[:paired]
            lower = [layer[:paired] for layer in lower]
            loss = task.criterion(scores, batch) + weight * pull(self.consistency, p, q, weights)
            if self.deep:
                loss = loss + weight * self.deep * hidden_distance(lower, others, blocks)
            yield Part(loss, False)
        del loss, scores, q, others
        p, lower = p.detach(), [layer.detach() for layer in lower]
        random_state.restore(*drawn, device)
        with at_step(model, turn.step, turn.micro, 1):
            q, others = self._pass(model, again, task)
            loss = pull(self.consistency, q, p, weights)
            if self.consistency != "sym_kl":
                loss = loss - loss.detach()  # the first part has counted its value
            loss = weight * loss
            if self.add:
                loss = loss + self.add * task.criterion(q, again)
            if self.deep:
                apart = hidden_distance(others, lower, blocks)
                loss = loss + weight * self.deep * (apart - apart.detach())
            yield Part(loss, True)

    def _pass(self, model: nn.Module, batch: Any, task: Scoring) -> tuple[Tensor, list[Tensor]]:
        """Scores of a batch, and the outputs of the lower blocks where they are wanted."""
        if not self.deep:
            return task.logits(model, batch), []
        with lower_half(model) as hidden:
            scores = task.logits(model, batch)
        if len(hidden) != len(blocks_of(model)) // 2:
            raise UnsupportedError(
                f"objective.deep: {len(hidden)} of the lower {len(blocks_of(model)) // 2} blocks said what they put "
                "out; use the model itself, not a compiled one"
            )
        return scores, hidden


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    one, other = value.chunk(2)
    return one, other


def _weights(task: Any, batch: Any) -> Tensor | None:
    """What every position counts, where the task says so."""
    found = getattr(task, "weights", None)
    return None if found is None else found(batch)
