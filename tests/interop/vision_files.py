"""Files as other codes of vision adapters write them: their names for a base of transformers, and random adapters."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.vision import build

State = dict[str, Tensor]
WIDTH, BLOCKS, RANK = 32, 2, 5
VPT = (
    ("vit.embeddings.patch_embeddings.projection", "enc.transformer.embeddings.patch_embeddings"),
    ("vit.embeddings.", "enc.transformer.embeddings."),
    ("vit.layernorm.", "enc.transformer.encoder.encoder_norm."),
    ("vit.layers.", "enc.transformer.encoder.layer."),
    ("layernorm_before", "attention_norm"),
    ("layernorm_after", "ffn_norm"),
    ("attention.q_proj", "attn.query"),
    ("attention.k_proj", "attn.key"),
    ("attention.v_proj", "attn.value"),
    ("attention.o_proj", "attn.out"),
    (".mlp.fc", ".ffn.fc"),
)
TIMM = (
    ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.layernorm.", "norm."),
    ("vit.layers.", "blocks."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.o_proj", "attn.proj"),
    ("attention.", "attn."),
)


def renamed(model: nn.Module, table: tuple[tuple[str, str], ...]) -> State:
    """The trunk's tensors under other names."""
    found = {}
    for name, value in model.state_dict().items():
        if not name.startswith("classifier"):
            for ours, theirs in table:
                name = name.replace(ours, theirs)
            found[name] = value.clone()
    return found


def fused(state: State) -> State:
    """Queries, keys and values as timm's one matrix."""
    found = {key: value for key, value in state.items() if not re.search(r"attn\.[qkv]_proj", key)}
    for key in [key for key in state if ".attn.q_proj." in key]:
        thirds = [state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
        found[key.replace("q_proj", "qkv")] = torch.cat(thirds)
    return found


def draw(*shape: int, seed: int) -> Tensor:
    """Reproducible values, large enough to matter."""
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


def vit() -> Any:
    """The base of the tests."""
    model = build("vit")
    for block in model.vit.layers:
        for norm in (block.layernorm_before, block.layernorm_after):
            norm.eps = 1e-6
    return model


def run_blocks(model: Any, pixels: Tensor, block: Callable[[int, Any, Tensor], Tensor]) -> Tensor:
    """The class token's features with ``block(number, module, x)`` in place of every block."""
    x = model.vit.embeddings(pixels)
    for number, module in enumerate(model.vit.layers):
        x = block(number, module, x)
    features: Tensor = model.vit.layernorm(x)[:, 0]
    return features
