"""Bottleneck adapters: a two-layer network beside or after a sub-layer.

Houlsby et al. 2019 (1902.00751): after attention and feed-forward; Pfeiffer et al. 2020 (2005.00247): after the
feed-forward only; He et al. 2021 (2110.04366): parallel to it, with a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.edits import Branch, Edit
from epitaxy.core.errors import EpitaxyError
from epitaxy.core.registry import method
from epitaxy.core.sites import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
Activation = Literal["relu", "gelu", "silu"]


class TwoLayerMLP(nn.Module):
    """``up(activation(down(x)))``; ``up`` starts at zero."""

    def __init__(self, width_in: int, bottleneck: int, width: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.activation, self.dropout = activation, dropout
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:  # b t d -> b t d
        low = ACTIVATIONS[self.activation](F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype)))
        low = F.dropout(low, self.dropout, self.training)
        return F.linear(low, self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))


@method("bottleneck", cannot={"merge": "a bottleneck is not linear, no weight can hold it"})
@dataclass(frozen=True)
class Bottleneck:
    """``bottleneck`` is the hidden width; ``order`` puts the adapter beside a sub-layer or after it."""

    at: str | tuple[str, ...] = "mlp"
    bottleneck: int = 64
    order: Literal["parallel", "sequential"] = "parallel"
    scale: float = 1.0
    activation: Activation = "relu"
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.bottleneck < 1:
            raise EpitaxyError(f"bottleneck must be at least 1, got {self.bottleneck}")
        for value, known in ((self.order, ("parallel", "sequential")), (self.activation, tuple(ACTIVATIONS))):
            if value not in known:
                raise EpitaxyError(f"{value!r} is none of {', '.join(known)}")

    @classmethod
    def houlsby(cls, bottleneck: int = 64) -> Bottleneck:
        """Two adapters in a block: after attention and after the feed-forward."""
        return cls(at=("attention", "mlp"), bottleneck=bottleneck, order="sequential", activation="gelu")

    @classmethod
    def pfeiffer(cls, bottleneck: int = 64) -> Bottleneck:
        """One adapter in a block, after the feed-forward."""
        return cls(at="mlp", bottleneck=bottleneck, order="sequential")

    @classmethod
    def parallel(cls, bottleneck: int = 64, scale: float = 4.0) -> Bottleneck:
        """One adapter in a block, beside the feed-forward, scaled."""
        return cls(at="mlp", bottleneck=bottleneck, order="parallel", scale=scale)

    def edits(self, site: Site) -> Iterator[Edit]:
        width = site.require_width()
        width_in = (site.width_in or width) if self.order == "parallel" else width
        module = TwoLayerMLP(width_in, self.bottleneck, width, self.activation, self.dropout)
        yield Branch(module, reads="input" if self.order == "parallel" else "output", scale=self.scale)
