"""One tensor in N parts: which are active in a pass of training, and what all of them merge to.

The single-tensor form of MoSA (2312.02923): with the tensor ``W``, its start ``W0`` and owners ``o``, part ``i`` is
``W0 + [o == i] (W - W0)``, exactly what the i-th of N masked copies would hold, and the mean of the copies is
``W0 + (W - W0) / N``.  Several parts at once, each kept with probability ``p`` and divided by it, and a learned
coefficient for each part are the mixture of low-rank experts of MLAE (2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.methods.draws import Clock
from epitaxy.methods.partition import bounds, slice_owners

DrawBy = Literal["batch", "row"]
Active = Literal["one", "bernoulli"]
MergeBy = Literal["mean", "union"]


@dataclass(frozen=True)
class Rule:
    """How parts take part: the number of them, for what a draw is made, how many are active, how they merge."""

    parts: int
    draw: DrawBy = "batch"
    active: Active = "one"
    keep: float = 0.5
    coefficients: bool = False
    merge: MergeBy = "mean"

    @property
    def plain(self) -> bool:
        """Whether a single part makes no difference to an undivided tensor."""
        return self.parts == 1 and self.active == "one" and not self.coefficients


@dataclass(frozen=True)
class Draw:
    """For each group of rows (all of them, a pass, or a row): its part (g), or else a gain for every part (g N).

    ``scales`` (g) are the coefficients of the chosen parts, where there are any.
    """

    chosen: Tensor | None = None
    gains: Tensor | None = None
    scales: Tensor | None = None


class Parts(nn.Module):
    """The parts of one tensor.

    ``owners`` (uint8) has the tensor's shape, or with ``axis`` the length of that dimension, cut into contiguous
    slices.  ``initial`` is the start of a tensor that does not start at zero.  ``used`` (N, bool) says which parts
    were active in a pass with gradients since somebody cleared it.  All of these are rebuilt from the method's fields
    and not stored, but for owners that came from data (``stored``).
    """

    owners: Tensor
    used: Tensor
    begin: Tensor
    valid: Tensor | None
    initial: Tensor | None

    def __init__(
        self,
        rule: Rule,
        clock: Clock,
        place: int,
        owners: Tensor,
        initial: Tensor | None = None,
        axis: int | None = None,
        stored: bool = False,
    ) -> None:
        super().__init__()
        self.rule, self.clock, self.place, self.axis = rule, clock, place, axis
        self.register_buffer("owners", owners, persistent=stored)
        self.register_buffer("used", torch.zeros(rule.parts, dtype=torch.bool), persistent=False)
        self.register_buffer("initial", initial, persistent=False)
        self.coefficients = nn.Parameter(torch.ones(rule.parts)) if rule.coefficients else None
        if axis is not None:
            self._lay_windows(len(owners))

    @classmethod
    def slices(cls, rule: Rule, clock: Clock, place: int, size: int, axis: int) -> Parts:
        """Contiguous slices of dimension ``axis``, which has ``size`` entries."""
        return cls(rule, clock, place, slice_owners(size, rule.parts), axis=axis)

    def _lay_windows(self, size: int) -> None:
        """Windows of one length over slices that may differ by one: a table, so that no draw needs a graph of its own.

        ``begin`` (N) is where a part's window starts, ``valid`` (N length) marks what of it belongs to the part.
        """
        edges = torch.tensor(bounds(size, self.rule.parts))
        self.length = int(edges.diff().max())
        begin = edges[:-1].clamp(max=size - self.length)
        index = begin.unsqueeze(1) + torch.arange(self.length)
        valid = (index >= edges[:-1, None]) & (index < edges[1:, None])
        self.register_buffer("begin", begin, persistent=False)
        self.register_buffer("valid", None if bool(valid.all()) else valid, persistent=False)

    def draw(self, rows: int) -> Draw:
        """What is active in this pass of ``rows`` rows: those the module sees, in a routed batch the adapter's own.

        Raises ``EpitaxyError`` where they are no whole number of passes.
        """
        rule, passes = self.rule, self.clock.passes
        if rows % passes:
            raise EpitaxyError(f"a batch of {rows} rows cannot hold {passes} passes of one size")
        numbered = rows if rule.draw == "row" else None
        if rule.active == "one":
            drawn = self.clock.choose(rule.parts, self.place, numbered)
        else:
            drawn = self.clock.uniform(self.place, numbered, count=rule.parts) < rule.keep
        if rule.active == "one":
            if torch.is_grad_enabled():
                self.used[drawn] = True
            return Draw(chosen=drawn, scales=None if self.coefficients is None else self.coefficients[drawn])
        if torch.is_grad_enabled():
            self.used |= drawn.any(0)
        gains = drawn / rule.keep
        return Draw(gains=gains if self.coefficients is None else gains * self.coefficients)

    def weight(self, tensor: Tensor, draw: Draw) -> Tensor:
        """The tensor as each group sees it: g, then its shape.  Elements of idle parts get a gradient of exactly 0."""
        owners, trail = self.owner_map(tensor), (1,) * tensor.dim()
        if draw.chosen is not None:
            mask = owners == draw.chosen.view(-1, *trail)
            scales = None if draw.scales is None else draw.scales.to(tensor.dtype).view(-1, *trail)
            if self.initial is None:
                return torch.where(mask, tensor if scales is None else tensor * scales, 0)
            if scales is None:
                return torch.where(mask, tensor, self.initial)
            return torch.where(mask, self.initial + scales * (tensor - self.initial), self.initial)
        assert draw.gains is not None
        gains = draw.gains.to(tensor.dtype).index_select(1, owners.flatten().int()).view(-1, *tensor.shape)
        return self._grown(tensor, gains)

    def slice_gains(self, draw: Draw) -> Tensor:
        """Of slices, the gain of every entry of the divided dimension: g, then these."""
        assert draw.gains is not None
        return draw.gains.index_select(1, self.owners.int())

    def _grown(self, tensor: Tensor, gains: Tensor) -> Tensor:
        return tensor * gains if self.initial is None else self.initial + gains * (tensor - self.initial)

    def merged(self, tensor: Tensor) -> Tensor:
        """The one tensor that takes the place of all parts: their mean, or what each is weighted with."""
        rule = self.rule
        share = 1 / rule.parts if rule.active == "one" and rule.merge == "mean" else 1.0
        if self.coefficients is not None:
            weights = (self.coefficients * share).to(tensor.dtype)
            return self._grown(tensor, weights[self.owner_map(tensor).long()])
        if share == 1.0:
            return tensor
        if self.initial is None:
            return tensor / rule.parts
        return self.initial + (tensor - self.initial) / rule.parts

    def owner_map(self, tensor: Tensor) -> Tensor:
        """Owners in the shape of ``tensor``."""
        if self.axis is None:
            return self.owners
        shape = [1] * tensor.dim()
        shape[self.axis] = -1
        return self.owners.view(shape).expand(tensor.shape)

    def check_filled(self, source: str) -> None:
        """Raise ``FormatError`` where owners that were read from ``source`` name parts that there are not."""
        largest = int(self.owners.max())
        if largest >= self.rule.parts:
            raise FormatError(f"{source}: its owners name part {largest}, expected below {self.rule.parts}")

    def window(self, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """Of slices: the entries of each group's part (g length), and which of them count (None: all)."""
        assert draw.chosen is not None
        index = self.begin[draw.chosen].unsqueeze(1) + torch.arange(self.length, device=self.begin.device)
        return index, None if self.valid is None else self.valid[draw.chosen]

    def in_parts(self) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor]]:
        """Of its own parameters: each coefficient belongs to its part (``partition.split_parameters``)."""
        if self.coefficients is not None:
            number = torch.arange(self.rule.parts, dtype=torch.uint8, device=self.used.device)
            yield "coefficients", self.coefficients, number, self.used

    def extra_repr(self) -> str:
        return f"{self.rule.parts} parts, {self.rule.active} active by {self.rule.draw}"
