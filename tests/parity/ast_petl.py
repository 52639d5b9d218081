"""Golden vectors of the official audio PETL modules: loading them, and what their names are here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import epitaxy

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "ast_petl"
FORWARD = {torch.float64: 1e-10, torch.float32: 2e-5}
BACKWARD = {torch.float64: 1e-10, torch.float32: 2e-4}
PRECISIONS = [torch.float64, torch.float32]

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden vectors are not at {GOLDEN}")

BOTTLENECK = {"linear_downsample": "down", "linear_upsample": "up"}
CONFORMER = {
    "lnorm": "norm",
    "pwise_conv1": "pointwise_in",
    "dwise_conv": "depthwise",
    "bnorm": "inner_norm",
    "pwise_conv2": "pointwise_out",
}
CONVPASS = {"adapter_down": "down", "adapter_conv": "convolution", "adapter_up": "up"}


@cache
def golden(name: str) -> Mapping[str, Tensor]:
    """The tensors of one golden file; do not write into them."""
    return load_file(GOLDEN / f"{name}.safetensors")


def under(prefix: str, name: str) -> dict[str, Tensor]:
    """The tensors of a golden file whose names start with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in golden(name).items() if key.startswith(prefix)}


def backbone(folder: str, dtype: torch.dtype) -> nn.Module:
    """A tiny model of transformers with the golden weights, in eval mode."""
    import transformers

    kind: Any = {"backbone": transformers.ASTModel, "backbone_wav2vec2": transformers.Wav2Vec2Model}[folder]
    model: nn.Module = kind.from_pretrained(GOLDEN / folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def fill_module(module: nn.Module, official: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Copy official tensors into one of our modules: every one used, every place filled."""
    own = module.state_dict()
    values = {}
    for key, value in official.items():
        part, _, leaf = key.rpartition(".")
        ours = f"{names[part]}.{leaf}"
        values[ours] = value.reshape(own[ours].shape)
    module.load_state_dict(values, strict=True)


def fill_adapter(
    adapter: epitaxy.Adapter,
    official: Mapping[str, Tensor],
    names: Mapping[str, str],
    mhsa: str = "adapter_module_MHSA",
) -> None:
    """Copy ``<blocks>.<i>.adapter_module_{FFN,MHSA}.*`` into the branches of an adapter, by layer and side."""
    for side, piece in branches(adapter):
        prefix = official_prefix(official, piece.path, mhsa if side == "attention" else "adapter_module_FFN")
        chosen = {key.removeprefix(prefix): value for key, value in official.items() if key.startswith(prefix)}
        assert chosen, prefix
        fill_module(piece.module.module, chosen, names)


def branches(adapter: epitaxy.Adapter) -> list[tuple[str, Any]]:
    """(role, piece) of every branch."""
    return [(piece.role, piece) for piece in adapter.pieces if type(piece.module).__name__ == "Branch"]


def official_prefix(official: Mapping[str, Tensor], path: str, module: str) -> str:
    """The official name of the adapter of one sub-layer, such as ``encoder.layer.0.adapter_module_FFN.``"""
    layer = path.split("layers.")[1].split(".")[0]
    stem = next(iter(official)).split(".adapter_module")[0].rpartition(".")[0]
    return f"{stem}.{layer}.{module}."


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest absolute difference within ``tolerance``."""
    assert actual.shape == expected.shape, what
    difference = float((actual.detach().double() - expected).abs().max())
    assert difference <= tolerance, f"{what} differs by {difference:.1e}, more than {tolerance:.0e}"
