"""What Dense-MoA and Soft-MoA share: their place in a block, the mask of valid tokens, the checks of their fields."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.edits import Branch
from epitaxy.core.edits.echo import EchoingBranch
from epitaxy.core.errors import EpitaxyError, UnsupportedError
from epitaxy.core.sites import Site
from epitaxy.methods.experts import ExpertActivation, ExpertKind, Experts

if TYPE_CHECKING:
    from epitaxy.methods.expert_use import Tally

PUBLISHED_START = "the published start is random in every matrix; without `legacy` the start is exact"


class Mixture(nn.Module):
    """Experts, a mask of valid tokens, and a tally of their use that is there only while asked for."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts
        self.tally: Tally | None = None
        self.mask: Tensor | None = None

    def valid(self, tokens: Tensor) -> Tensor | None:
        """The mask for ``tokens`` (b n d), or None; raises where it is of another shape."""
        if self.mask is None:
            return None
        if self.mask.shape != tokens.shape[:2]:
            raise UnsupportedError(
                f"the token mask is {tuple(self.mask.shape)}, but a mixture received {tuple(tokens.shape[:2])} tokens: "
                "a mask covers every token a layer sees, prompts included, of a batch that is not routed"
            )
        return self.mask


def as_sequence(x: Tensor) -> Tensor:
    """``b ... d`` as ``b n d``; raises where a row has no tokens."""
    if x.dim() < 3:
        raise UnsupportedError(
            f"a mixture over tokens needs input of three or more dimensions (batch, tokens, features), got {x.dim()}"
        )
    return x.flatten(1, -2)


def softmax(logits: Tensor, dim: int) -> Tensor:
    """In fp32 at least."""
    return torch.softmax(logits, dim, dtype=torch.promote_types(logits.dtype, torch.float32))


def branch(config: Any, mixture: Mixture, site: Site) -> Branch:
    """The mixture beside its sub-layer; published ones that sit at attention alone act a second time after the mlp."""
    places = (config.at,) if isinstance(config.at, str) else config.at
    if config.legacy and site.role == "attention" and "mlp" not in places:
        return EchoingBranch(mixture, again="mlp")
    return Branch(mixture, reads="input")


def experts_of(config: Any, site: Site) -> Experts:
    """The experts that a method's fields ask for at ``site``."""
    width = site.require_width()
    return Experts(
        config.experts,
        site.width_in or width,
        config.bottleneck,
        width,
        config.expert,
        config.activation,
        config.dropout,
        published=config.legacy,
        unused_conv=config.legacy,
    )


def check(config: Any) -> None:
    """Raise ``EpitaxyError`` naming the field that no mixture can have."""
    for name in ("experts", "bottleneck", "slots"):
        if getattr(config, name, 1) < 1:
            raise EpitaxyError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not 0.0 <= config.dropout < 1.0:
        raise EpitaxyError(f"dropout lies in [0, 1), got {config.dropout}")
    for value, known in ((config.expert, get_args(ExpertKind)), (config.activation, get_args(ExpertActivation))):
        if value is not None and value not in known:
            raise EpitaxyError(f"{value!r} is none of {', '.join(known)}")


def require_not_causal(site: Site, what: str) -> None:
    """Raise ``UnsupportedError`` where tokens may not see later ones."""
    if site.anatomy.causal or getattr(site.module, "is_causal", False):
        raise UnsupportedError(f"{what}, which the causal layers of {site.anatomy.family} must not")


def mixtures_of(adapter: Adapter) -> list[tuple[str, Mixture]]:
    """(key in files, module) of every mixture of ``adapter``, in network order."""
    return [
        (piece.key, inner)
        for piece in adapter.pieces
        if piece.key is not None
        for inner in piece.module.modules()
        if isinstance(inner, Mixture)
    ]


@contextmanager
def token_mask(adapter: Adapter, mask: Tensor) -> Iterator[None]:
    """Keep padding out of the mixtures of ``adapter`` inside the ``with`` block.

    ``mask`` (b n, bool) is true for real tokens, at every place that has a mixture.  The slots of Soft-MoA then read
    real tokens only, convolutions of experts see zeros in place of the others, and ``expert_use`` counts real tokens;
    what a mixture adds to the other tokens has no meaning.  Raises ``EpitaxyError`` for a mask of another type or an
    adapter without mixtures.
    """
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise EpitaxyError(f"a token mask is boolean, batch x tokens, got {mask.dtype} of shape {tuple(mask.shape)}")
    found = [module for _, module in mixtures_of(adapter)]
    if not found:
        raise EpitaxyError(f"adapter {adapter.name!r} has no mixture of adapters")
    before = [module.mask for module in found]
    try:
        for module in found:
            module.mask = mask
        yield
    finally:
        for module, old in zip(found, before, strict=True):
            module.mask = old
