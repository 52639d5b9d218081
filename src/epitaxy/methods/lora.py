"""LoRA: a low-rank change of frozen weights.  Hu et al. 2021 (2106.09685); rank-stabilised scale: Kalajdzievski 2023.

``W + (alpha / rank) B A`` with ``A`` random and ``B`` zero; rsLoRA (2312.03732) divides by ``sqrt(rank)`` instead.
Works on linear maps (GPT-2's transposed ones too) and on convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from epitaxy.core.edits import Delta, Edit
from epitaxy.core.errors import EpitaxyError, expect_dropout
from epitaxy.core.registry import method
from epitaxy.core.sites import Site


@method("lora")
@dataclass(frozen=True)
class LoRA:
    """``rank`` of the change, ``alpha`` (default: the rank, a scale of one), ``dropout`` on what the change reads.

    ``legacy`` starts both factors from a normal distribution of deviation 0.02, which is what the released code of
    PETL-AST (Cappellazzo et al. 2024, 2312.03694) ran with; a fresh adapter then changes the output.
    """

    at: str | tuple[str, ...] = ("attention.q", "attention.v")
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilised: bool = False
    legacy: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise EpitaxyError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise EpitaxyError(f"alpha must be a finite number, got {self.alpha}")
        expect_dropout(self.dropout)
        if self.legacy:
            object.__setattr__(self, "cannot", {"identity": "with the legacy start neither factor is zero"})

    @property
    def scale(self) -> float:
        """Factor of ``B A``."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def edits(self, site: Site) -> Iterator[Edit]:
        yield Delta(site.module, self.rank, self.scale, self.dropout, 0.02 if self.legacy else None)
