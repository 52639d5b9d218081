"""The experts of a mixture of adapters: E small networks whose parameters are stacked, so that none is run alone.

Bottleneck: ``up(act(down(u)))``.  Convpass (Jie & Deng 2022, 2207.07039): ``up(act(conv(act(down(u)))))`` with a
convolution of width three along the sequence and ``act(v) = v sigmoid(1.702 v)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.edits.edit import cast
from epitaxy.methods.bottleneck import ACTIVATIONS as PLAIN

ExpertKind = Literal["bottleneck", "convpass"]
ExpertActivation = Literal["relu", "gelu", "silu", "quick_gelu"]
KERNEL = 3


def quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {**PLAIN, "quick_gelu": quick_gelu}
USUAL: Mapping[str, ExpertActivation] = {"bottleneck": "gelu", "convpass": "quick_gelu"}


class Experts(nn.Module):
    """``count`` experts from ``width_in`` over ``bottleneck`` to ``width`` features.

    ``down``: E r in; ``up``: E r out; ``conv`` of convpass experts: E r r 3; each with a bias.  ``up`` starts at zero.
    ``published`` draws the values that the published models started from: truncated normal of deviation 0.02 for
    linear maps.  ``unused_conv`` leaves the convolution out of the computation.
    """

    def __init__(
        self,
        count: int,
        width_in: int,
        bottleneck: int,
        width: int,
        kind: ExpertKind = "bottleneck",
        activation: ExpertActivation | None = None,
        dropout: float = 0.0,
        published: bool = False,
        unused_conv: bool = False,
    ) -> None:
        super().__init__()
        self.count, self.bottleneck, self.width = count, bottleneck, width
        self.kind, self.activation = kind, activation or USUAL[kind]
        self.dropout, self.unused_conv = dropout, unused_conv
        self.down = nn.Parameter(torch.empty(count, bottleneck, width_in))
        self.down_bias = nn.Parameter(torch.zeros(count, bottleneck))
        self.up = nn.Parameter(torch.zeros(count, bottleneck, width))
        self.up_bias = nn.Parameter(torch.zeros(count, width))
        if kind == "convpass":
            self.conv = nn.Parameter(torch.empty(count, bottleneck, bottleneck, KERNEL))
            self.conv_bias = nn.Parameter(torch.zeros(count, bottleneck))
        self._draw(published)

    def _draw(self, published: bool) -> None:
        if published:
            nn.init.trunc_normal_(self.down, std=0.02)
            nn.init.trunc_normal_(self.up, std=0.02)
        else:
            for expert in self.down:
                nn.init.xavier_uniform_(expert)
        if self.kind != "convpass":
            return
        if published:
            bound = 1 / math.sqrt(self.bottleneck * KERNEL)
            nn.init.uniform_(self.conv, -bound, bound)
            nn.init.uniform_(self.conv_bias, -bound, bound)
        else:
            for expert in self.conv:
                nn.init.xavier_uniform_(expert)

    def hidden(self, low: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden units from what ``down`` gave, same shape: rows, length, experts, r.

        Convolutions run along the length and see zeros where ``mask`` (rows, length) is false.
        """
        act = ACTIVATIONS[self.activation]
        low = act(low)
        if self.kind == "convpass":
            shown = low if mask is None else low * mask[..., None, None]
            low = act(low if self.unused_conv else self._convolved(shown))
        return F.dropout(low, self.dropout, self.training)

    def _convolved(self, low: Tensor) -> Tensor:
        weight, bias = cast(self.conv, low).flatten(0, 1), cast(self.conv_bias, low).flatten()
        channels = low.flatten(2).transpose(1, 2)  # b (e r) n
        out = F.conv1d(channels, weight, bias, padding=KERNEL // 2, groups=self.count)
        return out.transpose(1, 2).reshape(low.shape)

    def forward(self, x: Tensor) -> Tensor:  # b e p d -> b e p d
        """Every expert on inputs of its own."""
        rows, length = x.shape[0], x.shape[2]
        own = x.transpose(0, 1).flatten(1, 2)  # e (b p) d
        low = torch.baddbmm(cast(self.down_bias, x).unsqueeze(1), own, cast(self.down, x).transpose(1, 2))
        low = low.view(self.count, rows, length, -1).permute(1, 2, 0, 3)  # b p e r
        low = self.hidden(low).permute(2, 0, 1, 3).flatten(1, 2)  # e (b p) r
        out = torch.baddbmm(cast(self.up_bias, x).unsqueeze(1), low, cast(self.up, x))
        return out.view(self.count, rows, length, -1).transpose(0, 1)
