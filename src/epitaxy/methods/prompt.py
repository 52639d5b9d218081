"""Soft prompts: learned tokens in the sequence.

Lester et al. 2021 (2104.08691) for language models; visual prompt tuning, Jia et al. 2022 (2203.12119): *shallow*
tokens enter once, *deep* ones are replaced by new tokens at every block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from epitaxy.core.edits import Edit, Tokens
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
    """``tokens`` learned vectors; ``deep`` gives every block its own; ``spread`` is their initial deviation."""

    tokens: int = 10
    deep: bool = False
    spread: float = 0.02
    at: str | tuple[str, ...] = "block"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise EpitaxyError(f"tokens must be at least 1, got {self.tokens}")

    def edits(self, site: Site) -> Iterator[Edit]:
        if site.index == 0:
            depth = site.count if self.deep else 1
            yield Tokens(self.tokens, site.require_width(), depth, self.spread)
