"""Extra keys and masks inside the attention layers of transformers models, through its attention interface.

``use`` switches a model to an implementation of ours that adds what the active edits ask for and then calls the
model's own one; layers without edits pass straight through, so other models are not touched.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.anatomy import INTERFACE_PREFIX
from epitaxy.core.edits import Edit
from epitaxy.core.edits.kv import JointKV
from epitaxy.core.edits.tokens import KeyMask
from epitaxy.core.errors import UnsupportedError
from epitaxy.core.route import Route
from epitaxy.core.slot import Slot


def attend_sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """torch's scaled dot product attention with the extra keys of the active edits."""
    return _attend("sdpa", module, query, key, value, mask, kwargs)


def attend_eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Attention written out, which also returns its weights."""
    return _attend("eager", module, query, key, value, mask, kwargs)


def register() -> None:
    """Make our implementations known to transformers; once in every process that runs an adapted model."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    for name, function in (("sdpa", attend_sdpa), ("eager", attend_eager)):
        AttentionInterface.register(INTERFACE_PREFIX + name, function)
        AttentionMaskInterface.register(INTERFACE_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def use(model: nn.Module) -> str:
    """Switch ``model`` to our implementation; returns the name of the one it had."""
    register()
    config: Any = model.config
    current = str(config._attn_implementation)
    if current.startswith(INTERFACE_PREFIX):
        return current.removeprefix(INTERFACE_PREFIX)
    if current not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"this method needs the attention implementation 'sdpa' or 'eager', the model uses {current!r}; "
            "call model.set_attn_implementation('sdpa') first"
        )
    model.set_attn_implementation(for_towers(model, INTERFACE_PREFIX + current))  # type: ignore[operator]
    return current


def for_towers(model: nn.Module, name: str) -> str | dict[str, str]:
    """``name`` for the model and those towers of its config that it has: a classifier on CLIP lacks the text tower."""
    config: Any = model.config
    towers = {key for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is not None}
    if not towers:
        return name
    held = [id(getattr(module, "config", None)) for module in model.modules()]
    return {"": name, **{key: name for key in sorted(towers) if id(getattr(config, key)) in held}}


def _attend(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Any:
    key, value, mask = with_extra_keys(module, query, key, value, mask, kwargs)
    if base == "sdpa":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", _eager)  # may cap or sink
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return own(module, query, key, value, mask, **kwargs)


def with_extra_keys(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Any]:
    """Keys, values and mask of a layer with what the adapters switched on in it add; ``b heads t d`` each."""
    slot = module._modules.get("epitaxy")
    if isinstance(slot, Slot):
        mask = _hide_padding(slot, module, query, key, mask, kwargs)
        for group in slot.whole(JointKV):
            key, value, mask = _add_keys(group, slot.state.route, module, query, key, value, mask, kwargs)
    return key, value, mask


def _hide_padding(slot: Slot, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
    route = slot.state.route
    if route is None:
        return mask
    groups = slot.whole(KeyMask)
    seen = KeyMask.seen(groups[0], route, query.shape[0], query.device) if groups else None
    if seen is None:
        return mask
    rest = torch.ones(seen.shape[0], key.shape[2] - seen.shape[1], dtype=torch.bool, device=seen.device)
    return _both(torch.cat([seen, rest], dim=1)[:, None, None, :], mask, query)


def _add_keys(
    group: Mapping[int, Edit],
    route: Route | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor, Any]:
    batch = query.shape[0]
    pairs = {number: edit.heads(key, value) for number, edit in group.items() if isinstance(edit, JointKV)}
    seen: Tensor | None = None
    if route is None:
        keys = torch.cat([own for own, _ in pairs.values()], dim=1).expand(batch, -1, -1, -1)
        values = torch.cat([own for _, own in pairs.values()], dim=1).expand(batch, -1, -1, -1)
    else:
        index = route.expanded(batch, query.device)
        longest = max(own.shape[1] for own, _ in pairs.values())
        some_key, some_value = next(iter(pairs.values()))
        stacked: tuple[list[Tensor], list[Tensor], list[list[bool]]] = ([], [], [])
        for number in range(len(route.names) + 1):
            own_key, own_value = pairs.get(number, (some_key[:, :0], some_value[:, :0]))
            padding = longest - own_key.shape[1]
            stacked[0].append(F.pad(own_key, (0, 0, padding, 0)))
            stacked[1].append(F.pad(own_value, (0, 0, padding, 0)))
            stacked[2].append([position >= padding for position in range(longest)])
        keys, values = torch.stack(stacked[0])[index], torch.stack(stacked[1])[index]
        used = {number if number >= 0 else len(route.names) for number in route.numbers}
        if not all(all(stacked[2][number]) for number in used):
            seen = torch.tensor(stacked[2], device=query.device)[index]
    count = keys.shape[2]
    if mask is None and _causal(module, query, kwargs):
        length = query.shape[2]
        key, value = key[:, :, :length], value[:, :, :length]  # the rest of a static cache is still empty
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        mask = F.pad(mask[..., : key.shape[2]], (count, 0), value=1.0 if mask.dtype == torch.bool else 0.0)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"][..., : key.shape[2]], (count, 0))
    key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
    if seen is not None:
        rest = torch.ones(batch, key.shape[2] - count, dtype=torch.bool, device=query.device)
        mask = _both(torch.cat([seen, rest], dim=1)[:, None, None, :], mask, query)
    return key, value, mask


def _causal(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if given is None else given
    return bool(causal) and query.shape[2] > 1


def _both(seen: Tensor, mask: Tensor | None, query: Tensor) -> Tensor:
    """``seen`` (True: visible) and the layer's own mask, boolean or additive, together."""
    if mask is None:
        return seen
    if mask.dtype == torch.bool:
        return seen & mask
    return mask.masked_fill(~seen, torch.finfo(query.dtype).min)


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        hidden = torch.finfo(weights.dtype).min
        weights = weights.masked_fill(~mask, hidden) if mask.dtype == torch.bool else weights + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
