"""Head: a task head of its own for every adapter, trained alone (linear probe) or beside another method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from epitaxy.core.edits import Edit
from epitaxy.core.edits.swap import Replace
from epitaxy.core.errors import EpitaxyError
from epitaxy.core.registry import method
from epitaxy.core.sites import Site


@method("head")
@dataclass(frozen=True)
class Head:
    """``labels`` outputs; by default as many as the base's head has, starting as a copy of it."""

    labels: int | None = None
    at: str | tuple[str, ...] = "head"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and self.labels < 1:
            raise EpitaxyError(f"labels must be at least 1, got {self.labels}")

    def edits(self, site: Site) -> Iterator[Edit]:
        yield Replace(site.module, self.labels)
