"""Hidden units: what a two-layer branch is made of, told by its module so that others can put it elsewhere.

A module computes ``up g(down LN(x) + down_bias) + up_bias``.  One that offers ``hidden_units()`` can be folded into the
feed-forward it stands beside (``core/fold.py``).  A module whose factors are put together from parts (a mixture) offers
the factors that it uses in evaluation: merged, of the size of the plain adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class HiddenUnits:
    """One two-layer network: ``down`` (r, in), ``down_bias`` (r,), ``up`` (out, r), ``up_bias`` (out,).

    ``activation`` is a name in ``ACTIVATIONS`` ("gelu" is the exact one); ``norm`` is the layer norm in front of
    ``down``, None without one.
    The factor of the branch is not in here: it belongs to the edit.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: str
    norm: nn.LayerNorm | None = None


@runtime_checkable
class OffersHiddenUnits(Protocol):
    """A module of a branch that can tell the network it computes in evaluation."""

    def hidden_units(self) -> HiddenUnits: ...


__all__ = ["ACTIVATIONS", "HiddenUnits", "OffersHiddenUnits"]
