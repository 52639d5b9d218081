"""Branch: a module beside or after a host, its result added to the host's output (or input)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from epitaxy.core.edits.edit import Edit
from epitaxy.core.edits.tap import Memo, Tap

if TYPE_CHECKING:
    from epitaxy.core.sites import Site


class Branch(Edit):
    """``output + scale * module(input)`` (parallel) or ``output + scale * module(output)`` (sequential).

    ``reads="input"`` sees what enters the sub-layer, even where a model enters it at another module than it leaves
    it.  ``module`` maps ``... width_in`` to ``... width``; a module that starts at zero gives an identity start.
    """

    def __init__(self, module: nn.Module, reads: Literal["input", "output"] = "output", scale: float = 1.0) -> None:
        super().__init__()
        self.module, self.reads, self.scale = module, reads, float(scale)
        self.memo: Memo | None = None
        self._members: Tensor | None = None

    def placements(self, site: Site) -> Iterator[tuple[str, Edit]]:
        yield site.path, self
        if self.reads == "input" and site.entry is not None and site.entry != site.path:
            self.memo = Memo()
            yield site.entry, Tap(self.memo, reads="input")

    def rows(self, members: Tensor) -> None:
        self._members = members

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        source = x if self.reads == "input" else y
        members, self._members = self._members, None
        if self.memo is not None:
            source = self.memo.take()
            source = source if members is None else source[members]
        change: Tensor = self.module(source)
        if self.scale != 1.0:
            change = change * self.scale
        return y + change.to(y.dtype)

    def extra_repr(self) -> str:
        return f"reads={self.reads!r}, scale={self.scale:g}"
