"""Soft-MoA: a mixture of adapters whose experts read slots, soft averages of all tokens.

Cappellazzo et al. 2024 (2402.00828), after Soft MoE, Puigcerver et al. 2023 (2308.00951).  With ``Phi`` of E experts
with p slots each and logits ``Z = u Phi``: slot inputs are averages of the tokens, weighted by the softmax of ``Z``
over the tokens; expert i works on its own slots; a token receives the slot outputs weighted by the softmax of ``Z``
over all E p slots.
"""

from __future__ import annotations

import math
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
EPSILON = 1e-6  # added to norms


class SoftMixture(Mixture):
    """Experts on slots; ``phi``: d E p, and with ``normalise`` a ``scale``.

    ``published_norm``: ``phi`` is normalised over the experts, and it is normalised tokens that the slots read.
    """

    def __init__(self, experts: Experts, slots: int = 1, normalise: bool = False, published_norm: bool = False) -> None:
        super().__init__(experts)
        self.slots, self.normalise, self.published_norm = slots, normalise, published_norm
        width = experts.down.shape[2]
        self.phi = nn.Parameter(torch.empty(width, experts.count, slots))
        nn.init.normal_(self.phi, std=math.sqrt(2 / (slots * (experts.count + width))))  # Xavier's
        if normalise:
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:  # b ... d -> b ... d
        tokens = as_sequence(x)
        mask = self.valid(tokens)
        logits, tokens = self.logits(tokens)
        dispatch, combine = self.weights(logits, mask)
        if self.tally is not None:
            self.tally.add(combine.reshape(*tokens.shape[:2], -1, self.slots).sum(3), mask)
            self.tally.add_dispatch(dispatch, self.slots, mask)
        read = torch.bmm(dispatch.to(x.dtype).transpose(1, 2), tokens)  # b (e p) d
        said = self.experts(read.view(read.shape[0], -1, self.slots, read.shape[2])).flatten(1, 2)
        return torch.bmm(combine.to(x.dtype), said).view(*x.shape[:-1], self.experts.width)

    def logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``Z`` (b n (E p)), and the tokens that slots read."""
        phi = cast(self.phi, tokens)
        if not self.normalise:
            return tokens @ phi.flatten(1), tokens
        unit = tokens / (tokens.norm(dim=-1, keepdim=True) + EPSILON)
        length = phi.norm(dim=1 if self.published_norm else 0, keepdim=True) + EPSILON
        return unit @ (cast(self.scale, phi) * phi / length).flatten(1), unit if self.published_norm else tokens

    def weights(self, logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Dispatch (sums to one over the valid tokens) and combine weights (over the slots), both b n (E p)."""
        shown = logits
        if mask is not None:
            shown = logits.masked_fill(~mask.unsqueeze(2), torch.finfo(logits.dtype).min)
        return softmax(shown, 1), softmax(logits, 2)


@method("soft_moa", cannot={"merge": NO_WEIGHT})
@dataclass(frozen=True)
class SoftMoA:
    """``experts`` adapters of hidden width ``bottleneck`` beside a sub-layer, each reading ``slots`` soft averages.

    ``normalise`` takes the directions of tokens and slots only, with a learned scale.  ``expert`` is the kind of the
    adapters, ``activation`` by default the kind's own (gelu; convpass: quick_gelu), ``dropout`` acts on hidden units
    in training.  ``legacy`` is the published behaviour: see the page of the method.
    """

    at: str | tuple[str, ...] = "attention"
    experts: int = 7
    slots: int = 1
    bottleneck: int = 6
    expert: ExpertKind = "bottleneck"
    activation: ExpertActivation | None = None
    dropout: float = 0.0
    normalise: bool = False
    legacy: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.legacy:
            object.__setattr__(self, "cannot", {"identity": PUBLISHED_START, "merge": NO_WEIGHT})

    def edits(self, site: Site) -> Iterator[Edit]:
        require_not_causal(site, "the slots of Soft-MoA read all tokens, later ones too")
        mixture = SoftMixture(experts_of(self, site), self.slots, self.normalise, published_norm=self.legacy)
        yield branch(self, mixture, site)
