"""State dicts of the released code of AdaptFormer for pictures (Chen et al. 2022, 2205.13535).

Its adapters stand beside the feed-forward, read the residual stream before its norm, and have ReLU and scale 0.1.  The
head is a linear map, or a batch norm without parameters in front of one, which in evaluation is a linear map as well.
The base beside them must be the model's own.  There is no writing: what is read is saved like any adapter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import FormatError, expect_one_of
from epitaxy.core.files import Contents, Format, register_format
from epitaxy.interop.vision_state import Named, Reading, contents, holds, match_base, plain_state, put_on
from epitaxy.methods.bottleneck import Bottleneck

LEAF = r"(?P<leaf>weight|bias)"
BLOCK = r"blocks\.(?P<block>\d+)\."
ADAPTER = re.compile(rf"{BLOCK}adaptmlp\.((?P<name>down|up)_proj\.{LEAF}|(?P<scale>scale))")
NORM = re.compile(rf"{BLOCK}adaptmlp\.adapter_layer_norm_before\.")
OURS = re.compile(r"blocks\.\d+\.adaptmlp\.")
HEAD = re.compile(r"head\.((?P<position>[01])\.)?(?P<leaf>weight|bias|running_mean|running_var|num_batches_tracked)")
BATCH_NORM_EPS = 1e-6
BASE = (
    (rf"{BLOCK}norm1\.{LEAF}", "norm.attention"),
    (rf"{BLOCK}norm2\.{LEAF}", "norm.mlp"),
    (rf"{BLOCK}attn\.q_proj\.{LEAF}", "attention.q"),
    (rf"{BLOCK}attn\.k_proj\.{LEAF}", "attention.k"),
    (rf"{BLOCK}attn\.v_proj\.{LEAF}", "attention.v"),
    (rf"{BLOCK}attn\.proj\.{LEAF}", "attention.output"),
    (rf"{BLOCK}fc1\.{LEAF}", "mlp.up"),
    (rf"{BLOCK}fc2\.{LEAF}", "mlp.down"),
    (rf"patch_embed\.proj\.{LEAF}", "patch"),
    (r"cls_token", "cls"),
    (r"pos_embed", "positions"),
    (rf"norm\.{LEAF}", "norm.final"),
)


@dataclass(frozen=True)
class Published:
    """What the file does not tell; the defaults are those of the published runs.  A learned scale is in the file."""

    order: Literal["parallel", "sequential"] = "parallel"
    scale: float = 0.1

    def __post_init__(self) -> None:
        expect_one_of("order", self.order, ("parallel", "sequential"))


def load(
    model: nn.Module, path: Path | str, name: str = "default", options: Published | None = None, trainable: bool = False
) -> Adapter:
    """As ``epitaxy.load``, with what the file does not tell given in ``options``."""
    adapter = put_on(model, read(Path(path), options or Published()), name, "adaptformer")
    adapter.trainable = trainable
    return adapter


def recognises(path: Path) -> bool:
    """Whether ``path`` is such a file, told from its keys."""
    return holds(path, OURS)


def inspect(path: Path) -> Contents:
    """Tell what the file holds, without a model."""
    return contents(read(path, Published()), "adaptformer")


def read(path: Path, options: Published) -> Reading:
    """Sort the tensors of one file.  Raises ``FormatError`` naming what cannot be expressed."""
    reading, rest, head = Reading(path), dict[str, Tensor](), dict[str, Named]()
    for key, value in plain_state(path).items():
        if NORM.match(key):
            raise FormatError(f"{path}: {key!r} is there, but not whether that norm stands before or after the adapter")
        if found := ADAPTER.fullmatch(key):
            name = "scale" if found["scale"] else f"module.{found['name']}.{found['leaf']}"
            reading.add(("mlp", int(found["block"])), name, key, value)
        elif HEAD.fullmatch(key):
            head[key] = Named(key, value)
        else:
            rest[key] = value
    if "fc_norm.weight" in rest:
        raise FormatError(
            f"{path}: 'fc_norm.weight' is there: its head reads the mean of the patches through a norm of its own, "
            "which the model has not"
        )
    match_base(reading, rest, BASE)
    reading.head = _head(path, head)
    shapes = reading.alike(["module.down.weight", "module.down.bias", "module.up.weight", "module.up.bias"])
    scale: Any = "learned" if "scale" in shapes else options.scale
    reading.method = Bottleneck(
        bottleneck=int(shapes["module.down.weight"].shape[0]),
        order=options.order,
        reads="stream" if options.order == "parallel" else "sublayer",
        scale=scale,
        activation="relu",
        dropout=0.1,
    )
    return reading


def _head(path: Path, head: dict[str, Named]) -> dict[str, Named]:
    """Weight and bias of the head; a batch norm before them (eps 1e-6, without parameters) is worked into them."""
    if "head.1.weight" not in head:
        found = {leaf: head[f"head.{leaf}"] for leaf in ("weight", "bias") if f"head.{leaf}" in head}
        if len(found) != len(head):
            raise FormatError(
                f"{path}: {sorted(set(head) - {'head.weight', 'head.bias'})[0]!r} is there, but no 'head.1.weight'"
            )
        return found
    for name in ("head.1.bias", "head.0.running_mean", "head.0.running_var"):
        if name not in head:
            raise FormatError(f"{path}: 'head.1.weight' is there, but not {name!r}")
    mean, variance = (head[f"head.0.{name}"].value.double() for name in ("running_mean", "running_var"))
    weight = head["head.1.weight"].value
    if weight.dim() != 2 or mean.shape != variance.shape or mean.shape != weight.shape[1:]:
        raise FormatError(
            f"{path}: 'head.1.weight' has shape {tuple(weight.shape)}, 'head.0.running_mean' {tuple(mean.shape)}"
        )
    scaled = weight.double() / torch.sqrt(variance + BATCH_NORM_EPS)
    bias = head["head.1.bias"].value.double() - scaled @ mean
    return {
        "weight": Named("head.1.weight", scaled.to(weight.dtype)),
        "bias": Named("head.1.bias", bias.to(weight.dtype)),
    }


register_format(
    Format(
        "adaptformer",
        recognises,
        lambda model, path, name: put_on(model, read(path, Published()), name, "adaptformer"),
        None,
        inspect,
    )
)

__all__ = ["Published", "inspect", "load", "read", "recognises"]
