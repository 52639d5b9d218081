"""The shape of the reference audio spectrogram transformer, and how it is written to disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import ASTConfig, ASTForAudioClassification

CLIP_FRAMES = 128  # 1.3 s
PATCH = 16


def build_config(labels: list[str]) -> ASTConfig:
    """Six layers of width 192 on 16x16 patches: 2.8 million parameters, 66 tokens for 1.3 s of sound.

    Published audio spectrogram transformers let their patches overlap (stride 10, here 146 tokens).  Without overlap
    a training step costs less than half, which buys twice as many of them.
    """
    return ASTConfig(
        num_mel_bins=128,
        max_length=CLIP_FRAMES,
        patch_size=PATCH,
        frequency_stride=PATCH,
        time_stride=PATCH,
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


def build_model(labels: list[str], seed: int) -> ASTForAudioClassification:
    """A freshly initialised model; the same seed always gives the same weights."""
    torch.manual_seed(seed)
    return ASTForAudioClassification(build_config(labels))


def export(model: ASTForAudioClassification, normal: tuple[float, float], folder: Path) -> None:
    """Write weights (half precision), configuration and feature extraction in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # the writer makes the file private
    os.replace(partial, folder / "model.safetensors")

    config = model.config.to_diff_dict()
    config.update(architectures=["ASTForAudioClassification"], dtype="float16")
    config.pop("_name_or_path", None)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "preprocessor_config.json",
        {
            "feature_extractor_type": "ASTFeatureExtractor",
            "feature_size": 1,
            "sampling_rate": 16000,
            "num_mel_bins": 128,
            "max_length": CLIP_FRAMES,
            "do_normalize": True,
            "mean": normal[0],
            "std": normal[1],
            "padding_value": 0.0,
            "padding_side": "right",
            "return_attention_mask": False,
        },
    )


def _write_json(path: Path, value: object) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
