"""Expert use: how much each expert of a mixture is asked, measured over the forward passes of a ``with`` block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from epitaxy.core.adapter import Adapter
from epitaxy.methods.mixture import mixtures_of

DEAD = 0.1  # of the uniform weight 1 / E


class Tally:
    """Sums over tokens, so that any number of batches takes the same memory; no graph and no activation is kept."""

    def __init__(self) -> None:
        self.weight: Tensor | float = 0.0
        self.first: Tensor | float = 0.0
        self.entropy: Tensor | float = 0.0
        self.tokens: Tensor | int = 0
        self.spread: Tensor | float = 0.0
        self.rows = 0

    @torch.no_grad()
    def add(self, weight: Tensor, mask: Tensor | None = None) -> None:
        """Count ``weight`` (b n E, or tokens E; sums to one over the experts), where ``mask`` (b n) is true."""
        flat = weight.detach().float().reshape(-1, weight.shape[-1])
        valid = torch.ones_like(flat[:, 0]) if mask is None else mask.reshape(-1).to(flat.dtype)
        first = torch.nn.functional.one_hot(flat.argmax(1), flat.shape[1])
        self.weight = self.weight + (flat * valid.unsqueeze(1)).sum(0)
        self.first = self.first + (first * valid.unsqueeze(1)).sum(0)
        self.entropy = self.entropy + (torch.special.entr(flat).sum(1) * valid).sum()
        self.tokens = self.tokens + valid.sum()

    @torch.no_grad()
    def add_dispatch(self, dispatch: Tensor, slots: int, mask: Tensor | None = None) -> None:
        """Count how evenly slots read the tokens; ``dispatch``: b n (E slots), sums to one over the tokens."""
        entropy = torch.special.entr(dispatch.detach().float()).sum(1)  # b (e p)
        tokens = torch.full_like(entropy[:, :1], dispatch.shape[1]) if mask is None else mask.sum(1, keepdim=True)
        share = entropy / tokens.clamp(min=2).log()
        self.spread = self.spread + share.unflatten(1, (-1, slots)).mean(2).sum(0)
        self.rows = self.rows + dispatch.shape[0]

    def result(self) -> dict[str, Any] | None:
        """The means as plain data; None where nothing was counted."""
        if not isinstance(self.weight, Tensor) or not float(self.tokens):
            return None
        tokens = float(self.tokens)
        weight = (self.weight / tokens).tolist()
        assert isinstance(self.first, Tensor)
        found: dict[str, Any] = {
            "experts": len(weight),
            "weight": weight,
            "first": (self.first / tokens).tolist(),
            "entropy": float(self.entropy) / tokens / math.log(len(weight)) if len(weight) > 1 else 0.0,
            "dead": [number for number, share in enumerate(weight) if share < DEAD / len(weight)],
            "tokens": int(tokens),
        }
        if isinstance(self.spread, Tensor):
            found["dispatch_entropy"] = (self.spread / self.rows).tolist()
        return found


@contextmanager
def expert_use(adapter: Adapter) -> Iterator[Callable[[], dict[str, dict[str, Any]]]]:
    """Count the use of the experts of ``adapter`` in every forward pass inside the ``with`` block.

    Gives a function that returns what was counted so far as plain data, by place in network order
    (``soft_moa.attention.3``; empty for an adapter without mixtures):

    ``weight``            mean weight of each expert over the tokens; for Soft-MoA the combine weights of its slots
    ``first``             share of tokens that give it the largest weight
    ``entropy``           mean entropy of a token's weights, 0 (one expert) to 1 (all alike)
    ``dead``              experts whose weight is below a tenth of the uniform one
    ``dispatch_entropy``  Soft-MoA: entropy of what an expert's slots read, 0 (one token) to 1 (all alike)
    ``experts``, ``tokens``  how many there are, and how many tokens were counted

    Nothing is counted, kept or computed outside the block.
    """
    found = mixtures_of(adapter)
    tallies = {key: Tally() for key, _ in found}

    def counted() -> dict[str, dict[str, Any]]:
        results = {key: tally.result() for key, tally in tallies.items()}
        return {key: result for key, result in results.items() if result is not None}

    try:
        for key, module in found:
            module.tally = tallies[key]
        yield counted
    finally:
        for _, module in found:
            module.tally = None
