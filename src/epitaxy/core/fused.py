"""Attention layers that hand the weights of their projections to torch, made to call the projections instead.

WavLM's does: whatever sits on its query, key, value and output projections would never run.  While adapters are
attached these layers get a computation of ours, which calls the projections and takes extra keys; with nothing
switched on in a layer it is the layer's own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.attention import with_extra_keys
from epitaxy.core.edits.kv import JointKV
from epitaxy.core.edits.tokens import KeyMask
from epitaxy.core.kinds import is_fused
from epitaxy.core.slot import Slot

METHOD = "torch_multi_head_self_attention"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def open_up(model: nn.Module) -> None:
    """Let every such layer of ``model`` call its projections where something on them is switched on."""
    for module in model.modules():
        if is_fused(module):
            module.__dict__[METHOD] = partial(_attend, module)  # unlike a bound method, copied and pickled with it


def close_again(model: nn.Module) -> None:
    """Undo ``open_up``."""
    for module in model.modules():
        module.__dict__.pop(METHOD, None)


def _attend(
    layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The products in the order in which torch takes them, so that a fresh adapter changes no bit."""
    if not _adapted(layer):
        own: Any = getattr(type(layer), METHOD)
        return own(layer, hidden_states, attention_mask, gated_position_bias)  # type: ignore[no-any-return]
    batch, length, width = hidden_states.shape
    heads: Any = layer.num_heads
    strided = hidden_states.transpose(0, 1).contiguous().transpose(0, 1)  # torch multiplies time first; so do we
    query, key, value = (
        layer.get_submodule(name)(strided).unflatten(-1, (heads, width // heads)).transpose(1, 2)
        for name in PROJECTIONS[:3]
    )  # b heads t d
    mask = gated_position_bias.view(batch, heads, length, length)
    if attention_mask is not None:
        mask = mask.masked_fill(attention_mask.ne(1)[:, None, None], float("-inf"))
    key, value, mask = with_extra_keys(layer, query, key, value, mask, {})
    scaled = (query * math.sqrt(1 / (width // heads))).flatten(0, 1)
    weights = torch.baddbmm(mask.flatten(0, 1), scaled, key.flatten(0, 1).transpose(1, 2)).softmax(dim=-1)
    weights = F.dropout(weights, float(layer.dropout), layer.training)  # type: ignore[arg-type]
    mixed = torch.bmm(weights, value.flatten(0, 1)).view(batch, heads, length, -1).transpose(1, 2)  # b t heads d
    return layer.get_submodule("out_proj")(mixed.flatten(2)), weights.view(batch, heads, length, -1)


def _adapted(layer: nn.Module) -> bool:
    slots = [layer.get_submodule(name)._modules.get("epitaxy") for name in PROJECTIONS]
    if any(isinstance(slot, Slot) and slot.live() for slot in slots):
        return True
    own = layer._modules.get("epitaxy")
    return isinstance(own, Slot) and bool(own.whole(JointKV) or own.whole(KeyMask))


__all__ = ["close_again", "open_up"]
