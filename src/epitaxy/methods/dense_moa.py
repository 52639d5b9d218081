"""Dense-MoA: a mixture of adapters in which every token asks every expert.  Cappellazzo et al. 2024 (2402.00828).

``M(u) = sum_j P_j A_j(u)`` with ``P = softmax(R u + b)`` for each token, beside a sub-layer.  Computed as one product
with the router and all ``down`` maps stacked, one weighting of the hidden units, and one product with all ``up`` maps
and their biases stacked: no expert's output is ever held by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epitaxy.core.edits import Edit
from epitaxy.core.edits.edit import cast
from epitaxy.core.registry import method
from epitaxy.core.sites import Site
from epitaxy.methods.experts import ExpertActivation, ExpertKind, Experts
from epitaxy.methods.mixture import (
    PUBLISHED_START,
    Mixture,
    as_sequence,
    branch,
    check,
    experts_of,
    require_not_causal,
    softmax,
)

NO_WEIGHT = "a mixture is not linear, no weight can hold it"


class DenseMixture(Mixture):
    """Experts weighted per token; ``router``: E in, with a bias."""

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        self.router = nn.Parameter(torch.empty(experts.count, experts.down.shape[2]))
        self.router_bias = nn.Parameter(torch.zeros(experts.count))
        nn.init.trunc_normal_(self.router, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # b ... d -> b ... d
        experts, tokens = self.experts, x.reshape(-1, x.shape[-1])
        down = torch.cat([cast(experts.down, x).flatten(0, 1), cast(self.router, x)])  # (e r + e) d
        bias = torch.cat([cast(experts.down_bias, x).flatten(), cast(self.router_bias, x)])
        low, logits = torch.addmm(bias, tokens, down.t()).tensor_split((-experts.count,), dim=1)
        shares = softmax(logits, 1)
        sequence = as_sequence(x) if experts.kind == "convpass" or self.mask is not None else tokens.unsqueeze(0)
        mask = self.valid(sequence)
        if self.tally is not None:
            self.tally.add(shares, mask)
        shares = shares.to(x.dtype)
        low = low.reshape(*sequence.shape[:2], experts.count, experts.bottleneck)
        hidden = experts.hidden(low, mask).flatten(0, 1) * shares.unsqueeze(2)
        up = torch.cat([cast(experts.up, x).flatten(0, 1), cast(experts.up_bias, x)])
        return torch.mm(torch.cat([hidden.flatten(1), shares], dim=1), up).view(*x.shape[:-1], experts.width)


@method("dense_moa", cannot={"merge": NO_WEIGHT})
@dataclass(frozen=True)
class DenseMoA:
    """``experts`` adapters of hidden width ``bottleneck`` beside a sub-layer, weighted by a router at every token.

    ``expert`` is their kind, ``activation`` by default the kind's own (gelu; convpass: quick_gelu), ``dropout`` acts
    on hidden units in training.  ``legacy`` is the published behaviour: see the page of the method.
    """

    at: str | tuple[str, ...] = "attention"
    experts: int = 7
    bottleneck: int = 6
    expert: ExpertKind = "bottleneck"
    activation: ExpertActivation | None = None
    dropout: float = 0.0
    legacy: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.legacy:
            object.__setattr__(self, "cannot", {"identity": PUBLISHED_START, "merge": NO_WEIGHT})

    def edits(self, site: Site) -> Iterator[Edit]:
        if self.expert == "convpass":
            require_not_causal(site, "the convolution of convpass experts reads the next token")
        yield branch(self, DenseMixture(experts_of(self, site)), site)
