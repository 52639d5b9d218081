"""Whisper's encoder on clips shorter than 30 s, without filling them up.

The stock encoder takes 3000 frames and nothing else.  Once ``allow_short`` was called it takes any even number of
them up to that: convolutions, then the first half as many positions, then the layers.  What it computes for ``t``
frames is what a stock encoder built for ``t`` frames computes with the first ``t/2`` rows of the position table; with
3000 frames it is the stock encoder.  It is not the beginning of what comes out for the same clip filled up to 30 s,
where every token also attends to the silence behind the clip.

Class, parameters and the model's config stay what they are.  One model serves one thread at a time.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor, nn

from epitaxy.core.errors import EpitaxyError


def allow_short(model: nn.Module) -> None:
    """Let the Whisper encoder in ``model`` take short clips.  Raises ``EpitaxyError`` when there is none."""
    found: list[Any] = [module for module in model.modules() if _is_encoder(module)]
    if not found:
        raise EpitaxyError(f"{type(model).__name__} has no Whisper encoder")
    for encoder in found:
        if _set_length in encoder._forward_pre_hooks.values():
            continue
        encoder.config = copy(encoder.config)  # its own, since it says how long the input of the moment is
        encoder.register_forward_pre_hook(_set_length, with_kwargs=True)
        encoder.embed_positions.register_forward_pre_hook(_cut_positions)
        encoder.embed_positions.visible = encoder.embed_positions.num_embeddings


def _is_encoder(module: nn.Module) -> Any:
    return type(module).__name__ == "WhisperEncoder"


def _set_length(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the encoder: its config, against which it checks the input, names the length of this input."""
    features = args[0] if args else kwargs["input_features"]
    stride = encoder.conv1.stride[0] * encoder.conv2.stride[0]
    most = encoder.embed_positions.num_embeddings
    tokens = features.shape[-1] // stride
    if features.shape[-1] % stride or not 1 <= tokens <= most:
        raise EpitaxyError(
            f"a Whisper encoder takes a multiple of {stride} up to {most * stride} frames, got {features.shape[-1]}"
        )
    encoder.config.max_source_positions = tokens
    encoder.embed_positions.visible = tokens


def _cut_positions(table: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    """Before the position table is read: ask for no more rows than there are tokens."""
    return (args[0][: table.visible],)
