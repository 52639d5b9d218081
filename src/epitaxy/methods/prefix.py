"""Prefix tuning: learned keys and values in every attention layer.  Li & Liang 2021 (2101.00190).

``gated`` uses a softmax of its own over the prefix, times a gate that starts at zero (LLaMA-Adapter, Zhang et al.
2023, 2303.16199): a fresh adapter then changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from epitaxy.core.edits import DecoupledKV, Edit, JointKV
from epitaxy.core.edits.kv import projection_width
from epitaxy.core.edits.start import vpt_bound
from epitaxy.core.errors import EpitaxyError, SiteError
from epitaxy.core.registry import method
from epitaxy.core.sites import Site

NO_WEIGHT = "keys and values are no change of a weight"


@method(
    "prefix",
    cannot={
        "identity": "the prefix takes part in the softmax from the start; a gated prefix does not",
        "merge": NO_WEIGHT,
    },
)
@dataclass(frozen=True)
class Prefix:
    """``tokens`` keys and ``tokens`` values per layer (papers that count both say twice as many).

    ``init="normal"`` starts them with the deviation ``spread``, ``"vpt"`` uniformly, as in PETL-AST (Cappellazzo et
    al. 2024, 2312.03694).
    """

    tokens: int = 10
    gated: bool = False
    spread: float = 0.02
    init: Literal["normal", "vpt"] = "normal"
    at: str | tuple[str, ...] = "attention"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise EpitaxyError(f"tokens must be at least 1, got {self.tokens}")
        if self.init not in ("normal", "vpt"):
            raise EpitaxyError(f"init must be 'normal' or 'vpt', got {self.init!r}")
        if self.gated:
            object.__setattr__(self, "cannot", {"merge": NO_WEIGHT})  # the gate gives it an identity start

    def edits(self, site: Site) -> Iterator[Edit]:
        bound = vpt_bound(site) if self.init == "vpt" else None
        if not self.gated:
            yield JointKV.of(site, self.tokens, self.spread, bound)
            return
        if site.heads is None:
            raise SiteError(f"cannot tell the number of heads of {site.path!r}; give it in a Layout")
        width = projection_width(site, "q")
        yield DecoupledKV(site.heads, width, tokens=self.tokens, gated=True, spread=self.spread, bound=bound)
