"""Bottleneck adapters: a two-layer network beside, after or before a sub-layer.

Houlsby et al. 2019 (1902.00751): after attention and feed-forward; Pfeiffer et al. 2020 (2005.00247): after the
feed-forward only; He et al. 2021 (2110.04366): parallel to it, with a scale; Chen et al. 2022 (2205.13535): parallel to
the norm and the feed-forward of vision transformers; Cappellazzo et al. 2024 (2312.03694): on audio spectrogram
transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.edits import Edit, Insertion, Order, Reads, Scale
from epitaxy.core.edits.edit import cast, linear
from epitaxy.core.edits.insertion import NORM_EPS
from epitaxy.core.errors import EpitaxyError, expect_dropout, expect_one_of
from epitaxy.core.hidden_units import ACTIVATIONS as ACTIVATIONS
from epitaxy.core.hidden_units import HiddenUnits
from epitaxy.core.registry import declare, method
from epitaxy.core.sites import Site

Activation = Literal["relu", "gelu", "silu"]
Init = Literal["kaiming", "legacy_normal", "legacy_zeros"]
Norm = Literal["none", "layer"]


def normalised(norm: nn.LayerNorm | None, x: Tensor) -> Tensor:
    """``norm(x)`` in the type of ``x``; ``x`` itself without a norm."""
    if norm is None:
        return x
    return F.layer_norm(x, norm.normalized_shape, cast(norm.weight, x), cast(norm.bias, x), norm.eps)


class TwoLayerMLP(nn.Module):
    """``up(activation(down(x)))``; ``down`` starts Kaiming-uniform by default, ``up`` and all biases at zero.

    With ``norm="layer"`` a layer norm of its own, with ``norm_eps``, comes first under the name ``norm``.
    """

    def __init__(
        self,
        width_in: int,
        bottleneck: int,
        width: int,
        activation: Activation,
        dropout: float,
        init: Init = "kaiming",
        norm: Norm = "none",
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width_in, eps=norm_eps) if norm == "layer" else None
        self.down = nn.Linear(width_in, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.activation, self.dropout = activation, dropout
        for layer in (self.down, self.up):
            if init == "legacy_normal":
                nn.init.trunc_normal_(layer.weight, std=0.02)
            elif init == "kaiming" and layer is self.down:
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            else:
                nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:  # b t d -> b t d
        low = ACTIVATIONS[self.activation](linear(self.down, normalised(self.norm, x)))
        return linear(self.up, F.dropout(low, self.dropout, self.training))

    def hidden_units(self) -> HiddenUnits:
        """What it computes in evaluation, for ``fold``."""
        down, up = self.down, self.up
        return HiddenUnits(down.weight, down.bias, up.weight, up.bias, self.activation, self.norm)


@method("bottleneck", cannot={"merge": "a bottleneck is not linear, no weight can hold it"})
@dataclass(frozen=True)
class Bottleneck:
    """A hidden layer of ``bottleneck`` units, or of the site's width divided by ``reduction`` and rounded.

    ``order`` and ``residual`` put the adapter beside, after or before the sub-layer; a parallel one with
    ``reads="stream"`` sees the residual stream before the sub-layer's norm (``core/edits/insertion.py``).
    ``norm="layer"`` puts a layer norm of its own in front, with the eps of the model's norm on that stream, else 1e-6;
    ``scale="learned"`` trains the factor, from 1.
    ``init="kaiming"`` starts with ``up`` at zero.  The published starts: "legacy_normal", what the released code of
    2312.03694 really ran (a normal distribution of deviation 0.02, cut off, for both matrices), and "legacy_zeros",
    what it says (both zero, so that nothing but the last bias ever gets a gradient).
    """

    at: str | tuple[str, ...] = "mlp"
    bottleneck: int = 64
    reduction: float | None = None
    order: Order = "parallel"
    residual: bool | None = None
    norm: Norm = "none"
    reads: Reads = "sublayer"
    scale: Scale = 1.0
    activation: Activation = "relu"
    dropout: float = 0.0
    init: Init = "kaiming"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.bottleneck < 1:
            raise EpitaxyError(f"bottleneck must be at least 1, got {self.bottleneck}")
        expect_dropout(self.dropout)
        expect_one_of("activation", self.activation, ACTIVATIONS)
        expect_one_of("init", self.init, get_args(Init))
        expect_one_of("norm", self.norm, get_args(Norm))
        departs = "both matrices start random" if self.init == "legacy_normal" else self.insertion.departs
        if departs is not None:
            declare(self, "identity", departs)

    @property
    def insertion(self) -> Insertion:
        """How the adapter stands to its sub-layer."""
        return Insertion(self.order, self.residual, self.reads)

    @property
    def fold_obstacle(self) -> str | None:
        """Why no feed-forward of any model can take the adapter in; None where some can (``core/fold.py``)."""
        places = {self.at} if isinstance(self.at, str) else set(self.at)
        if places & {"attention", "cross_attention", "block"} or self.order != "parallel" or self.residual:
            return "only a parallel adapter at the feed-forward, without a residual, is more hidden units of it"
        if (self.norm == "layer") != (self.reads == "stream"):
            return "its input is normalised in another way than the feed-forward's"
        return None

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

    @classmethod
    def adaptformer(
        cls, bottleneck: int = 64, scale: Scale = 0.1, dropout: float = 0.1, activation: Activation = "gelu"
    ) -> Bottleneck:
        """One adapter in a block, from the residual stream before the norm to the feed-forward's output, scaled.

        It has a norm of its own.  Published with ReLU; with the activation of the model's feed-forward, the exact GELU
        of most vision transformers, it can be folded into it.
        """
        return cls(
            at="mlp",
            bottleneck=bottleneck,
            norm="layer",
            reads="stream",
            scale=scale,
            activation=activation,
            dropout=dropout,
        )

    def edits(self, site: Site) -> Iterator[Edit]:
        hidden = self.bottleneck if self.reduction is None else site.reduced(self.reduction)
        width_in, width = self.insertion.width_in(site), site.require_width()
        eps = self.insertion.norm_eps(site)
        module = TwoLayerMLP(width_in, hidden, width, self.activation, self.dropout, self.init, self.norm, eps)
        yield self.insertion.branch(module, self.scale)
