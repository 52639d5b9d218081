"""Owners from data: parts that matter equally, instead of parts that only count equally many elements.

How much a loss asks of a weight that starts at zero is its gradient, the first-order change of the loss for a unit step
(sensitivity, as SPT, He et al. 2023, 2303.08566, chooses weights by).  Elements are ranked by it and dealt to the parts
so that every part has the same total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import EpitaxyError, StateError
from epitaxy.core.registry import methods_in
from epitaxy.methods.mosa_module import SparseMLP
from epitaxy.methods.partition import balanced_owners


def wants_balance(method: Any) -> bool:
    """Whether a method, or one in a composition, has owners that come from data."""
    return any(getattr(part, "balance", None) == "saliency" for part in methods_in(method))


def saliency(
    model: nn.Module, adapter: Adapter, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """The mean absolute gradient of every element of the split ``up`` projections, by name as in the adapter's file.

    ``loss(model, batch)`` is a scalar.  The model is put into evaluation mode meanwhile; nothing is changed.  Raises
    ``EpitaxyError`` without a batch, and for a loss or gradients that are not finite.
    """
    found = dict(_split(adapter))
    weights = [module.up.weight for module in found.values()]
    totals, count = [torch.zeros_like(weight) for weight in weights], 0
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            value = loss(model, batch)
            if not bool(torch.isfinite(value)):
                raise EpitaxyError(f"saliency: the loss of batch {count} is not finite")
            for total, gradient in zip(totals, torch.autograd.grad(value, weights), strict=True):
                total += gradient.abs()
            count += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise EpitaxyError("saliency: expected at least one batch of training data, found none")
    return {f"{key}.up.weight": total / count for key, total in zip(found, totals, strict=True)}


def balance(
    model: nn.Module, adapter: Adapter, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> None:
    """Give a fresh adapter with ``balance="saliency"`` its owners; they are stored with it from then on.

    Raises ``StateError`` for an adapter that has trained already or whose owners do not come from data.
    """
    if not wants_balance(adapter.method):
        raise StateError(f"adapter {adapter.name!r} has no owners that come from data: set balance='saliency'")
    found = dict(_split(adapter))
    if any(bool(module.up.weight.any()) for module in found.values()):
        raise StateError(f"adapter {adapter.name!r} has trained already; its owners are settled")
    scores = saliency(model, adapter, batches, loss)
    for key, module in found.items():
        parts = module.up_parts
        assert parts is not None
        parts.owners.copy_(balanced_owners(scores[f"{key}.up.weight"], parts.rule.parts))


def _split(adapter: Adapter) -> Iterable[tuple[str, SparseMLP]]:
    for piece in adapter.pieces:
        if piece.key is None:
            continue
        for name, module in piece.module.named_modules():
            if isinstance(module, SparseMLP) and module.up_parts is not None and module.up_parts.axis is None:
                yield f"{piece.key}.{name}", module
