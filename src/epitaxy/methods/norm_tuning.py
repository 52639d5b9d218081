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
    """By default every norm; ``weight`` and ``bias`` choose what trains (RMS norms have a weight only).

    What trains is the difference to the base's value, or with ``legacy`` the value itself, as when a script trains the
    base's own parameters: weight decay then pulls a norm to zero, not back to the base.
    """

    at: str | tuple[str, ...] = "norm"
    weight: bool = True
    bias: bool = True
    legacy: bool = False
    layers: tuple[int, ...] | None = None

    def edits(self, site: Site) -> Iterator[Edit]:
        wanted = [name for name, asked in (("weight", self.weight), ("bias", self.bias)) if asked]
        present = [name for name in wanted if getattr(site.module, name, None) is not None]
        if present:
            yield Swap(site.module, present, absolute=self.legacy)
