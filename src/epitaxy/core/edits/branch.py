"""Branch: a module beside, after or before a host, its result added to the host's output or input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from epitaxy.core.edits.edit import Edit, cast
from epitaxy.core.edits.tap import Memo, Tap
from epitaxy.core.errors import SiteError, UnsupportedError

if TYPE_CHECKING:
    from epitaxy.core.sites import Site

Scale = float | Literal["learned"]


class Branch(Edit):
    """``output + scale * module(input)`` (parallel) or ``output + scale * module(output)`` (sequential).

    ``reads="input"`` sees what enters the sub-layer, even where a model enters it at another module than it leaves
    it; "stream" the residual stream on its way there, before the norm; "sum" that stream plus the output.
    ``keep=False`` drops the tensor that the branch is written to: the host's output is replaced.  ``writes="input"``
    changes what the host receives instead; ``writes="both"`` adds the result to the host's output too.  ``residual``
    adds what the module reads to its result.  ``scale="learned"`` trains one number that starts at 1, kept as ``scale``
    of shape (1,).  ``module`` maps ``... width_in`` to ``... width``; one that starts at zero gives an identity start.
    ``taps`` are pieces without parameters on other modules, as (path, edit), that the module needs.
    """

    def __init__(
        self,
        module: nn.Module,
        reads: Literal["input", "output", "stream", "sum"] = "output",
        writes: Literal["input", "output", "both"] = "output",
        keep: bool = True,
        scale: Scale = 1.0,
        residual: bool = False,
        taps: Sequence[tuple[str, Edit]] = (),
    ) -> None:
        super().__init__()
        if reads != "input" and writes != "output":
            raise SiteError(f"a branch cannot write into the input what it reads from the {reads}")
        self.module, self.reads, self.writes, self.keep = module, reads, writes, keep
        self.scale: float | nn.Parameter = nn.Parameter(torch.ones(1)) if scale == "learned" else float(scale)
        self.residual = residual
        self.acts_before, self.acts_after = writes != "output", writes != "input"
        self.memo: Memo | None = Memo() if writes == "both" else None
        self._members: Tensor | None = None
        self._taps = tuple(taps)

    def placements(self, site: Site) -> Iterator[tuple[str, Edit]]:
        taps, self._taps = self._taps, ()
        yield from self._own_placements(site)
        yield from taps

    def _own_placements(self, site: Site) -> Iterator[tuple[str, Edit]]:
        entry = site.entry if site.entry != site.path else None
        if self.writes != "output" and entry is not None and site.path.startswith(f"{entry}."):
            raise UnsupportedError(
                f"nothing can be put before {entry!r}: what enters there is also added to its output"
            )
        if self.writes == "input":
            yield entry or site.path, self
            return
        yield site.path, self
        if self.reads in ("stream", "sum"):
            entry = site.require_stream()
            entry = entry if entry != site.path else None
        if entry is None:
            return
        if self.writes == "both":
            self.acts_before = False
            yield entry, Entry(self)
        elif self.reads != "output":
            self.memo = Memo()
            yield entry, Tap(self.memo, reads="input")

    def rows(self, members: Tensor) -> None:
        self._members = members

    def before(self, host: nn.Module, x: Tensor) -> Tensor:
        change = self._result(x).to(x.dtype)
        if self.memo is not None:
            self.memo.value = change
        return x + change if self.keep else change

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        members, self._members = self._members, None
        if self.writes == "both":
            assert self.memo is not None
            return y + self.memo.take().to(y.dtype)
        source = y if self.reads == "output" else x
        if self.memo is not None:
            if self.reads != "input" and self.memo.value is None:
                raise UnsupportedError(
                    "reads: the norm that the layout names for this sub-layer did not run before it, so the residual "
                    "stream is not known; give a layout whose `norms` say 'after', or use reads='sublayer'"
                )
            source = self.memo.take()
            source = source if members is None else source[members]
        if self.reads in ("stream", "sum") and source.shape[:-1] != y.shape[:-1]:
            raise UnsupportedError(
                f"reads: the residual stream has the shape {tuple(source.shape)}, the sub-layer gives "
                f"{tuple(y.shape)}, so that an adapter on one cannot be added to the other; use reads='sublayer'"
            )
        change = self._result(source + y if self.reads == "sum" else source).to(y.dtype)
        return y + change if self.keep else change

    def _result(self, source: Tensor) -> Tensor:
        result: Tensor = self.module(source)
        if isinstance(self.scale, nn.Parameter):
            result = result * cast(self.scale, result)
        elif self.scale != 1.0:
            result = result * self.scale
        return result + source if self.residual else result

    def extra_repr(self) -> str:
        residual = ", residual" if self.residual else ""
        scale = "learned" if isinstance(self.scale, nn.Parameter) else f"{self.scale:g}"
        return f"reads={self.reads!r}, writes={self.writes!r}, keep={self.keep}, scale={scale}{residual}"


class Entry(Edit):
    """Where a sub-layer is entered at another module than it leaves: the input half of a branch that writes both.

    ``owner`` holds the parameters and is not registered a second time.
    """

    acts_before = True
    acts_after = False
    owner: Branch

    def __init__(self, owner: Branch) -> None:
        super().__init__()
        self.__dict__["owner"] = owner

    def before(self, host: nn.Module, x: Tensor) -> Tensor:
        return self.owner.before(host, x)
