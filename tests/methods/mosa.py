"""A small vision transformer with MoSA on it, for the tests of MoSA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import epitaxy
from epitaxy import MoSA
from epitaxy.methods.mosa_module import SparseMLP
from epitaxy.methods.parts import Parts
from tests.methods.drawing import modules_of, moved

PARTITIONS: Any = ["element", "row", "column", "out_slice", "rank_slice"]
partitions = pytest.mark.parametrize("partition", PARTITIONS)


def vit(labels: int | None = None, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **({} if labels is None else {"num_labels": labels}),
    )
    kind: Any = transformers.ViTModel if labels is None else transformers.ViTForImageClassification
    model: nn.Module = kind(config)
    return model.eval()


def pictures(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens(batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 5, 24, generator=torch.Generator().manual_seed(2), dtype=dtype)


def on(model: nn.Module, **fields: Any) -> tuple[epitaxy.Adapter, list[SparseMLP]]:
    """MoSA on a model in training mode, with every parameter away from its start."""
    adapter = epitaxy.attach(model, MoSA(**{"bottleneck": 8, "dropout": 0.0, **fields}), name="a")
    for module in modules_of(model):
        moved(module)
    model.train()
    return adapter, modules_of(model)


def network(**fields: Any) -> SparseMLP:
    """One network of MoSA, in training mode, away from its start."""
    return on(vit(layers=1), **fields)[1][0]


def split_of(module: SparseMLP) -> list[Parts]:
    return [parts for parts in (module.down_parts, module.up_parts) if parts is not None]
