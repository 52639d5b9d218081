"""Soft prompts: learned tokens in the sequence.

Lester et al. 2021 (2104.08691) for language models; visual prompt tuning, Jia et al. 2022 (2203.12119): *shallow*
tokens enter once, *deep* ones are replaced by new tokens at every block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from epitaxy.core.edits import Edit, Tokens
from epitaxy.core.edits.start import vpt_bound
from epitaxy.core.errors import EpitaxyError
from epitaxy.core.registry import method
from epitaxy.core.sites import Site


@method(
    "prompt",
    cannot={
        "identity": "tokens take part in the softmax from the start",
        "merge": "tokens are no change of a weight",
    },
)
@dataclass(frozen=True)
class Prompt:
    """``tokens`` learned vectors; ``deep`` gives every block its own.

    ``init="normal"`` starts them with the deviation ``spread``, ``"vpt"`` uniformly, as published for vision
    transformers.  ``drop_distillation`` lets them take the place of the distillation token of AST and DeiT, as in
    PETL-AST (Cappellazzo et al. 2024, 2312.03694); the model's own pooling then reads the class token instead.
    """

    tokens: int = 10
    deep: bool = False
    spread: float = 0.02
    init: Literal["normal", "vpt"] = "normal"
    drop_distillation: bool = False
    at: str | tuple[str, ...] = "block"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise EpitaxyError(f"tokens must be at least 1, got {self.tokens}")
        if self.init not in ("normal", "vpt"):
            raise EpitaxyError(f"init must be 'normal' or 'vpt', got {self.init!r}")

    def edits(self, site: Site) -> Iterator[Edit]:
        if site.index == 0:
            depth = site.count if self.deep else 1
            bound = vpt_bound(site) if self.init == "vpt" else None
            yield Tokens(self.tokens, site.require_width(), depth, self.spread, bound, self.drop_distillation)
