"""Delta: a low-rank additive change to the weight of a linear map or a convolution.

``y + scale * up(down(x))``, the form of LoRA (Hu et al. 2021, 2106.09685).  For a k x k convolution ``down`` is a
k x k convolution to ``rank`` channels with the host's stride, padding and dilation, and ``up`` is 1 x 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.edits.edit import Edit, cast, refuse_quantised, wide
from epitaxy.core.errors import SiteError, UnsupportedError
from epitaxy.core.kinds import is_linear, is_transposed_linear, linear_sizes, weight_of
from epitaxy.core.route import Route

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Delta(Edit):
    """Low-rank change of one weight.

    ``down``: ``rank x in`` (for a convolution ``rank x in x k...``); ``up``: ``out x rank``.  ``up`` starts at zero,
    or with ``spread`` both factors start normal with that deviation.  A generator may instead ``bind`` tensors of the
    same shapes, or with a leading batch dimension: one change per row of the batch; gradients flow into them.
    """

    def __init__(
        self, host: nn.Module, rank: int, scale: float = 1.0, dropout: float = 0.0, spread: float | None = None
    ) -> None:
        super().__init__()
        if rank < 1:
            raise SiteError(f"rank must be at least 1, got {rank}")
        if is_linear(host):
            size_in, size_out = linear_sizes(host)
            shape: tuple[int, ...] = (size_in,)
        elif isinstance(host, Convolution):
            if host.groups != 1:
                raise SiteError(f"a low-rank change of a convolution in {host.groups} groups is not defined here")
            shape, size_out = (host.in_channels, *host.kernel_size), host.out_channels
        else:
            raise SiteError(f"a low-rank change needs a linear map or a convolution, found {type(host).__name__}")
        self.rank, self.scale, self.dropout = rank, float(scale), float(dropout)
        self.down = nn.Parameter(torch.empty(rank, *shape))
        self.up = nn.Parameter(torch.zeros(size_out, rank))
        if spread is None:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        else:
            nn.init.normal_(self.down, std=spread)
            nn.init.normal_(self.up, std=spread)
        self._bound: tuple[Tensor, Tensor] | None = None
        self._members: Tensor | None = None

    def bind(self, down: Tensor | None, up: Tensor | None = None) -> None:
        """Use these tensors instead of the parameters until ``bind(None)``."""
        self._bound = None if down is None or up is None else (down, up)

    def rows(self, members: Tensor) -> None:
        self._members = members

    def factors(self) -> tuple[Tensor, Tensor]:
        """The tensors in use, and those that a merge writes: bound ones, else the parameters."""
        return self._bound if self._bound is not None else (self.down, self.up)

    def factors_for(self, rows: int) -> tuple[Tensor, Tensor]:
        """The tensors for a call on so many rows; a leading dimension is of rows, or of equal groups of them."""
        return self.factors()

    @property
    def own(self) -> bool:
        """Whether the next call uses the parameters as they are."""
        down, up = self.factors()
        return down is self.down and up is self.up

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        down, up = self.factors_for(x.shape[0])
        members, self._members = self._members, None
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if up.dim() == 3:
            if members is not None and self._bound is not None:
                down, up = down[members], up[members]
            return add_per_row(host, x, y, down, up * self.scale)
        if isinstance(host, Convolution):
            low = host._conv_forward(x, cast(down, x), None)
            return y + _pointwise(low, up * self.scale)
        down, up = cast(down, x), cast(up, y)
        low = F.linear(x.reshape(-1, x.shape[-1]), down)  # flat: else the product taken depends on requires_grad
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), low.to(y.dtype), up.t(), alpha=self.scale)
        return flat.view(y.shape)

    def mergeable_into(self, host: nn.Module) -> None:
        refuse_quantised(host)
        if self._bound is not None and self._bound[1].dim() == 3:
            raise UnsupportedError("a change that differs from row to row of a batch cannot be merged into one weight")

    def change(self) -> Tensor:
        """The full change of the weight, ``out x in (x k...)``, in fp32 or, of fp64 factors, fp64."""
        down, up = (wide(factor) for factor in self.factors())
        change: Tensor = torch.tensordot(up, down, dims=1)
        return change * self.scale

    def merged(self, host: nn.Module) -> Mapping[str, Tensor]:
        weight = weight_of(host).detach()
        change = self.change().to(weight.device)
        if is_transposed_linear(host):
            change = change.t()
        return {"weight": wide(weight) + change}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


def _pointwise(low: Tensor, up: Tensor) -> Tensor:
    """``up`` as a 1 x 1 convolution of any dimension: b r ... -> b out ..."""
    weight = cast(up, low).reshape(*up.shape, *(1,) * (low.dim() - 2))
    return (F.conv1d, F.conv2d, F.conv3d)[low.dim() - 3](low, weight)


def add_per_row(host: nn.Module, x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Add another low-rank change to every row, or group of rows; ``down``: b r in, ``up``: b out r."""
    down, up = cast(down, x), cast(up, y)
    if isinstance(host, Convolution):
        times = x.shape[0] // down.shape[0]
        down, up = (down, up) if times == 1 else (factor.repeat_interleave(times, dim=0) for factor in (down, up))
        low = torch.stack([host._conv_forward(row, weight, None) for row, weight in zip(x, down, strict=True)])
        flat = low.flatten(2)  # b r positions
        return y + torch.bmm(up, flat.to(up.dtype)).view(y.shape)
    if x.dim() == 2 and x.shape[0] == down.shape[0]:
        low = torch.bmm(down, x.unsqueeze(2))  # b r 1
        return y + torch.bmm(up, low.to(up.dtype)).squeeze(2)
    rows = x.reshape(down.shape[0], -1, x.shape[-1])  # b t in
    low = torch.bmm(rows, down.transpose(1, 2)).to(up.dtype)  # b t r
    return torch.baddbmm(y.reshape(rows.shape[0], -1, y.shape[-1]), low, up.transpose(1, 2)).view(y.shape)


def route_deltas(group: Mapping[int, Delta], route: Route, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """All routed rows in one batched product, whatever the number of adapters; ranks are padded with zeros.

    Rows without an adapter read the last, all-zero entry of the stack.
    """
    index = route.expanded(x.shape[0], x.device)
    down, up = _stack(group, route, host)
    return add_per_row(host, x, y, down[index], up[index])


def _stack(group: Mapping[int, Delta], route: Route, host: nn.Module) -> tuple[Tensor, Tensor]:
    """The stacked factors, kept while no gradient is asked for and no factor changes."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _stacked(group, len(route.names))
    versions = tuple(_version(factor) for edit in group.values() for factor in (edit.down, edit.up))
    known = route.stacks.get(id(host))
    if known is None or known[0] != versions:
        known = route.stacks[id(host)] = (versions, _stacked(group, len(route.names)))
    return known[1]


def _version(factor: Tensor) -> tuple[int, int]:
    return id(factor), 0 if factor.is_inference() else factor._version


def _stacked(group: Mapping[int, Delta], count: int) -> tuple[Tensor, Tensor]:
    rank = max(edit.rank for edit in group.values())
    some = next(iter(group.values()))
    downs, ups = [], []
    for number in range(count + 1):
        edit = group.get(number)
        if edit is None:
            downs.append(torch.zeros_like(some.down[:1]).expand(rank, *some.down.shape[1:]))
            ups.append(torch.zeros_like(some.up[:, :1]).expand(-1, rank))
            continue
        extra = rank - edit.rank
        downs.append(torch.cat([edit.down, edit.down.new_zeros(extra, *edit.down.shape[1:])]) if extra else edit.down)
        up = edit.up * edit.scale
        ups.append(torch.cat([up, up.new_zeros(up.shape[0], extra)], dim=1) if extra else up)
    return torch.stack(downs), torch.stack(ups)
