"""Grid convolution: a bottleneck with convolutions along time and frequency.  After LoAA 2024 (2412.05951).

LoAA adapts picture transformers to sound with one-dimensional convolutions along the axes of the patch grid.  Unlike a
convolution over the flattened sequence it neither runs from the end of one row into the next nor mixes special tokens
with patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.edits import Edit, Grid, Insertion, Order, grid_at
from epitaxy.core.edits.edit import cast, linear
from epitaxy.core.errors import EpitaxyError, UnsupportedError, expect_dropout, expect_one_of
from epitaxy.core.registry import declare, method
from epitaxy.core.sites import Site

Axis = Literal["time", "frequency", "both"]


class GridConvolution(nn.Module):
    """``up(h + sum of convolutions of h)`` with ``h = gelu(down(x))``.

    Every special token is convolved alone, as a grid of one patch.
    The convolutions are depthwise, one for each axis, padded with zeros to keep the grid (an even kernel with
    ``(kernel - 1) // 2`` on the left and one more on the right).  ``up`` starts at zero.
    """

    def __init__(
        self, width_in: int, bottleneck: int, width: int, kernel: int, axis: Axis, dropout: float, grid: Grid
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, bottleneck)
        self.time = nn.Conv1d(bottleneck, bottleneck, kernel, groups=bottleneck) if axis != "frequency" else None
        self.frequency = nn.Conv1d(bottleneck, bottleneck, kernel, groups=bottleneck) if axis != "time" else None
        self.up = nn.Linear(bottleneck, width)
        self.grid, self.dropout = grid, dropout
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:  # b t d -> b t d
        special, plane = self.grid.split(F.gelu(linear(self.down, x)))
        mixed, alone = plane, special
        if self.time is not None:
            mixed, alone = mixed + _along(self.time, plane), alone + _alone(self.time, special)
        if self.frequency is not None:
            mixed = mixed + _along(self.frequency, plane.transpose(2, 3)).transpose(2, 3)
            alone = alone + _alone(self.frequency, special)
        low = F.dropout(self.grid.join(alone, mixed), self.dropout, self.training)
        return linear(self.up, low)


def _along(convolution: nn.Conv1d, plane: Tensor) -> Tensor:
    """Convolve the last axis of ``b r rows columns``."""
    assert convolution.bias is not None
    kernel = convolution.kernel_size[0]
    padded = F.pad(plane, ((kernel - 1) // 2, kernel // 2))
    weight, bias = cast(convolution.weight, plane), cast(convolution.bias, plane)
    return F.conv2d(padded, weight.unsqueeze(2), bias, groups=convolution.groups)


def _alone(convolution: nn.Conv1d, special: Tensor) -> Tensor:
    """Convolve every token of ``b s r`` as if zeros stood around it."""
    assert convolution.bias is not None
    middle = convolution.weight[:, 0, (convolution.kernel_size[0] - 1) // 2]
    return special * cast(middle, special) + cast(convolution.bias, special)


@method("grid_conv", cannot={"merge": "a bottleneck is not linear, no weight can hold it"})
@dataclass(frozen=True)
class GridConv:
    """``bottleneck`` channels (or the site's width divided by ``reduction``), a ``kernel`` along each chosen ``axis``.

    ``axis``: "time" runs along the rows of the grid (columns of a picture), "frequency" across them, "both" along
    every axis the grid has.  The grid is read from the running model; ``grid`` (rows, columns) gives it where a model
    does not tell.
    """

    at: str | tuple[str, ...] = "mlp"
    bottleneck: int = 16
    reduction: float | None = None
    kernel: int = 7
    axis: Axis = "both"
    grid: tuple[int, int] | None = None
    order: Order = "parallel"
    residual: bool | None = None
    scale: float = 1.0
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("bottleneck", "kernel"):
            if getattr(self, name) < 1:
                raise EpitaxyError(f"{name} must be at least 1, got {getattr(self, name)}")
        expect_dropout(self.dropout)
        expect_one_of("axis", self.axis, get_args(Axis))
        Grid(self.grid)
        if self.insertion.departs is not None:
            declare(self, "identity", self.insertion.departs)

    @property
    def insertion(self) -> Insertion:
        """How the adapter stands to its sub-layer."""
        return Insertion(self.order, self.residual)

    def edits(self, site: Site) -> Iterator[Edit]:
        site.refuse_causal()
        grid, taps = grid_at(site, self.grid)
        axis = self.axis
        if grid.dimensions == 1 and axis != "time":
            if axis == "frequency":
                raise UnsupportedError(f"the tokens of {site.anatomy.family} have no frequency axis, only time")
            axis = "time"
        hidden = self.bottleneck if self.reduction is None else site.reduced(self.reduction)
        width_in, width = self.insertion.width_in(site), site.require_width()
        module = GridConvolution(width_in, hidden, width, self.kernel, axis, self.dropout, grid)
        yield self.insertion.branch(module, self.scale, taps)
