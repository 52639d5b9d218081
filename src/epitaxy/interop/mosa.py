"""State dicts of the released code of MoSA (2312.02923), read as the plain adapter that its copies merge to.

That code keeps N full-size copies of every split projection (``adapter_up.0``, ``adapter_up.1``, ...), which their mean
replaces at evaluation, beside ``adapter_up_merge``, the mean as it was at the end of the last epoch.  Read are its
AdaptFormer, Pfeiffer and Houlsby adapters and its LoRA on ViT, its adapters on Swin, and its head; the base beside them
must be the model's own.  What is read is saved like any adapter, so there is no writing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import FormatError, expect_one_of
from epitaxy.core.files import Contents, Format, register_format
from epitaxy.interop.vision_state import Block, Named, Reading, contents, holds, match_base, plain_state, put_on
from epitaxy.methods.bottleneck import Activation, Bottleneck
from epitaxy.methods.lora import LoRA

Placement = Literal["adaptformer", "pfeiffer"]
Merge = Literal["mean", "joint"]
VIT = r"enc\.transformer\.encoder\.layer\.(?P<block>\d+)\."
SWIN = r"enc\.layers\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\."
COPY = r"(\.(?P<copy>\d+)|(?P<merged>_merge))?"
TENSOR = rf"adapter_((?P<name>norm|down|up)(?P<side>_attn|_ffn)?{COPY}\.(?P<leaf>weight|bias)|(?P<scale>scale))"
ADAPTERS = (re.compile(VIT + TENSOR), re.compile(rf"{SWIN}mlp\.{TENSOR}"))
LORA = re.compile(rf"{VIT}attn\.lora_(?P<factor>A|B)_(?P<letter>q|k|v|o){COPY}\.weight")
OURS = re.compile(r"enc\..*\.(adapter_(norm|down|up|scale)|lora_[AB]_[qkvo])")
HEAD = re.compile(r"head\.last_layer\.(?P<leaf>weight|bias)")
LEAF = r"(?P<leaf>weight|bias)"
BASE = (
    (rf"{VIT}attention_norm\.{LEAF}", "norm.attention"),
    (rf"{VIT}ffn_norm\.{LEAF}", "norm.mlp"),
    (rf"{VIT}ffn\.fc1\.{LEAF}", "mlp.up"),
    (rf"{VIT}ffn\.fc2\.{LEAF}", "mlp.down"),
    (rf"{VIT}attn\.query\.{LEAF}", "attention.q"),
    (rf"{VIT}attn\.key\.{LEAF}", "attention.k"),
    (rf"{VIT}attn\.value\.{LEAF}", "attention.v"),
    (rf"{VIT}attn\.out\.{LEAF}", "attention.output"),
    (rf"enc\.transformer\.encoder\.encoder_norm\.{LEAF}", "norm.final"),
    (rf"enc\.transformer\.embeddings\.patch_embeddings\.{LEAF}", "patch"),
    (r"enc\.transformer\.embeddings\.cls_token", "cls"),
    (r"enc\.transformer\.embeddings\.position_embeddings", "positions"),
    (rf"{SWIN}norm1\.{LEAF}", "norm.attention"),
    (rf"{SWIN}norm2\.{LEAF}", "norm.mlp"),
    (rf"{SWIN}mlp\.fc1\.{LEAF}", "mlp.up"),
    (rf"{SWIN}mlp\.fc2\.{LEAF}", "mlp.down"),
    (rf"{SWIN}attn\.qkv\.{LEAF}", "attention.qkv"),
    (rf"{SWIN}attn\.proj\.{LEAF}", "attention.output"),
    (rf"{SWIN}attn\.relative_position_bias_table", "=relative_position_bias_table"),
    (rf"{SWIN}(attn\.relative_position_index|attn_mask)", ""),
    (rf"enc\.layers\.(?P<at>\d+)\.downsample\.(?P<what>norm|reduction)\.{LEAF}", r"=layers.\g<at>.downsample.\g<what>"),
    (rf"enc\.patch_embed\.proj\.{LEAF}", "patch"),
    (rf"enc\.patch_embed\.norm\.{LEAF}", "=embeddings.norm"),
    (rf"enc\.norm\.{LEAF}", "norm.final"),
)
SIDES = {"_attn": "attention", "_ffn": "mlp"}
LETTERS = {"q": "attention.q", "k": "attention.k", "v": "attention.v", "o": "attention.output"}


@dataclass(frozen=True)
class Published:
    """What names and shapes do not tell; the defaults are those of the published runs.

    ``placement`` of an adapter with a norm on ViT: its names are the same beside the feed-forward ("adaptformer") and
    after it ("pfeiffer").  ``scale`` of adapters beside it and of LoRA (``lora_scale``); a learned one is in the file.
    ``activation`` is by default that of the code: GELU beside the feed-forward where there are copies and ReLU where
    there are none, ReLU after it, SiLU for Houlsby.  ``merge="joint"`` takes the stored ``_merge`` tensors as they are:
    of that code's other merge mode only they are known, its division of the last bias by N included.
    """

    placement: Placement = "adaptformer"
    scale: float = 0.1
    lora_scale: float = 1.0
    activation: Activation | None = None
    merge: Merge = "mean"

    def __post_init__(self) -> None:
        expect_one_of("placement", self.placement, get_args(Placement))
        expect_one_of("merge", self.merge, get_args(Merge))


def load(
    model: nn.Module, path: Path | str, name: str = "default", options: Published | None = None, trainable: bool = False
) -> Adapter:
    """Put the adapter of an official state dict on ``model`` and make it the active one.

    ``options`` gives what the file does not tell; ``epitaxy.load`` takes the published settings.  Raises
    ``FormatError`` naming file and key, the model is then unchanged.
    """
    adapter = put_on(model, read(Path(path), options or Published()), name, "mosa")
    adapter.trainable = trainable
    return adapter


def recognises(path: Path) -> bool:
    """Whether ``path`` is such a file, told from its keys."""
    return holds(path, OURS)


def inspect(path: Path) -> Contents:
    """Tell what the file holds, without a model."""
    return contents(read(path, Published()), "mosa")


@dataclass
class Copies:
    """All tensors of one projection's weight or bias."""

    plain: Named | None = None
    merged: Named | None = None
    numbered: dict[int, Named] = field(default_factory=dict)

    def resolved(self, file: Path, merge: Merge) -> Named:
        """The one tensor they stand for."""
        if self.plain is not None:
            if self.numbered or self.merged:
                raise FormatError(f"{file}: {self.plain.key!r} is there beside copies of it")
            return self.plain
        if merge == "joint" or not self.numbered:
            if self.merged is None:
                first = next(iter(self.numbered.values())).key
                raise FormatError(f"{file}: merge 'joint' needs the merged tensor of {first!r}, which is not there")
            return self.merged
        return self._mean(file)

    def _mean(self, file: Path) -> Named:
        numbers = sorted(self.numbered)
        first = self.numbered[numbers[0]]
        if numbers != list(range(len(numbers))):
            lacking = next(number for number in range(len(numbers) + 1) if number not in numbers)
            raise FormatError(f"{file}: copy {lacking} is missing beside {first.key!r}")
        for named in self.numbered.values():
            if named.value.shape != first.value.shape:
                raise FormatError(
                    f"{file}: {named.key!r} has shape {tuple(named.value.shape)}, expected "
                    f"{tuple(first.value.shape)} as its other copies"
                )
        mean = torch.stack([self.numbered[number].value.double() for number in numbers]).mean(0)
        return Named(first.key, mean.to(first.value.dtype))


def read(path: Path, options: Published) -> Reading:
    """Sort the tensors of one file and average the copies."""
    reading, rest = Reading(path), dict[str, Tensor]()
    adapters: dict[tuple[tuple[str, Block], str], Copies] = {}
    loras: dict[tuple[tuple[str, Block], str], Copies] = {}
    houlsby = False
    for key, value in plain_state(path).items():
        if found := ADAPTERS[0].fullmatch(key) or ADAPTERS[1].fullmatch(key):
            houlsby = houlsby or found["side"] is not None
            place = (SIDES.get(found["side"] or "", "mlp"), _block(found))
            name = "scale" if found["scale"] else f"module.{found['name']}.{found['leaf']}"
            _add(adapters.setdefault((place, name), Copies()), found, Named(key, value))
        elif found := LORA.fullmatch(key):
            place = (LETTERS[found["letter"]], _block(found))
            _add(
                loras.setdefault((place, "down" if found["factor"] == "A" else "up"), Copies()),
                found,
                Named(key, value),
            )
        elif found := HEAD.fullmatch(key):
            reading.head[found["leaf"]] = Named(key, value)
        else:
            rest[key] = value
    if adapters and loras:
        raise FormatError(f"{path}: holds adapters and LoRA at once, which that code never trains together")
    match_base(reading, rest, BASE)
    for (place, name), copies in (adapters or loras).items():
        named = copies.resolved(path, options.merge)
        reading.add(place, name, named.key, named.value)
    split = any(copies.plain is None for copies in (adapters or loras).values())
    if adapters:
        reading.method = _bottleneck(reading, options, houlsby, split)
    elif loras:
        reading.method = _lora(reading, options, split)
    return reading


def _block(found: re.Match[str]) -> Block:
    groups = found.groupdict()
    return int(groups["block"]) if groups.get("stage") is None else (int(groups["stage"]), int(groups["block"]))


def _add(copies: Copies, found: re.Match[str], named: Named) -> None:
    groups = found.groupdict()
    if groups["copy"] is not None:
        copies.numbered[int(groups["copy"])] = named
    elif groups["merged"]:
        copies.merged = named
    else:
        copies.plain = named


def _bottleneck(reading: Reading, options: Published, houlsby: bool, split: bool) -> Bottleneck:
    first = next(iter(reading.parts.values()))
    normed = any("module.norm.weight" in held for held in reading.parts.values())
    needed = ["module.down.weight", "module.down.bias", "module.up.weight", "module.up.bias"]
    shapes = reading.alike(needed + ["module.norm.weight", "module.norm.bias"] * normed)
    fields: dict[str, Any] = {"bottleneck": int(shapes["module.down.weight"].shape[0])}
    in_windows = isinstance(next(iter(reading.parts))[1], tuple)
    if not normed and not houlsby and not in_windows:
        raise FormatError(f"{reading.file}: {next(iter(first.values())).key!r} is there, but not the norm before it")
    scale: Any = "learned" if "scale" in first else options.scale
    if houlsby:
        roles = {role for role, _ in reading.parts}
        at: Any = "mlp" if roles == {"mlp"} else "attention" if roles == {"attention"} else ("attention", "mlp")
        fields |= {"at": at, "order": "sequential", "reads": "stream", "activation": "silu"}
    elif options.placement == "pfeiffer" and not in_windows:
        fields |= {"order": "sequential", "norm": "layer", "activation": "relu"}
    else:
        fields |= {"scale": scale, "activation": "gelu" if split else "relu", "dropout": 0.1}
        fields |= {} if in_windows else {"norm": "layer", "reads": "stream"}
    if options.activation is not None:
        fields["activation"] = options.activation
    return Bottleneck(**fields)


def _lora(reading: Reading, options: Published, split: bool) -> LoRA:
    roles = {role for role, _ in reading.parts}
    if split and "attention.output" in roles:
        key = next(
            named.key
            for (role, _), held in reading.parts.items()
            if role == "attention.output"
            for named in held.values()
        )
        raise FormatError(
            f"{reading.file}: {key!r} belongs to a LoRA that the released code feeds with the attention's input, not "
            "its context, so that it changes no weight"
        )
    for role in roles:
        Reading(reading.file, parts={p: held for p, held in reading.parts.items() if p[0] == role}).alike(
            ["down", "up"]
        )
    ranks = {int(held["down"].value.shape[0]) for held in reading.parts.values()}
    if len(ranks) != 1:
        raise FormatError(f"{reading.file}: expected one rank in all blocks, found {sorted(ranks)}")
    rank = ranks.pop()
    return LoRA(
        at=tuple(role for role in LETTERS.values() if role in roles), rank=rank, alpha=rank * options.lora_scale
    )


register_format(
    Format(
        "mosa",
        recognises,
        lambda model, path, name: put_on(model, read(path, Published()), name, "mosa"),
        None,
        inspect,
    )
)

__all__ = ["Published", "inspect", "load", "read", "recognises"]
