"""Branch: a module beside, after or before a host, its result added to the host's output or input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from epitaxy.core.edits.edit import Edit
from epitaxy.core.edits.tap import Memo, Tap
from epitaxy.core.errors import SiteError

if TYPE_CHECKING:
    from epitaxy.core.sites import Site


class Branch(Edit):
    """``output + scale * module(input)`` (parallel) or ``output + scale * module(output)`` (sequential).

    ``reads="input"`` sees what enters the sub-layer, even where a model enters it at another module than it leaves
    it.  ``keep=False`` drops the tensor that the branch is written to: the host's output is replaced.
    ``writes="input"`` changes what the host receives instead.  ``module`` maps ``... width_in`` to ``... width``; one
    that starts at zero gives an identity start.
    """

    def __init__(
        self,
        module: nn.Module,
        reads: Literal["input", "output"] = "output",
        writes: Literal["input", "output"] = "output",
        keep: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if reads == "output" and writes == "input":
            raise SiteError("a branch cannot write into the input what it reads from the output")
        self.module, self.reads, self.writes, self.keep, self.scale = module, reads, writes, keep, float(scale)
        self.acts_before, self.acts_after = writes == "input", writes == "output"
        self.memo: Memo | None = None
        self._members: Tensor | None = None

    def placements(self, site: Site) -> Iterator[tuple[str, Edit]]:
        if self.writes == "input" and site.entry is not None:
            yield site.entry, self
            return
        yield site.path, self
        if self.writes == "output" and self.reads == "input" and site.entry not in (None, site.path):
            assert site.entry is not None
            self.memo = Memo()
            yield site.entry, Tap(self.memo, reads="input")

    def rows(self, members: Tensor) -> None:
        self._members = members

    def before(self, host: nn.Module, x: Tensor) -> Tensor:
        return self._written_to(x, x)

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        source = x if self.reads == "input" else y
        members, self._members = self._members, None
        if self.memo is not None:
            source = self.memo.take()
            source = source if members is None else source[members]
        return self._written_to(y, source)

    def _written_to(self, target: Tensor, source: Tensor) -> Tensor:
        change: Tensor = self.module(source)
        if self.scale != 1.0:
            change = change * self.scale
        change = change.to(target.dtype)
        return target + change if self.keep else change

    def extra_repr(self) -> str:
        return f"reads={self.reads!r}, writes={self.writes!r}, keep={self.keep}, scale={self.scale:g}"
