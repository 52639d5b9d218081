"""Head: a task head of its own for every adapter, trained alone (linear probe) or beside another method.

``pool`` makes the head read a mean over chosen tokens of the last hidden states instead of what the base's head
reads; ``"all"`` is the linear head of PETL-AST (Cappellazzo et al. 2024, 2312.03694), published with every method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from epitaxy.core.edits import Edit
from epitaxy.core.edits.head import POOLINGS, PooledHead, Pooling, Replace
from epitaxy.core.errors import EpitaxyError, SiteError, UnsupportedError
from epitaxy.core.kinds import is_linear, linear_sizes
from epitaxy.core.layouts import LANGUAGE_HEADS
from epitaxy.core.registry import method
from epitaxy.core.sites import Site


@method("head")
@dataclass(frozen=True)
class Head:
    """``labels`` outputs; by default as many as the base's head has, starting as a copy of it.

    With ``pool`` a new linear map on the mean of ``"all"`` tokens, the class token (``"cls"``), the ``"patches"``, the
    ``"prompts"`` or ``"prompts+patches"``, after the final norm.  ``masked`` leaves out what the attention mask given
    to the model marks as padding.
    """

    labels: int | None = None
    pool: Pooling | None = None
    masked: bool = True
    at: str | tuple[str, ...] = "head"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and self.labels < 1:
            raise EpitaxyError(f"labels must be at least 1, got {self.labels}")
        if self.pool is None:
            return
        if self.pool not in POOLINGS:
            raise EpitaxyError(f"pool must be one of {', '.join(POOLINGS)}, got {self.pool!r}")
        cannot = {
            "identity": "a pooled head starts from random values",
            "merge": "the base's head does not read what a pooled head reads",
        }
        object.__setattr__(self, "cannot", cannot)

    def _require_outputs(self, site: Site) -> None:
        """Raise where the model adds something to its outputs that fits no other number of them."""
        bias = site.anatomy.fixed_outputs
        if bias is None or self.labels is None or site.path.rpartition(".")[2] not in LANGUAGE_HEADS:
            return
        outputs = linear_sizes(site.module)[1]
        if self.labels != outputs:
            raise UnsupportedError(
                f"{site.path!r} of {site.anatomy.family} keeps its {outputs} outputs, to which the model adds its "
                f"{bias}; got labels {self.labels}: leave labels out, or use a model for classification"
            )

    def edits(self, site: Site) -> Iterator[Edit]:
        if self.pool is None:
            self._require_outputs(site)
            yield Replace(site.module, self.labels)
            return
        if not is_linear(site.module):
            raise SiteError(f"a head replaces a linear map, found {type(site.module).__name__}")
        if site.hidden_width is None:
            raise SiteError(f"cannot tell the width of the last hidden states of {site.anatomy.family}")
        yield PooledHead(site.hidden_width, self.labels or linear_sizes(site.module)[1], self.pool, self.masked)
