"""Swap: parameters of the base replaced by trained values, without touching the base.

What is stored and trained is the difference to the base's value, which starts at zero: a fresh swap is exactly the
base, swaps of several adapters add up, weight decay pulls to the base, and only a merge writes into the base.  With
``absolute`` it is the value itself, starting as a copy: what the base does when its own parameters train, so that
weight decay pulls to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.edits.edit import Edit, cast, refuse_quantised
from epitaxy.core.errors import SiteError
from epitaxy.core.kinds import is_norm

NORMS = (nn.LayerNorm, nn.GroupNorm)
BATCH_NORMS = nn.modules.batchnorm._NormBase  # instance norms too


class Swap(Edit):
    """Trained changes (``absolute``: values) of 1-D parameters: the bias of any module, weight and bias of a norm."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, host: nn.Module, names: Sequence[str] = ("bias",), absolute: bool = False) -> None:
        super().__init__()
        self.names, self.absolute = tuple(names), absolute
        for name in self.names:
            base = getattr(host, name, None)
            if not isinstance(base, Tensor) or base.dim() != 1:
                raise SiteError(f"{type(host).__name__} has no one-dimensional parameter {name!r} to replace")
            if name != "bias" and not is_norm(host):
                raise SiteError(f"only a norm's weight can be swapped, not that of {type(host).__name__}")
            kind = torch.float32 if base.dtype in (torch.float16, torch.bfloat16) else base.dtype
            start = base.detach().to(kind, copy=True) if absolute else torch.zeros_like(base, dtype=kind)
            self.register_parameter(name, nn.Parameter(start))
            if absolute:  # kept, as a merge of another adapter may write into the base
                self.register_buffer(f"base_{name}", start.clone(), persistent=False)

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if "weight" in self.names or (is_norm(host) and not _known(host)):
            bias = self._change("bias") if "bias" in self.names else None
            weight = self._change("weight") if "weight" in self.names else torch.zeros_like(self.bias)
            return y + _norm_change(host, x, weight, bias).to(y.dtype)
        return y + _along_channels(host, cast(self._change("bias"), y), y.dim())

    def _change(self, name: str) -> Tensor:
        """The difference to the base's value."""
        parameter: Tensor = getattr(self, name)
        return parameter - self.get_buffer(f"base_{name}") if self.absolute else parameter

    def needs_batch(self, host: nn.Module) -> bool:
        return isinstance(host, BATCH_NORMS) and (host.training or host.running_mean is None)

    def mergeable_into(self, host: nn.Module) -> None:
        if "weight" in self.names:
            refuse_quantised(host)

    def merged(self, host: nn.Module) -> Mapping[str, Tensor]:
        bases = {name: getattr(host, name).detach() for name in self.names}
        wide = {name: base.to(torch.promote_types(base.dtype, torch.float32)) for name, base in bases.items()}
        return {name: base + self._change(name).detach() for name, base in wide.items()}

    def extra_repr(self) -> str:
        return ", ".join(self.names) + (", absolute" if self.absolute else "")


def _known(host: nn.Module) -> bool:
    """Whether a function of torch computes this norm; others run their own forward with other parameters."""
    return type(host) in NORMS or isinstance(host, BATCH_NORMS)


def _with(host: nn.Module, **replaced: Tensor) -> nn.Module:
    """A module like ``host`` with other parameters and no hooks; lets a norm of unknown class compute with them."""
    twin: nn.Module = object.__new__(type(host))
    twin.__dict__.update({**host.__dict__, "_parameters": {**host._parameters, **replaced}})
    return twin


def _norm_change(host: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Norms are linear in weight and bias: the change of the output is the norm computed with the changes."""
    if not _known(host):
        return _unknown_norm_change(host, x, weight, bias)
    weight = cast(weight, x)
    bias = cast(bias, x) if bias is not None else None
    if type(host) is nn.LayerNorm:
        return F.layer_norm(x, host.normalized_shape, weight, bias, host.eps)
    if type(host) is nn.GroupNorm:
        return F.group_norm(x, host.num_groups, weight, bias, host.eps)
    assert isinstance(host, BATCH_NORMS)
    if host.training or host.running_mean is None:  # batch statistics, without counting them a second time
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, host.eps)
    return F.batch_norm(x, host.running_mean, host.running_var, weight, bias, False, 0.0, host.eps)


def _unknown_norm_change(host: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the host's own forward makes of the changes, less what it makes of zeros.

    The difference because Gemma's norm multiplies by one plus its weight: zero weight is not zero output.  In fp32,
    as a small change would be lost beside that one.
    """
    forward: Callable[..., Tensor] = type(host).forward
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    changes = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    zeros = {name: torch.zeros_like(value) for name, value in changes.items()}
    return forward(_with(host, **changes), wide) - forward(_with(host, **zeros), wide)


def _along_channels(host: nn.Module, vector: Tensor, dimensions: int) -> Tensor:
    channel_second = isinstance(host, (nn.modules.conv._ConvNd, nn.GroupNorm, BATCH_NORMS))
    return vector.view(-1, *(1,) * (dimensions - 2)) if channel_second else vector
