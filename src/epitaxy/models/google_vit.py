"""Google's own vision transformer checkpoints (``ViT-B_16.npz`` and its like) as a ViT of transformers.

Dosovitskiy et al. 2021 (2010.11929) and Steiner et al. 2021 (2106.10270) published JAX parameters as numpy archives:
ImageNet-21k ones, from which the visual adapter papers start, and fine-tuned ones.  Matrices are stored ``in x out``,
attention's with the heads apart (``d h k`` in, ``h k d`` out), the patch convolution as ``height width in out``.  Their
layer norms have eps 1e-6.  Inputs were scaled to [-1, 1], which is mean and deviation 0.5.  Their GELU is computed here
in the exact form, as in transformers' own conversions.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epitaxy.core.errors import FormatError, nearest

Arrays = dict[str, "np.ndarray[Any, Any]"]
BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.*)")
MATRICES = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
ATTENTION, MLP = "MultiHeadDotProductAttention_1", "MlpBlock_3"
PRE_LOGITS = "pre_logits/"  # the original ImageNet-21k heads read a further layer, which a ViT classifier has not
EPS, MEAN = 1e-6, (0.5, 0.5, 0.5)


def read_google(file: Path) -> tuple[Any, dict[str, Tensor]]:
    """Config and state dict for ``ViTForImageClassification``.

    The classifier is in the state dict only where the file holds one that reads the class token itself.  Raises
    ``FormatError`` naming the file and the array that is missing, unknown or of a wrong shape.
    """
    arrays = _arrays(file)
    config = _config(file, arrays)
    state = _state(file, arrays, config)
    for key in [key for key in arrays if key.startswith((PRE_LOGITS, "head/"))]:
        arrays.pop(key)
    if arrays:
        first = sorted(arrays)[0]
        raise FormatError(
            f"{file}: {len(arrays)} of its arrays have no place in a vision transformer, the first is {first!r}; "
            "hybrids with a convolutional stem are not read"
        )
    return config, state


def google_processor(config: Any) -> Any:
    """The preparation those models were trained with: resized to their size, scaled to [-1, 1]."""
    import transformers

    side = {"height": config.image_size, "width": config.image_size}
    return transformers.ViTImageProcessorPil(size=side, image_mean=list(MEAN), image_std=list(MEAN))


def _arrays(file: Path) -> Arrays:
    try:
        with np.load(file, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise ValueError("one array, not an archive of them")
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"{file}: not a readable archive of numpy arrays ({str(error).splitlines()[0]})") from None


def _config(file: Path, arrays: Arrays) -> Any:
    """Sizes, all told by shapes."""
    import transformers

    kernel = _shaped(file, arrays, "embedding/kernel", 4)
    query = _shaped(file, arrays, f"Transformer/encoderblock_0/{ATTENTION}/query/kernel", 3)
    hidden = _shaped(file, arrays, f"Transformer/encoderblock_0/{MLP}/Dense_0/kernel", 2)
    positions = _shaped(file, arrays, "Transformer/posembed_input/pos_embedding", 3)
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1 or kernel.shape[0] != kernel.shape[1]:
        raise FormatError(
            f"{file}: expected square pictures and a class token, found {positions.shape[1]} positions and patches of "
            f"{kernel.shape[0]} x {kernel.shape[1]}"
        )
    blocks = {int(match[1]) for key in arrays if (match := BLOCK.match(key))}
    classes = None if _further_layer(arrays) else arrays.get("head/bias")
    return transformers.ViTConfig(
        hidden_size=int(kernel.shape[3]),
        num_hidden_layers=len(blocks),
        num_attention_heads=int(query.shape[1]),
        intermediate_size=int(hidden.shape[1]),
        patch_size=int(kernel.shape[0]),
        num_channels=int(kernel.shape[2]),
        image_size=side * int(kernel.shape[0]),
        layer_norm_eps=EPS,
        hidden_act="gelu",
        num_labels=2 if classes is None else len(classes),
    )


def _further_layer(arrays: Mapping[str, Any]) -> bool:
    return any(key.startswith(PRE_LOGITS) for key in arrays)


def _shaped(file: Path, arrays: Arrays, name: str, axes: int) -> np.ndarray[Any, Any]:
    if name not in arrays:
        raise FormatError(f"{file}: not a checkpoint of Google's vision transformer, {name!r} is missing")
    if arrays[name].ndim != axes:
        raise FormatError(f"{file}: expected {axes} axes of {name!r}, found the shape {arrays[name].shape}")
    return arrays[name]


def _state(file: Path, arrays: Arrays, config: Any) -> dict[str, Tensor]:
    """Moves every array that has a place out of ``arrays``."""
    width, mlp, patch = config.hidden_size, config.intermediate_size, config.patch_size
    state: dict[str, Tensor] = {}

    def put(ours: str, theirs: str, *shape: int) -> None:
        if theirs not in arrays:
            raise FormatError(f"{file}: {theirs!r} is missing{nearest(theirs, arrays)}")
        value = arrays.pop(theirs)
        if value.dtype.kind != "f" or value.size != math.prod(shape):
            raise FormatError(
                f"{file}: expected {theirs!r} to hold {' x '.join(map(str, shape))} numbers, found {value.dtype} of "
                f"shape {value.shape}"
            )
        state[ours] = torch.from_numpy(np.array(value, dtype=np.float32)).reshape(shape)

    def linear(ours: str, theirs: str, inputs: int, outputs: int) -> None:
        put(f"{ours}.weight", f"{theirs}/kernel", inputs, outputs)
        state[f"{ours}.weight"] = state[f"{ours}.weight"].t().contiguous()
        put(f"{ours}.bias", f"{theirs}/bias", outputs)

    def norm(ours: str, theirs: str) -> None:
        put(f"{ours}.weight", f"{theirs}/scale", width)
        put(f"{ours}.bias", f"{theirs}/bias", width)

    projection = "vit.embeddings.patch_embeddings.projection"
    put("vit.embeddings.cls_token", "cls", 1, 1, width)
    rows = (config.image_size // patch) ** 2 + 1
    put("vit.embeddings.position_embeddings", "Transformer/posembed_input/pos_embedding", 1, rows, width)
    put(f"{projection}.weight", "embedding/kernel", patch, patch, config.num_channels, width)
    state[f"{projection}.weight"] = state[f"{projection}.weight"].permute(3, 2, 0, 1).contiguous()
    put(f"{projection}.bias", "embedding/bias", width)
    for number in range(config.num_hidden_layers):
        ours, theirs = f"vit.layers.{number}", f"Transformer/encoderblock_{number}"
        norm(f"{ours}.layernorm_before", f"{theirs}/LayerNorm_0")
        norm(f"{ours}.layernorm_after", f"{theirs}/LayerNorm_2")
        for name, projected in MATRICES.items():
            linear(f"{ours}.attention.{projected}", f"{theirs}/{ATTENTION}/{name}", width, width)
        linear(f"{ours}.attention.o_proj", f"{theirs}/{ATTENTION}/out", width, width)
        linear(f"{ours}.mlp.fc1", f"{theirs}/{MLP}/Dense_0", width, mlp)
        linear(f"{ours}.mlp.fc2", f"{theirs}/{MLP}/Dense_1", mlp, width)
    norm("vit.layernorm", "Transformer/encoder_norm")
    if "head/kernel" in arrays and not _further_layer(arrays):
        linear("classifier", "head", width, config.num_labels)
    return state


__all__ = ["google_processor", "read_google"]
