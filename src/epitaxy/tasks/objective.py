"""What an objective is to a training loop: one or more losses for each micro-batch, each carried back in its turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Batch = dict[str, Any]


@runtime_checkable
class Scoring(Protocol):
    """What an objective on scores needs to know of a task; ``tasks.Classification`` is one.

    ``logits`` gives the scores of a batch, ``... classes``; ``criterion`` the mean loss of such scores.  A task may
    also have ``weights(batch)``: what every position counts in a mean, in the shape of the scores without classes.
    """

    def logits(self, model: nn.Module, batch: Any) -> Tensor: ...
    def criterion(self, logits: Tensor, batch: Any) -> Tensor: ...


@dataclass(frozen=True)
class Scores:
    """A ``Scoring`` made of functions, for a loop of one's own."""

    logits: Callable[[nn.Module, Any], Tensor]
    criterion: Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Turn:
    """Which micro-batch of which optimiser step this is.

    ``no_sync`` makes a context in which gradients stay with their process: for all but the last backward pass of a
    step, where gradients are averaged over processes.
    """

    step: int = 0
    micro: int = 0
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext


class Part(NamedTuple):
    """A loss whose gradient is wanted before the next one is computed; all parts add up to the objective."""

    loss: Tensor
    last: bool


@runtime_checkable
class Objective(Protocol):
    """An objective that asks for backward passes of its own.

    ``parts`` yields losses; the loop carries each one back before it asks for the next, divided by the number of
    micro-batches in the step where it accumulates several.
    """

    def parts(self, model: nn.Module, batch: Any, task: Any, turn: Turn) -> Iterator[Part]: ...


def backward(parts: Iterator[Part], carry: Callable[[Tensor], Any] = torch.Tensor.backward) -> Tensor:
    """Carry every part back with ``carry``; returns their sum, detached."""
    total: Tensor | None = None
    with closing(parts):  # type: ignore[type-var]
        for part in parts:
            carry(part.loss)
            total = part.loss.detach() if total is None else total + part.loss.detach()
    assert total is not None
    return total
