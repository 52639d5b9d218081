"""Draws for methods that leave something to chance in training: functions of a counter, not of a random generator.

Every draw is a hash of (seed, step, micro-step, pass, place), and of the row where each row draws for itself.  So it is
the same on every process, it resumes without any generator's state, it disturbs no other use of random numbers, and a
block that gradient checkpointing computes a second time finds the draw it had.  Everything is integer arithmetic on
tensors: ``torch.compile`` sees one graph, and an accelerator is never waited for.  The hash is the finaliser of
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from epitaxy.core.edits.edit import Arguments, Edit
from epitaxy.core.route import Route

STEP, MICRO, PASS = 0, 1, 2


class Clock(nn.Module):
    """Tells the modules of one adapter which step of training this is.

    ``now`` holds (step, micro-step, pass).  By itself it counts the model's forward passes in training as steps;
    ``set`` takes that over until ``release``.  ``passes`` is the number of equal parts of the batch, one after the
    other, that count as passes of their own from ``pass`` on.  ``rank`` makes the draws of a process its own.
    """

    now: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.rank = seed, 0
        self.passes, self.automatic = 1, True
        self.register_buffer("now", torch.tensor([-1, 0, 0]), persistent=False)

    def set(self, step: int, micro: int = 0, number: int = 0, passes: int = 1) -> None:
        """From now on this is pass ``number`` (with ``passes``: the first of several in one batch) of that step."""
        self.automatic, self.passes = False, passes
        self.now.copy_(torch.tensor([step, micro, number]))

    def release(self) -> None:
        """Count forward passes again."""
        self.automatic, self.passes = True, 1

    def tick(self) -> None:
        """A forward pass of the model begins."""
        if self.automatic and self.training:
            self.now += self.now.new_tensor([1, 0, 0])

    def bits(self, place: int, rows: int | None = None, count: int | None = None, alike: bool = False) -> Tensor:
        """63 random bits as int64: one number for each pass, or with ``rows`` one for each row of the batch.

        Rows of several passes in one batch are numbered within their pass.  ``place`` tells draws apart that are made
        at the same time (``place_of``).  ``count`` gives so many numbers in place of each, as a last dimension; with
        ``alike`` all passes of a step draw the same.
        """
        passes = torch.arange(self.passes, device=self.now.device) + self.now[PASS]
        state = self.now.new_zeros(self.passes)
        for value in (self.seed, place, self.rank, self.now[STEP], self.now[MICRO], passes * 0 if alike else passes):
            state = _mix(state + value)
        if rows is not None:
            row = torch.arange(rows // self.passes, device=self.now.device)
            state = _mix(state.unsqueeze(1) + row).flatten()
        if count is not None:
            state = _mix(state.unsqueeze(1) + torch.arange(count, device=self.now.device))
        return state & 0x7FFF_FFFF_FFFF_FFFF

    def choose(self, count: int, place: int, rows: int | None = None) -> Tensor:
        """A number below ``count`` for each pass, or for each row."""
        return (self.bits(place, rows) >> 16) % count

    def uniform(self, place: int, rows: int | None = None, count: int | None = None, alike: bool = False) -> Tensor:
        """A float32 in [0, 1) for each pass, or for each row; ``count`` of them, and the same in all passes."""
        return (self.bits(place, rows, count, alike) >> 39).float() * 2.0**-24

    def extra_repr(self) -> str:
        return f"seed={self.seed}"


def _mix(state: Tensor) -> Tensor:
    """The finaliser of SplitMix64 after one step of its sequence; int64 wraps around as the unsigned type does."""
    state = state + _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, count: int) -> Tensor:
    """A shift to the right that brings in zeros."""
    return (state >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def place_of(*names: str) -> int:
    """A number for a place, from the site's key and what is drawn there."""
    return zlib.crc32("/".join(names).encode())


class Ticker(Edit):
    """Sits on the model itself and moves its adapter's clock at every forward pass in training."""

    rowwise = False
    inert = True
    acts_before = True
    acts_after = False

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    @classmethod
    def rewrite_input(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments
    ) -> Arguments:
        for ticker in group.values():
            assert isinstance(ticker, Ticker)
            ticker.clock.tick()
        return call


def clocks(model: nn.Module) -> list[Clock]:
    """Every clock of the adapters of ``model``."""
    return [module for module in model.modules() if isinstance(module, Clock)]


@contextmanager
def at_step(model: nn.Module, step: int, micro: int = 0, number: int = 0, passes: int = 1) -> Iterator[None]:
    """Inside the ``with`` block every clock of ``model`` stands at this step and pass; such blocks may be nested."""
    before = [(clock, clock.automatic, clock.passes, clock.now.clone()) for clock in clocks(model)]
    for clock, *_ in before:
        clock.set(step, micro, number, passes)
    try:
        yield
    finally:
        for clock, automatic, several, now in before:
            clock.automatic, clock.passes = automatic, several
            if not automatic:
                clock.now.copy_(now)
