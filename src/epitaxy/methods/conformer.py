"""Conformer adapter: the convolution module of the Conformer as an adapter.  Cappellazzo et al. 2024 (2312.03694).

A gated pointwise map down to ``r`` channels, a depthwise convolution over the tokens, a norm, SiLU, and a pointwise map
back up.  The convolution runs along the sequence as it is: frames of speech models, flattened patches of spectrogram
models (there ``grid_conv`` keeps rows apart).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.edits import Edit, Insertion, Order
from epitaxy.core.edits.edit import cast, linear
from epitaxy.core.errors import EpitaxyError, UnsupportedError, expect_dropout, expect_one_of
from epitaxy.core.registry import declare, method
from epitaxy.core.sites import Site

Norm = Literal["layernorm", "none"]
InnerNorm = Literal["batch", "group", "layer"]


class ConvolutionBatchNorm(nn.Module):
    """Batch normalisation, over rows and tokens, of what a convolution gives.

    Statistics of the batch are used and counted while the module is in training mode and its parameters train; a
    frozen adapter keeps its own.  A block that gradient checkpointing runs again is not counted a second time.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps, self.momentum = eps, momentum

    @property
    def learning(self) -> bool:
        """Whether the next call uses the statistics of its batch."""
        return self.training and self.weight.requires_grad

    def forward(self, x: Tensor, convolution: nn.Conv1d) -> Tensor:
        """``b r t`` -> ``b r t``: the padded ``x`` convolved and normalised.

        Fixed statistics cost nothing, they are folded into the convolution.  Those of the batch cancel its bias, which
        therefore stays out: what rounding leaves of its gradient would become whole steps of Adam.
        """
        assert convolution.bias is not None
        if not self.learning:
            return F.conv1d(x, *self.folded_into(convolution), groups=convolution.groups)
        y = F.conv1d(x, convolution.weight, 0 * convolution.bias, groups=convolution.groups)
        if not _in_backward():
            self._count(y.detach(), convolution.bias.detach())
        return F.batch_norm(y, None, None, self.weight, self.bias, training=True, eps=self.eps)

    @torch.no_grad()
    def _count(self, x: Tensor, offset: Tensor) -> None:
        if x.shape[0] * x.shape[2] > 1:  # else the batch norm is about to refuse
            var, mean = torch.var_mean(x.to(self.running_var.dtype), dim=(0, 2))
            self.running_mean.lerp_(mean + offset, self.momentum)
            self.running_var.lerp_(var, self.momentum)

    def folded_into(self, convolution: nn.Conv1d) -> tuple[Tensor, Tensor]:
        """Weight and bias of a convolution that does both; exact at padded borders, as padding comes before both."""
        assert convolution.bias is not None
        factor = self.weight * torch.rsqrt(self.running_var + self.eps)
        return convolution.weight * factor[:, None, None], (convolution.bias - self.running_mean) * factor + self.bias


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation of ``b r t`` over the channels of each token."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


INNER_NORMS: dict[InnerNorm, Callable[[int], nn.Module]] = {
    "batch": ConvolutionBatchNorm,
    "group": lambda channels: nn.GroupNorm(1, channels),
    "layer": ChannelLayerNorm,
}


class ConformerConvolution(nn.Module):
    """``b t d -> b t d``; the convolution and its norm run in the adapter's own precision.

    ``norm``: whether a layer norm comes first; ``bypass_norm``: it is there but not used.  ``kernel`` is padded with
    zeros to keep the length, an even one with ``(kernel - 1) // 2`` on the left and one more on the right.
    """

    def __init__(
        self,
        width_in: int,
        bottleneck: int,
        width: int,
        kernel: int,
        norm: bool = True,
        bypass_norm: bool = False,
        inner_norm: InnerNorm = "batch",
        dropout: float = 0.0,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width_in) if norm else None
        self.bypass_norm, self.dropout = bypass_norm, dropout
        self.pointwise_in = nn.Linear(width_in, 2 * bottleneck)
        self.depthwise = nn.Conv1d(bottleneck, bottleneck, kernel, groups=bottleneck)
        self.inner_norm = INNER_NORMS[inner_norm](bottleneck)
        self.pointwise_out = nn.Linear(bottleneck, width)
        if zero_init:
            nn.init.zeros_(self.pointwise_out.weight)
            nn.init.zeros_(self.pointwise_out.bias)

    def forward(self, x: Tensor) -> Tensor:  # b t d -> b t d
        if x.dim() != 3:
            raise UnsupportedError(f"expected tokens in rows, batch x tokens x width, found shape {tuple(x.shape)}")
        y = x
        if self.norm is not None and not self.bypass_norm:
            y = F.layer_norm(y, self.norm.normalized_shape, cast(self.norm.weight, y), cast(self.norm.bias, y))
        low = F.glu(linear(self.pointwise_in, y)).transpose(1, 2)  # b r t
        low = F.silu(self._convolved(low.to(self.depthwise.weight.dtype))).to(x.dtype)
        return F.dropout(linear(self.pointwise_out, low.transpose(1, 2).contiguous()), self.dropout, self.training)

    def _convolved(self, x: Tensor) -> Tensor:
        kernel = self.depthwise.kernel_size[0]
        padded = F.pad(x, ((kernel - 1) // 2, kernel // 2))
        if isinstance(self.inner_norm, ConvolutionBatchNorm):
            return self.inner_norm(padded, self.depthwise)  # type: ignore[no-any-return]
        return self.inner_norm(self.depthwise(padded))  # type: ignore[no-any-return]

    @torch.no_grad()
    def folded(self) -> ConformerConvolution:
        """A copy for inference whose convolution holds the batch norm; raises ``UnsupportedError`` for other norms."""
        if not isinstance(self.inner_norm, ConvolutionBatchNorm):
            raise UnsupportedError(
                f"only a batch norm folds into the convolution, found {type(self.inner_norm).__name__}"
            )
        twin = copy.deepcopy(self).eval()
        weight, bias = self.inner_norm.folded_into(self.depthwise)
        twin.depthwise.weight.copy_(weight)
        assert twin.depthwise.bias is not None
        twin.depthwise.bias.copy_(bias)
        twin.inner_norm = nn.Identity()
        return twin


def _in_backward() -> bool:
    """Whether autograd is running now, so that this forward call only repeats an earlier one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@method("conformer", cannot={"merge": "a gated convolution is not linear, no weight can hold it"})
@dataclass(frozen=True)
class Conformer:
    """``bottleneck`` channels (or the site's width divided by ``reduction``), a ``kernel`` over the tokens.

    ``norm="layernorm"`` is the norm before the adapter that the paper draws, ``inner_norm`` the one after the
    convolution: "batch" (the paper), "group" (one group: channels and tokens of each row) or "layer" (channels of each
    token); the last two need no running statistics, which drift in few-shot training.  With ``zero_init`` the last
    map starts at zero, so that a fresh adapter changes nothing.  ``legacy`` is the adapter as released: the layer norm
    is there but bypassed, every map starts random.
    """

    at: str | tuple[str, ...] = "mlp"
    bottleneck: int = 8
    reduction: float | None = None
    kernel: int = 31
    order: Order = "parallel"
    residual: bool | None = None
    norm: Norm = "layernorm"
    inner_norm: InnerNorm = "batch"
    dropout: float = 0.0
    scale: float = 1.0
    zero_init: bool = True
    legacy: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("bottleneck", "kernel"):
            if getattr(self, name) < 1:
                raise EpitaxyError(f"{name} must be at least 1, got {getattr(self, name)}")
        expect_dropout(self.dropout)
        expect_one_of("norm", self.norm, get_args(Norm))
        expect_one_of("inner_norm", self.inner_norm, get_args(InnerNorm))
        random = self.legacy or not self.zero_init
        departs = "the last map starts random" if random else self.insertion.departs
        if departs is not None:
            declare(self, "identity", departs)

    @property
    def insertion(self) -> Insertion:
        """How the adapter stands to its sub-layer."""
        return Insertion(self.order, self.residual)

    def edits(self, site: Site) -> Iterator[Edit]:
        site.refuse_causal()
        hidden = self.bottleneck if self.reduction is None else site.reduced(self.reduction)
        if self.inner_norm == "layer" and hidden == 1:
            raise EpitaxyError("inner_norm: a layer norm of one channel is constant, take 'batch' or 'group'")
        module = ConformerConvolution(
            self.insertion.width_in(site),
            hidden,
            site.require_width(),
            self.kernel,
            norm=self.norm == "layernorm",
            bypass_norm=self.legacy,
            inner_norm=self.inner_norm,
            dropout=self.dropout,
            zero_init=self.zero_init and not self.legacy,
        )
        yield self.insertion.branch(module, self.scale)
