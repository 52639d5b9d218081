"""The two-layer network of MoSA: a bottleneck whose projections are cut into parts.

In training each split projection draws its part; in evaluation the parts are merged on the way, which costs two
element-wise operations on the weights.  Masked parts (elements, rows, columns) are computed as dense products with the
part's weight; slices are computed alone, in windows of one length whatever the draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.edits.edit import cast, linear
from epitaxy.core.hidden_units import HiddenUnits
from epitaxy.methods.bottleneck import ACTIVATIONS, TwoLayerMLP, normalised
from epitaxy.methods.cutting import Projection
from epitaxy.methods.draws import Clock
from epitaxy.methods.parts import Draw, Parts

BiasBy = Literal["shared", "parts"]


class SparseMLP(nn.Module):
    """``up(activation(down(norm(x))))`` with one or both projections in parts; parameters are those of a bottleneck.

    ``down_parts``, ``up_parts``: how they are cut, None where not at all.  With slices of hidden units (``up_parts``
    along dimension 1) rows of ``down`` go with columns of ``up``.  ``bias="parts"`` gives every part of a split
    projection a full bias of its own, N x out.  In training ``noise`` multiplies the output by ``1 + noise * normal``,
    and ``drop_path`` leaves rows without the adapter, the same rows in every pass of a step.
    """

    def __init__(
        self,
        plain: TwoLayerMLP,
        clock: Clock,
        down_parts: Parts | None,
        up_parts: Parts | None,
        bias: BiasBy = "shared",
        noise: float = 0.0,
        drop_path: float = 0.0,
        drop_place: int = 0,
    ) -> None:
        super().__init__()
        self.norm, self.down, self.up = plain.norm, plain.down, plain.up
        self.activation, self.dropout = plain.activation, plain.dropout
        self.clock, self.down_parts, self.up_parts = clock, down_parts, up_parts
        self.noise, self.drop_path, self.drop_place = noise, drop_path, drop_place
        self.own_biases = bias == "parts"
        for layer, parts in ((self.down, down_parts), (self.up, up_parts)):
            if parts is not None and self.own_biases:
                layer.bias = nn.Parameter(layer.bias.detach().expand(parts.rule.parts, -1).clone())
            if parts is not None and parts.initial is not None:
                layer.weight.data.copy_(parts.initial)

    def forward(self, x: Tensor) -> Tensor:  # b ... d -> b ... d
        y, rows = normalised(self.norm, x), x.shape[0]
        if not self.training:
            return self._merged("up", self._active(self._merged("down", y)))
        if self.up_parts is not None and self.up_parts.axis == 1:
            y = self._units(self.up_parts, y, rows)
        else:
            low = self._active(self._drawn(self.down, self.down_parts, y, rows))
            y = self._drawn(self.up, self.up_parts, low, rows)
        if self.noise:
            y = y * (1 + self.noise * torch.randn_like(y))
        if self.drop_path:
            y = y * self._kept(rows, y)
        return y

    def _active(self, low: Tensor) -> Tensor:
        return F.dropout(ACTIVATIONS[self.activation](low), self.dropout, self.training)

    def _merged(self, projection: Projection, x: Tensor) -> Tensor:
        weight, bias = self.merged(projection)
        return F.linear(x, cast(weight, x), cast(bias, x))

    def _drawn(self, layer: nn.Linear, parts: Parts | None, x: Tensor, rows: int) -> Tensor:
        """One projection with what this pass draws."""
        if parts is None:
            return linear(layer, x)
        draw = parts.draw(rows)
        bias = self._bias(layer, draw)
        if parts.axis is None:
            return grouped_linear(x, parts.weight(layer.weight, draw), bias)
        if draw.chosen is None:
            return _per_group(F.linear(x, cast(layer.weight, x)), parts.slice_gains(draw)) + cast(bias[0], x)
        index, valid = parts.window(draw)
        weight = _narrowed(_rows_of(layer.weight, index), valid, draw)  # g length r
        return _scattered(grouped_linear(x, weight), index, cast(bias, x))

    def _units(self, parts: Parts, x: Tensor, rows: int) -> Tensor:
        """The hidden units of one slice, or all of them with gains."""
        draw = parts.draw(rows)
        bias = self._bias(self.up, draw)
        if draw.chosen is None:
            low = _per_group(self._active(linear(self.down, x)), parts.slice_gains(draw))
            return F.linear(low, cast(self.up.weight, x), cast(bias[0], x))
        index, valid = parts.window(draw)
        low = grouped_linear(x, _rows_of(self.down.weight, index), _rows_of(self.down.bias, index))
        up = _narrowed(_rows_of(self.up.weight.t(), index), valid, draw)  # g length d
        return grouped_linear(self._active(low), up.transpose(1, 2), bias)

    def _bias(self, layer: nn.Linear, draw: Draw) -> Tensor:
        """The bias of each group, or one for all: (g or 1) out."""
        if self.own_biases and draw.chosen is not None:
            return layer.bias[draw.chosen]
        return layer.bias.unsqueeze(0)

    def _kept(self, rows: int, y: Tensor) -> Tensor:
        """0 or ``1 / (1 - drop_path)`` for each row, in the shape that multiplies ``y``."""
        drawn = self.clock.uniform(self.drop_place, rows, alike=True)
        kept = (drawn >= self.drop_path).to(y.dtype) / (1 - self.drop_path)
        return kept.view(-1, *(1,) * (y.dim() - 1))

    def in_parts(self) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor]]:
        """(name, parameter, owners, used) of what is cut (``partition.split_parameters``)."""
        for name, layer, parts in (("down", self.down, self.down_parts), ("up", self.up, self.up_parts)):
            if parts is None:
                continue
            if parts.axis == 1:
                owners = parts.owners
                yield (
                    "down.weight",
                    self.down.get_parameter("weight"),
                    owners.unsqueeze(1).expand_as(self.down.weight),
                    parts.used,
                )
                yield "down.bias", self.down.get_parameter("bias"), owners, parts.used
            yield f"{name}.weight", layer.get_parameter("weight"), parts.owner_map(layer.weight), parts.used
            if self.own_biases:
                number = torch.arange(parts.rule.parts, dtype=torch.uint8, device=parts.owners.device)
                yield f"{name}.bias", layer.get_parameter("bias"), number.unsqueeze(1).expand_as(layer.bias), parts.used

    def hidden_units(self) -> HiddenUnits:
        """What it computes in evaluation, for ``fold``."""
        (down, down_bias), (up, up_bias) = self.merged("down"), self.merged("up")
        return HiddenUnits(down, down_bias, up, up_bias, self.activation, self.norm)

    def merged(self, projection: Projection) -> tuple[Tensor, Tensor]:
        """Weight and bias of one projection as evaluation uses them."""
        layer, parts = (self.down, self.down_parts) if projection == "down" else (self.up, self.up_parts)
        if parts is None:
            return layer.weight, layer.bias
        return parts.merged(layer.weight), layer.bias.mean(0) if self.own_biases else layer.bias

    @torch.no_grad()
    def merged_into(self, plain: TwoLayerMLP) -> None:
        """Write what evaluation computes into a bottleneck's network of the same sizes."""
        if self.norm is not None and plain.norm is not None:
            plain.norm.load_state_dict(self.norm.state_dict())
        for layer, (weight, bias) in ((plain.down, self.merged("down")), (plain.up, self.merged("up"))):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map of its own for each group of neighbouring rows.

    ``x``: rows ... in; ``weight``: g out in, ``bias``: (g or 1) out; g is 1 or divides the number of rows.
    """
    weight = cast(weight, x)
    if weight.shape[0] == 1:
        return F.linear(x, weight[0], None if bias is None else cast(bias[0], x))
    flat, transposed = x.reshape(weight.shape[0], -1, x.shape[-1]), weight.transpose(1, 2)
    y = torch.bmm(flat, transposed) if bias is None else torch.baddbmm(cast(bias, x).unsqueeze(1), flat, transposed)
    return y.view(*x.shape[:-1], weight.shape[1])


def _rows_of(tensor: Tensor, index: Tensor) -> Tensor:
    """The rows of ``tensor`` at each group's ``index`` (g length)."""
    if index.shape[0] == 1:
        return tensor.index_select(0, index[0]).unsqueeze(0)
    return tensor[index]


def _narrowed(weight: Tensor, valid: Tensor | None, draw: Draw) -> Tensor:
    """A window's weight (g length ...) without what belongs to a neighbour, times its part's coefficient."""
    if valid is not None:
        weight = weight * valid.unsqueeze(2)
    return weight if draw.scales is None else weight * draw.scales.to(weight.dtype).view(-1, 1, 1)


def _scattered(y: Tensor, index: Tensor, bias: Tensor) -> Tensor:
    """``y`` (rows ... length) added to ``bias`` ((g or 1) out) at each group's ``index``."""
    if index.shape[0] == 1:
        return bias[0].to(y.dtype).expand(*y.shape[:-1], -1).index_add(-1, index[0], y)
    flat = y.reshape(index.shape[0], -1, y.shape[-1])
    wide = bias.to(y.dtype).unsqueeze(1).expand(*flat.shape[:2], -1)
    return wide.scatter_add(2, index.unsqueeze(1).expand_as(flat), flat).view(*y.shape[:-1], bias.shape[-1])


def _per_group(y: Tensor, gains: Tensor) -> Tensor:
    """``y`` (rows ... n) times each group's ``gains`` (g n)."""
    flat = y.reshape(gains.shape[0], -1, y.shape[-1])
    return (flat * gains.to(y.dtype).unsqueeze(1)).view(y.shape)
