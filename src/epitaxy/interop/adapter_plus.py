"""State dicts of the released code of Adapter+ (Steitz and Roth 2024, 2406.06820), on timm's vision transformers.

Adapter+ stands after the feed-forward, reads the residual stream there, has GELU and one scale for each channel; the
scale is worked into the last matrix and bias, which gives the same function.  The code's Houlsby placement is read as
well.  The base beside the adapters must be the model's own.  There is no writing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import FormatError, expect_one_of
from epitaxy.core.files import Contents, Format, register_format
from epitaxy.interop.vision_state import Named, Reading, contents, holds, match_base, plain_state, put_on
from epitaxy.methods.bottleneck import Activation, Bottleneck

Placement = Literal["post", "intermediate"]
LEAF = r"(?P<leaf>weight|bias)"
BLOCK = r"blocks\.(?P<block>\d+)\."
ADAPTER = re.compile(
    rf"{BLOCK}(?P<which>adapter|adapter_attn)\.(bottleneck\.(?P<layer>1|4)\.{LEAF}|norm_a\.(?P<norm>weight|bias)|(?P<scale>scaling))"
)
OURS = re.compile(r"blocks\.\d+\.adapter(_attn)?\.(bottleneck|norm_a|scaling)")
HEAD = re.compile(r"head\.(?P<leaf>weight|bias)")
BASE = (
    (rf"{BLOCK}norm1\.{LEAF}", "norm.attention"),
    (rf"{BLOCK}norm2\.{LEAF}", "norm.mlp"),
    (rf"{BLOCK}attn\.qkv\.{LEAF}", "attention.qkv"),
    (rf"{BLOCK}attn\.proj\.{LEAF}", "attention.output"),
    (rf"{BLOCK}mlp\.fc1\.{LEAF}", "mlp.up"),
    (rf"{BLOCK}mlp\.fc2\.{LEAF}", "mlp.down"),
    (rf"patch_embed\.proj\.{LEAF}", "patch"),
    (r"cls_token", "cls"),
    (r"pos_embed", "positions"),
    (rf"norm\.{LEAF}", "norm.final"),
)
NAMES = {"1": "module.down", "4": "module.up"}
ROLES = {"adapter": "mlp", "adapter_attn": "attention"}


@dataclass(frozen=True)
class Published:
    """What the file does not tell; the defaults are those of Adapter+.

    ``placement`` of a single adapter: on the stream after the feed-forward ("post", to which that code's "pfeiffer" is
    equal), or on the feed-forward's output ("intermediate").  ``scale`` where the file holds none.
    """

    placement: Placement = "post"
    scale: float = 1.0
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        expect_one_of("placement", self.placement, get_args(Placement))


def load(
    model: nn.Module, path: Path | str, name: str = "default", options: Published | None = None, trainable: bool = False
) -> Adapter:
    """As ``epitaxy.load``, with what the file does not tell given in ``options``."""
    adapter = put_on(model, read(Path(path), options or Published()), name, "adapter_plus")
    adapter.trainable = trainable
    return adapter


def recognises(path: Path) -> bool:
    """Whether ``path`` is such a file, told from its keys."""
    return holds(path, OURS)


def inspect(path: Path) -> Contents:
    """Tell what the file holds, without a model."""
    return contents(read(path, Published()), "adapter_plus")


def read(path: Path, options: Published) -> Reading:
    """Sort the tensors of one file and work the scales into the matrices."""
    reading, rest = Reading(path), dict[str, Tensor]()
    for key, value in plain_state(path).items():
        short = key.removeprefix("model.")
        if found := ADAPTER.fullmatch(short):
            name = f"{NAMES[found['layer']]}.{found['leaf']}" if found["layer"] else f"module.norm.{found['norm']}"
            place = (ROLES[found["which"]], int(found["block"]))
            reading.add(place, "scaling" if found["scale"] else name, key, value)
        elif found := HEAD.fullmatch(short):
            reading.head[found["leaf"]] = Named(key, value)
        else:
            rest[short] = value
    match_base(reading, rest, BASE)
    shapes = reading.alike(["module.down.weight", "module.up.weight"])
    for held in reading.parts.values():
        _work_in(path, held)
    houlsby = any(role == "attention" for role, _ in reading.parts)
    fields: dict[str, Any] = {"at": ("attention", "mlp")} if houlsby else {}
    reading.method = Bottleneck(
        bottleneck=int(shapes["module.down.weight"].shape[0]),
        order="sequential",
        reads="sublayer" if houlsby or options.placement == "intermediate" else "stream",
        norm="layer" if "module.norm.weight" in shapes else "none",
        scale=1.0 if "scaling" in shapes else options.scale,
        activation=options.activation,
        **fields,
    )
    return reading


def _work_in(path: Path, held: dict[str, Named]) -> None:
    """One adapter's scale, of all channels or of each, worked into its last map; biases it has not are 0."""
    down, up = held["module.down.weight"], held["module.up.weight"]
    for name, weight in (("module.down.bias", down), ("module.up.bias", up)):
        held.setdefault(name, Named(weight.key, torch.zeros(weight.value.shape[0], dtype=weight.value.dtype)))
    if "scaling" not in held:
        return
    scale = held.pop("scaling")
    if scale.value.numel() not in (1, up.value.shape[0]):
        raise FormatError(
            f"{path}: {scale.key!r} has shape {tuple(scale.value.shape)}, expected 1 or {up.value.shape[0]} numbers"
        )
    held["module.up.weight"] = Named(up.key, scale.value.reshape(-1, 1) * up.value)
    bias = held["module.up.bias"]
    held["module.up.bias"] = Named(bias.key, scale.value.reshape(-1) * bias.value)


register_format(
    Format(
        "adapter_plus",
        recognises,
        lambda model, path, name: put_on(model, read(path, Published()), name, "adapter_plus"),
        None,
        inspect,
    )
)

__all__ = ["Published", "inspect", "load", "read", "recognises"]
