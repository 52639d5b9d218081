"""A method that leaves something to its clock: a bottleneck of which one half is drawn in each pass or for each row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epitaxy.core.edits import Branch, Edit
from epitaxy.core.registry import method
from epitaxy.core.sites import Site
from epitaxy.methods.draws import Clock, place_of


class Drawn(nn.Module):
    """Two matrices, one of which is drawn; ``seen`` notes (step, micro-step, first pass, passes) of every call."""

    def __init__(self, width: int, clock: Clock, place: int, rows: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, width, width) * 0.3)
        self.clock, self.place, self.rows = clock, place, rows
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append((*self.clock.now.tolist(), self.clock.passes))
        chosen = self.clock.choose(2, self.place, len(x) if self.rows else None)
        each = chosen if self.rows else chosen.repeat_interleave(len(x) // self.clock.passes)
        return torch.einsum("btd,bde->bte", x, self.weight[each]).tanh() if self.training else x * 0


@method("drawn", cannot={"merge": "it is for tests", "identity": "it is for tests"})
@dataclass(frozen=True)
class DrawnMethod:
    """See the module."""

    at: str = "mlp"
    rows: bool = False
    seed: int = 5
    layers: tuple[int, ...] | None = None

    def shared(self, sites: list[Site]) -> Clock:
        return Clock(self.seed)

    def edits(self, site: Site, clock: Clock) -> Iterator[Edit]:
        yield Branch(Drawn(site.require_width(), clock, place_of(site.key), self.rows), reads="input")


def drawn_in(model: nn.Module) -> list[Drawn]:
    """The modules of the method, in the order of the network."""
    return [module for module in model.modules() if isinstance(module, Drawn)]
