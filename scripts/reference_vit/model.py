"""The shape of the reference vision transformer, and how it is written to disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

IMAGE_SIZE = 64
MEAN = STD = 0.5


def build_config(labels: list[str]) -> ViTConfig:
    """Six layers of width 192 on 8x8 patches: 2.7 million parameters, 65 tokens per picture."""
    return ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        # Short from-scratch training on little data; the augmentation regularises, dropout would only slow it down.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )


def build_model(labels: list[str], seed: int) -> ViTForImageClassification:
    """A freshly initialised model; the same seed always gives the same weights."""
    torch.manual_seed(seed)
    return ViTForImageClassification(build_config(labels))


def export(model: ViTForImageClassification, folder: Path) -> None:
    """Write weights (half precision), configuration and image preprocessing in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    # The bare ``ViTModel`` expects a pooling layer, which the classifier does not have.  With an identity in its place
    # nothing is missing from the file: the pooled output is then simply the tanh of the class token.
    width = model.config.hidden_size
    tensors["vit.pooler.dense.weight"] = torch.eye(width, dtype=torch.float16)
    tensors["vit.pooler.dense.bias"] = torch.zeros(width, dtype=torch.float16)
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # the writer makes the file private
    os.replace(partial, folder / "model.safetensors")

    config = model.config.to_diff_dict()
    config.update(architectures=["ViTForImageClassification"], dtype="float16")
    config.pop("_name_or_path", None)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "resample": 2,  # PIL's bilinear filter, which averages when it shrinks
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [MEAN] * 3,
            "image_std": [STD] * 3,
        },
    )


def _write_json(path: Path, value: object) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
