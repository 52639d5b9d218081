"""BitFit: train the biases.  Ben Zaken et al. 2021 (2106.10199)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from epitaxy.core.edits import Edit, Swap
from epitaxy.core.registry import method
from epitaxy.core.sites import Site


@method("bitfit")
@dataclass(frozen=True)
class BitFit:
    """By default every bias of the model but the task head's; ``at`` may name fewer places.

    What trains is the difference to the base's value, or with ``legacy`` the value itself, as when a script trains the
    base's own parameters: weight decay then pulls a bias to zero, not back to the base.
    """

    at: str | tuple[str, ...] = "bias"
    legacy: bool = False
    layers: tuple[int, ...] | None = None

    def edits(self, site: Site) -> Iterator[Edit]:
        yield Swap(site.module, ("bias",), absolute=self.legacy)
