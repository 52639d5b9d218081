"""The models that are timed: known shapes, random weights (time does not depend on them)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A model shape and the batch it is fed; ``quick`` shapes only prove that the code runs."""

    name: str
    build: Callable[[int], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    depth: int

    def model(self, depth: int | None = None) -> nn.Module:
        """A fresh model with ``depth`` blocks; always the same weights."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build(depth or self.depth)


def vit(quick: bool = False, batch: int = 1) -> Shape:
    """ViT-B/16 for 224 x 224 pictures: 86 M parameters, 197 tokens."""
    from transformers import ViTConfig, ViTForImageClassification

    width, side = (64, 32) if quick else (768, 224)

    def build(depth: int) -> nn.Module:
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=width // 16 if quick else 12,
                intermediate_size=4 * width,
                image_size=side,
                num_labels=100,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    def inputs() -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(batch, 3, side, side), "labels": torch.arange(batch)}

    return Shape("ViT-B/16", build, inputs, 2 if quick else 12)


def language_model(quick: bool = False, batch: int = 1, length: int = 128) -> Shape:
    """A Llama of 98 M parameters: 12 blocks, width 768, 16,384 words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, words = (64, 128) if quick else (768, 16384)
    length = min(length, 16) if quick else length

    def build(depth: int) -> nn.Module:
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=width // 16 if quick else 12,
                intermediate_size=128 if quick else 2048,
                vocab_size=words,
                tie_word_embeddings=True,
                use_cache=False,
                pad_token_id=0,
            )
        )

    def inputs() -> dict[str, Tensor]:
        tokens = torch.randint(1, words, (batch, length))
        return {"input_ids": tokens, "labels": tokens.clone()}

    return Shape("Llama 98M", build, inputs, 2 if quick else 12)


SHAPES: dict[str, Any] = {"vit": vit, "lm": language_model}
