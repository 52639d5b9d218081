"""Tiny random vision models of every family, as trunks, towers and classifiers, saved as anybody's models are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
PIXELS: dict[str, Any] = {"image_size": 32, "patch_size": 8}
RATIO: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
WINDOWS: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {"vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1}
TOWER = {**SIZES, **PIXELS}

BUILD: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**TOWER)),
    "vit trunk": lambda: hf.ViTModel(hf.ViTConfig(**TOWER)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**TOWER)),
    "deit trunk": lambda: hf.DeiTModel(hf.DeiTConfig(**TOWER)),
    "deit distilled": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**TOWER)),
    "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**TOWER, use_relative_position_bias=True)),
    "beit trunk": lambda: hf.BeitModel(hf.BeitConfig(**TOWER, use_absolute_position_embeddings=True)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**RATIO, **PIXELS)),
    "dinov2 trunk": lambda: hf.Dinov2Model(hf.Dinov2Config(**RATIO, **PIXELS)),
    "dinov2 gated": lambda: hf.Dinov2Model(hf.Dinov2Config(**RATIO, **PIXELS, use_swiglu_ffn=True)),
    "dinov2 registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**RATIO, **PIXELS)),
    "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(**WINDOWS)),
    "swin trunk": lambda: hf.SwinModel(hf.SwinConfig(**WINDOWS)),
    "swin v2 trunk": lambda: hf.Swinv2Model(hf.Swinv2Config(**WINDOWS)),
    "clip": lambda: hf.CLIPModel(hf.CLIPConfig(vision_config=TOWER, text_config={**SIZES, **TEXT})),
    "clip tower": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**TOWER)),
    "clip tower projected": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**TOWER)),
    "clip classifier": lambda: hf.CLIPForImageClassification(
        hf.CLIPConfig(vision_config=TOWER, text_config={**SIZES, **TEXT})
    ),
    "siglip": lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=TOWER, text_config={**SIZES, **TEXT})),
    "siglip tower": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TOWER)),
}
ROLES = ("block", "attention", "mlp", "mlp.up", "mlp.down", "norm.attention", "norm.mlp")
PROJECTIONS = ("attention.q", "attention.k", "attention.v", "attention.output")


def build(kind: str) -> Any:
    """The model of ``kind``, always the same weights, every tensor of it random."""
    torch.manual_seed(3)
    model = BUILD[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, class tokens and position tables start at zero
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model: Any, path: Path, **preparation: Any) -> Path:
    """Write model and processor; ``preparation`` are fields of the processor."""
    model.save_pretrained(path)
    fields = {"size": {"height": 32, "width": 32}, **preparation}
    hf.ViTImageProcessorPil(**fields).save_pretrained(path)
    return path


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None takes one out."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def pictures(side: int = 32, batch: int = 2) -> Tensor:
    """Reproducible random pixels."""
    return torch.randn((batch, 3, side, side), generator=torch.Generator().manual_seed(1))
