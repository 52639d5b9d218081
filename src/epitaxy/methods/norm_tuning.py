"""Norm tuning: train weight and bias of the normalisation layers.  Qi et al. 2022 (2211.08682), Basu et al. 2024."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from epitaxy.core.edits import Edit, Swap
from epitaxy.core.registry import method
from epitaxy.core.sites import Site


@method("norm_tuning")
@dataclass(frozen=True)
class NormTuning:
    """By default every norm; ``weight`` and ``bias`` choose what trains (RMS norms have a weight only)."""

    at: str | tuple[str, ...] = "norm"
    weight: bool = True
    bias: bool = True
    layers: tuple[int, ...] | None = None

    def edits(self, site: Site) -> Iterator[Edit]:
        wanted = [name for name, asked in (("weight", self.weight), ("bias", self.bias)) if asked]
        present = [name for name in wanted if getattr(site.module, name, None) is not None]
        if present:
            yield Swap(site.module, present)
