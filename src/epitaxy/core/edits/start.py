"""How learned tokens, keys and values start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from epitaxy.core.errors import SiteError

if TYPE_CHECKING:
    from epitaxy.core.sites import Site


def learned_rows(*shape: int, spread: float, bound: float | None = None) -> nn.Parameter:
    """Rows that start normal with deviation ``spread``, or uniform within ``bound`` where that is given."""
    return nn.Parameter(torch.randn(shape) * spread if bound is None else torch.empty(shape).uniform_(-bound, bound))


def vpt_bound(site: Site) -> float:
    """Bound of the uniform start of visual prompt tuning: Xavier's, for a patch of three channels to ``width``."""
    if site.patch is None:
        raise SiteError(f"{site.anatomy.family} has no patch embedding, whose size init='vpt' needs; use init='normal'")
    return math.sqrt(6.0 / (3 * site.patch + site.require_width()))
