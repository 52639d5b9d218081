"""Turn a trained adapter in parts into the plain adapter it computes in evaluation.  MoSA (2312.02923), "merge"."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.edits import Branch, Delta
from epitaxy.core.errors import StateError, UnsupportedError
from epitaxy.core.host import attach, detach, rename, require_one, unwrap
from epitaxy.core.registry import Composition, methods_in
from epitaxy.methods.bottleneck import TwoLayerMLP
from epitaxy.methods.cutting import Cutting
from epitaxy.methods.mosa_lora import SplitDelta
from epitaxy.methods.mosa_module import SparseMLP


def has_parts(method: object) -> bool:
    """Whether a method, or one in a composition, cuts its projections into parts."""
    return any(isinstance(getattr(part, "cutting", None), Cutting) for part in methods_in(method))


def merge_parts(model: nn.Module, name: str | None = None) -> Adapter:
    """Replace an adapter (default: the only one) by a plain one with the outputs that it has in evaluation.

    MoSA becomes a bottleneck adapter, MoSA on LoRA a LoRA, of the same sizes; other methods of a composition stay as
    they are.  The name, what is active and trainable, and the provenance are kept.  Raises ``UnsupportedError`` for an
    adapter without parts, ``StateError`` for one that does not exist or is merged; the model is then unchanged.
    """
    model = unwrap(model)
    record, name = require_one(model, name, "merge")
    adapter, active = record.adapters[name], record.state.active
    if not has_parts(adapter.method):
        kinds = " + ".join(part.method_name for part in methods_in(adapter.method))
        raise UnsupportedError(f"adapter {name!r} has no parts to merge: expected mosa or mosa_lora, found {kinds}")
    if name in record.state.merged:
        raise StateError(f"adapter {name!r} is merged into the base; unmerge it first")
    plain = [part.plain if has_parts(part) else part for part in methods_in(adapter.method)]
    draft = next(word for number in itertools.count() if (word := f"{name}_{number}") not in record.adapters)
    fresh = attach(model, plain[0] if len(plain) == 1 else Composition(tuple(plain)), draft)
    owned = [[piece.module for piece in side.pieces if piece.key is not None] for side in (adapter, fresh)]
    for old, new in zip(*owned, strict=True):
        _settle(old, new)
    fresh.provenance, fresh.trainable = dict(adapter.provenance), adapter.trainable
    detach(model, name)
    rename(model, draft, name)
    record.state.active = active
    return fresh


@torch.no_grad()
def _settle(old: nn.Module, new: nn.Module) -> None:
    """Write what ``old`` computes in evaluation into the piece that takes its place."""
    if isinstance(old, SplitDelta) and isinstance(new, Delta):
        old.merged_into(new)
    elif isinstance(old, Branch) and isinstance(old.module, SparseMLP) and isinstance(new, Branch):
        assert isinstance(new.module, TwoLayerMLP)
        old.module.merged_into(new.module)
        if isinstance(new.scale, nn.Parameter):
            new.scale.copy_(torch.as_tensor(old.scale))
    else:
        new.load_state_dict(old.state_dict())
