"""Convpass: a convolution between the two maps of a bottleneck.  Jie & Deng 2022 (2207.07039).

In two dimensions, as in the paper, the convolution runs over the grid of patches, and every special token (class,
distillation, prompts) is convolved alone, as a picture of one pixel.  In one dimension it runs along the sequence,
as meant by the audio version of Cappellazzo et al. 2024 (2312.03694, 2402.00828).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.edits import Edit, Grid, Insertion, Order, grid_at
from epitaxy.core.edits.edit import cast, linear
from epitaxy.core.errors import EpitaxyError, UnsupportedError, expect_dropout
from epitaxy.core.registry import declare, method
from epitaxy.core.sites import Site


def quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``."""
    return x * torch.sigmoid(1.702 * x)


class ConvolutionalBypass(nn.Module):
    """``up(dropout(q(conv(q(down x)))))`` with ``q`` the quick GELU; over ``grid``, or along the sequence without one.

    ``dead`` leaves the convolution out of the computation, as the released audio code does.  ``down`` and the
    convolution start Xavier-uniform, ``up`` at zero.
    """

    def __init__(
        self,
        width_in: int,
        bottleneck: int,
        width: int,
        kernel: int = 3,
        dropout: float = 0.0,
        grid: Grid | None = None,
        dead: bool = False,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, bottleneck)
        convolution = nn.Conv1d if grid is None else nn.Conv2d
        self.convolution = convolution(bottleneck, bottleneck, kernel)
        self.up = nn.Linear(bottleneck, width)
        self.grid, self.dropout, self.dead = grid, dropout, dead
        for layer in (self.down, self.convolution):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:  # b t d -> b t d
        low = quick_gelu(linear(self.down, x))
        if not self.dead:
            low = self._convolved(low)
        return linear(self.up, F.dropout(quick_gelu(low), self.dropout, self.training))

    def _convolved(self, x: Tensor) -> Tensor:  # b t r
        weight = cast(self.convolution.weight, x)
        assert self.convolution.bias is not None
        bias = cast(self.convolution.bias, x)
        left, right = (weight.shape[-1] - 1) // 2, weight.shape[-1] // 2
        if self.grid is None:
            if x.dim() != 3:
                raise UnsupportedError(f"expected tokens in rows, batch x tokens x width, found {tuple(x.shape)}")
            return F.conv1d(F.pad(x.transpose(1, 2), (left, right)), weight, bias).transpose(1, 2).contiguous()
        special, plane = self.grid.split(x)
        plane = F.conv2d(F.pad(plane, (left, right, left, right)), weight, bias)
        return self.grid.join(F.linear(special, weight[:, :, left, left].contiguous(), bias), plane)


@method("convpass", cannot={"merge": "a bottleneck is not linear, no weight can hold it"})
@dataclass(frozen=True)
class Convpass:
    """``bottleneck`` channels (or the site's width divided by ``reduction``), a ``kernel`` in 1 or 2 ``dimensions``.

    The patch grid is read from the running model; ``grid`` (rows, columns) gives it where a model does not tell.
    ``legacy`` bypasses the convolution, as the released audio code does (its parameters are there and never train).
    """

    at: str | tuple[str, ...] = ("attention", "mlp")
    bottleneck: int = 8
    reduction: float | None = None
    kernel: int = 3
    dimensions: Literal[1, 2] = 2
    grid: tuple[int, int] | None = None
    order: Order = "parallel"
    residual: bool | None = None
    scale: float = 1.0
    dropout: float = 0.1
    legacy: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("bottleneck", "kernel"):
            if getattr(self, name) < 1:
                raise EpitaxyError(f"{name} must be at least 1, got {getattr(self, name)}")
        expect_dropout(self.dropout)
        if self.dimensions not in (1, 2):
            raise EpitaxyError(f"dimensions must be 1 or 2, got {self.dimensions}")
        Grid(self.grid)
        if self.dimensions == 1 and self.grid is not None:
            raise EpitaxyError("grid: a convolution of one dimension runs along the sequence and takes no grid")
        if self.insertion.departs is not None:
            declare(self, "identity", self.insertion.departs)

    @property
    def insertion(self) -> Insertion:
        """How the adapter stands to its sub-layer."""
        return Insertion(self.order, self.residual)

    def edits(self, site: Site) -> Iterator[Edit]:
        site.refuse_causal()
        hidden = self.bottleneck if self.reduction is None else site.reduced(self.reduction)
        width_in, width = self.insertion.width_in(site), site.require_width()
        grid, taps = (None, []) if self.dimensions == 1 else grid_at(site, self.grid)
        module = ConvolutionalBypass(width_in, hidden, width, self.kernel, self.dropout, grid, self.legacy)
        yield self.insertion.branch(module, self.scale, taps)
