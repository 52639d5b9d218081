"""Where a branch stands to its sub-layer: beside it, after it, or before it, with or without a residual connection.

With ``F`` the frozen sub-layer, ``n`` what it receives, ``A`` the branch and ``s`` its scale, the sub-layer's new
output is

- parallel: ``F(n) + s A(n)``, with a residual ``F(n) + s A(n) + n``;
- sequential: ``s A(F(n))``, which *replaces* the output, with a residual ``s A(F(n)) + F(n)``;
- before: ``F(v) + v`` with ``v = s A(n)``, with a residual ``v = s A(n) + n``.

A parallel branch may read the residual stream instead, as it is before the norm in front of the sub-layer (AdaptFormer,
Chen et al. 2022, 2205.13535): ``reads="stream"`` puts ``h`` in place of ``n`` in ``A(n)``.  A sequential one then reads
what the stream becomes: ``h + F(n)`` in place of ``F(n)`` in ``A(F(n))`` (Houlsby's adapters in pre-norm models).

The residual always adds what the branch reads to its result.  A branch that reads the output and is added to it
("parallel after") is the sequential one with a residual, so it has no name of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from epitaxy.core.edits.branch import Branch, Scale
from epitaxy.core.edits.edit import Edit
from epitaxy.core.errors import EpitaxyError, SiteError, expect_one_of
from epitaxy.core.sites import Site

Order = Literal["parallel", "sequential", "before"]
Reads = Literal["sublayer", "stream"]
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Insertion:
    """One of the patterns above; ``residual=None`` means the recommended one, with a residual iff sequential.

    ``reads="sublayer"`` sees what the sub-layer receives or gives, "stream" the residual stream that leads to it.
    """

    order: Order = "parallel"
    residual: bool | None = None
    reads: Reads = "sublayer"

    def __post_init__(self) -> None:
        expect_one_of("order", self.order, get_args(Order))
        expect_one_of("reads", self.reads, get_args(Reads))
        if self.reads == "stream" and self.order == "before":
            raise EpitaxyError("reads: 'stream' needs the order 'parallel' or 'sequential', found the order 'before'")
        if self.residual is None:
            object.__setattr__(self, "residual", self.order == "sequential")

    @property
    def departs(self) -> str | None:
        """Why even a branch that starts at zero changes the output; None where it does not."""
        if self.order == "before":
            return "the sub-layer receives the adapter's result in place of its input"
        if self.order == "parallel" and self.residual:
            return "the residual adds what the adapter reads to the sub-layer's output"
        if self.order == "sequential" and not self.residual:
            return "without a residual the adapter's result replaces the sub-layer's output"
        return None

    def width_in(self, site: Site) -> int:
        """Width of what the branch reads; raises ``SiteError`` where the pattern needs equal widths and they differ."""
        width = site.require_width()
        if self.order == "sequential" or self.reads == "stream":
            return width
        width_in = site.width_in or width
        if width_in != width and (self.residual or self.order == "before"):
            pattern = "a residual" if self.order == "parallel" else "the order 'before'"
            raise SiteError(
                f"{pattern} needs input and output of one width at {site.path!r}, found {width_in} and {width}"
            )
        return width_in

    def norm_eps(self, site: Site) -> float:
        """The eps of a layer norm in front of the branch: that of the model's own norm on the same stream, else 1e-6.

        With one eps, both normalise alike and the branch can be folded (``core/fold.py``).
        """
        return site.stream_eps if self.reads == "stream" and site.stream_eps is not None else NORM_EPS

    def branch(self, module: nn.Module, scale: Scale = 1.0, taps: Sequence[tuple[str, Edit]] = ()) -> Branch:
        """The edit that inserts ``module``."""
        residual = bool(self.residual)
        if self.order == "parallel":
            source: Literal["input", "stream"] = "stream" if self.reads == "stream" else "input"
            return Branch(module, reads=source, scale=scale, residual=residual, taps=taps)
        if self.order == "sequential":
            after: Literal["sum", "output"] = "sum" if self.reads == "stream" else "output"
            return Branch(module, reads=after, keep=residual, scale=scale, taps=taps)
        return Branch(module, reads="input", writes="both", keep=False, scale=scale, residual=residual, taps=taps)
