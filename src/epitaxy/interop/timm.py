"""timm's names for a plain vision transformer, out: a state dict that ``timm.create_model`` loads strictly.

timm (Wightman 2019) keeps queries, keys and values in one matrix and makes ``int(embed_dim * mlp_ratio)`` hidden units.
A folded model (``core/fold.py``) is such a transformer with another ``mlp_ratio``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.errors import UnsupportedError
from epitaxy.core.host import hosted
from epitaxy.core.storage import appearing, write_atomically
from epitaxy.core.wider import Width, smallest_ratio

WEIGHTS, ARGUMENTS = "model.safetensors", "timm.json"
TIMM_EPS = 1e-6  # of timm's layer norms unless it is told otherwise

_OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_INNER = {
    "layernorm_before": "norm1",
    "attention.o_proj": "attn.proj",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def timm_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a ViT of transformers under timm's names.

    For ``ViTForImageClassification``, and ``ViTModel`` without its pooler.  Raises ``UnsupportedError`` for another
    model, and while adapters are attached: fold or merge them first.
    """
    layers = _require_vit(model).num_hidden_layers
    values = dict(model.state_dict())
    trunk = "vit." if any(key.startswith("vit.") for key in values) else ""
    places = {f"{trunk}{ours}": theirs for ours, theirs in _OUTER.items()} | {"classifier": "head"}
    for layer in range(layers):
        places |= {f"{trunk}layers.{layer}.{ours}": f"blocks.{layer}.{theirs}" for ours, theirs in _INNER.items()}
    found = {}
    for layer in range(layers):
        for leaf in ("weight", "bias"):
            keys = [f"{trunk}layers.{layer}.attention.{name}_proj.{leaf}" for name in ("q", "k", "v")]
            if keys[0] in values:
                found[f"blocks.{layer}.attn.qkv.{leaf}"] = torch.cat([values.pop(key) for key in keys]).detach()
    for key in list(values):
        path, _, leaf = key.rpartition(".")
        name = places.get(key) or (f"{places[path]}.{leaf}" if path in places else None)
        if name is not None:
            found[name] = values.pop(key).detach()
    if values:
        raise UnsupportedError(f"timm's vision transformer has no place for {next(iter(values))!r} of this model")
    return found


def timm_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments of timm's ``VisionTransformer`` for the state dict.

    A layer norm's eps other than timm's 1e-6 is given as ``layer_norm_eps``, for the caller to build ``norm_layer``.
    """
    config = _require_vit(model)
    width, hidden = config.hidden_size, config.intermediate_size
    head = getattr(model, "classifier", None)
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": head.out_features if isinstance(head, nn.Linear) else 0,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": smallest_ratio([Width("", "", width, hidden, hidden)]),
        "qkv_bias": config.qkv_bias,
        "global_pool": "token",
    }
    return arguments if config.layer_norm_eps == TIMM_EPS else {**arguments, "layer_norm_eps": config.layer_norm_eps}


def save_timm(model: nn.Module, target: Path) -> None:
    """Write ``model.safetensors`` and ``timm.json``, the arguments, to the new directory ``target``."""
    from safetensors.torch import save

    state = {name: tensor.contiguous().cpu() for name, tensor in timm_state(model).items()}
    arguments = json.dumps(timm_arguments(model), indent=2) + "\n"
    with appearing(target) as draft:
        write_atomically(draft / WEIGHTS, save(state, {"format": "pt"}))
        write_atomically(draft / ARGUMENTS, arguments.encode())


def _require_vit(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "vit":
        raise UnsupportedError(
            f"only a ViT of transformers is written in timm's names, found {type(model).__name__} "
            f"({getattr(config, 'model_type', 'no config')})"
        )
    if hosted(model) is not None:
        raise UnsupportedError("timm's names have none for adapters; fold or merge them first")
    if config.hidden_act != "gelu":
        raise UnsupportedError(f"timm's vision transformer has the activation 'gelu', found {config.hidden_act!r}")
    return config


__all__ = ["save_timm", "timm_arguments", "timm_state"]
