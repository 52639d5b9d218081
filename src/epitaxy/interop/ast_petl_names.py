"""Names in the state dicts of PETL-AST and Soft-MoA (2312.03694, 2402.00828): one entry for each method.

An ``Entry`` knows the method by its keys and builds our equal of it; ``links`` says for every tensor of an adapter
under which keys, and in which shape, those files hold it, so that reading and writing are one table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter, Piece
from epitaxy.core.edits import Branch, Delta, JointKV, PooledHead, Swap, Tokens
from epitaxy.core.errors import UnsupportedError
from epitaxy.methods.bottleneck import Bottleneck, TwoLayerMLP
from epitaxy.methods.conformer import Conformer, ConformerConvolution
from epitaxy.methods.convpass import ConvolutionalBypass, Convpass
from epitaxy.methods.dense_moa import DenseMixture, DenseMoA
from epitaxy.methods.lora import LoRA
from epitaxy.methods.mixture import Mixture
from epitaxy.methods.prefix import Prefix
from epitaxy.methods.prompt import Prompt
from epitaxy.methods.soft_moa import SoftMixture, SoftMoA

Side = Literal["attention", "mlp"]
LAYER = r"encoder\.layers?\.(?P<layer>\d+)\."
LETTERS = {"q": "attention.q", "k": "attention.k", "v": "attention.v", "o": "attention.output"}
SIDES: Mapping[str, Side] = {"MHSA": "attention", "FFN": "mlp"}
BOTTLENECK = {"down": "linear_downsample", "up": "linear_upsample"}
CONFORMER = {
    "norm": "lnorm",
    "pointwise_in": "pwise_conv1",
    "depthwise": "dwise_conv",
    "inner_norm": "bnorm",
    "pointwise_out": "pwise_conv2",
}
CONVPASS = {"down": "adapter_down", "conv": "adapter_conv", "up": "adapter_up"}
EXPERTS = {"bottleneck": BOTTLENECK, "convpass": CONVPASS}
HEAD = "classification_head"
PREFIXES = ("model.", "")  # the published classes hold the trunk twice
COUNTER = "bnorm.num_batches_tracked"


@dataclass(frozen=True)
class Published:
    """What names and shapes do not tell; the defaults are those of the published runs.

    ``lora_scale`` is alpha over the reduction rate (16 / 128 and 8 / 64 are both 0.125); ``order`` and ``residual``
    say how single adapters stand to their sub-layer; ``side`` is the sub-layer of an adapter or mixture whose keys do
    not say it (otherwise told from the norms that were trained); ``pool`` is what the head averages; ``dead_norm`` that
    a Conformer adapter computes its layer norm in vain, as on AST, ``dead_convolution`` that a Convpass adapter
    does so with its convolution, as everywhere.
    """

    pool: Literal["all", "cls", "patches", "prompts", "prompts+patches"] = "all"
    lora_scale: float = 0.125
    order: Literal["parallel", "sequential", "before"] = "parallel"
    residual: bool | None = None
    side: Side | None = None
    dead_norm: bool = True
    dead_convolution: bool = True


@dataclass
class Style:
    """How one file spells its keys, kept with the adapter so that it can be written the same way.

    ``upper``: letters of LoRA; ``single``: adapters and mixtures without their side; ``aliases``: which of the
    prefixes "model." and "" there are; ``batches``: what batch norms had counted.
    """

    upper: bool = False
    single: bool = False
    aliases: tuple[str, ...] = PREFIXES
    batches: int = 0


@dataclass(frozen=True)
class Entry:
    """One method: the pattern of its keys, and what builds our equal from the tensors there.

    ``side`` is where a single adapter sits whose keys do not say it and whose norms do not tell.
    """

    pattern: re.Pattern[str]
    build: Callable[[Mapping[str, Tensor], Published, Side], Any]
    side: Side = "mlp"


def _entry(pattern: str, build: Callable[[Mapping[str, Tensor], Published, Side], Any], side: Side = "mlp") -> Entry:
    return Entry(re.compile(pattern), build, side)


def _lora(found: Mapping[str, Tensor], options: Published, side: Side) -> LoRA:
    letters = {key.removesuffix(".weight")[-1].lower() for key in found}
    rank = next(int(value.shape[0]) for key, value in found.items() if "lora_down" in key)
    at = tuple(role for letter, role in LETTERS.items() if letter in letters)
    return LoRA(at=at, rank=rank, alpha=rank * options.lora_scale, legacy=True)


def _prefix(found: Mapping[str, Tensor], options: Published, side: Side) -> Prefix:
    return Prefix(tokens=int(next(iter(found.values())).shape[1]), init="vpt")


def _prompt(found: Mapping[str, Tensor], options: Published, side: Side) -> Prompt:
    tokens, deep = next(iter(found.values())).shape[1], any(key.startswith("deep") for key in found)
    return Prompt(tokens=int(tokens), deep=deep, init="vpt", drop_distillation=True)


def _places(found: Mapping[str, Tensor], side: Side) -> Any:
    """Where adapters or mixtures sit, by the side in their keys, else at ``side``."""
    named = [role for word, role in SIDES.items() if any(re.search(f"_{word}[.]", key, re.I) for key in found)]
    at = named or [side]
    return at[0] if len(at) == 1 else tuple(at)


def _bottleneck(found: Mapping[str, Tensor], options: Published, side: Side) -> Bottleneck:
    hidden = next(int(value.shape[0]) for key, value in found.items() if key.endswith("linear_downsample.weight"))
    return Bottleneck(
        at=_places(found, side),
        bottleneck=hidden,
        order=options.order,
        residual=options.residual if options.residual is not None else False,
        activation="gelu",
        init="legacy_normal",
    )


def _conformer(found: Mapping[str, Tensor], options: Published, side: Side) -> Conformer:
    shape = next(value.shape for key, value in found.items() if key.endswith("dwise_conv.weight"))
    return Conformer(
        at=_places(found, side),
        bottleneck=int(shape[0]),
        kernel=int(shape[2]),
        order=options.order,
        residual=options.residual if options.residual is not None else False,
        zero_init=False,
        legacy=options.dead_norm,
    )


def _convpass(found: Mapping[str, Tensor], options: Published, side: Side) -> Convpass:
    shape = next(value.shape for key, value in found.items() if key.endswith("adapter_conv.weight"))
    return Convpass(
        at=_places(found, side),
        bottleneck=int(shape[0]),
        kernel=int(shape[2]),
        dimensions=1,
        order=options.order,
        residual=options.residual if options.residual is not None else False,
        legacy=options.dead_convolution,
    )


def _mixture(found: Mapping[str, Tensor], options: Published, side: Side) -> DenseMoA | SoftMoA:
    numbers = {int(match[1]) for key in found if (match := re.search(r"\.moa\.(\d+)\.", key))}
    convpass = any("adapter_down" in key for key in found)
    ending = "adapter_down.weight" if convpass else "linear_downsample.weight"
    fields: dict[str, Any] = {
        "at": _places(found, side),
        "experts": len(numbers),
        "bottleneck": next(int(value.shape[0]) for key, value in found.items() if key.endswith(ending)),
        "expert": "convpass" if convpass else "bottleneck",
        "legacy": True,
    }
    slots = next((int(value.shape[2]) for key, value in found.items() if key.endswith("slot_params")), None)
    if slots is None:
        return DenseMoA(**fields)
    return SoftMoA(slots=slots, normalise=any(key.endswith(".scale") for key in found), **fields)


_LINEAR = r"\.(weight|bias)"
_EXPERT = rf"moa\.\d+\.(linear_(down|up)sample|adapter_(down|conv|up)){_LINEAR}"
_MODULE = LAYER + r"adapter_module(_FFN|_MHSA)?\."
ENTRIES: dict[str, Entry] = {
    "lora": _entry(
        LAYER + r"attention\.(attention\.lora_(down|up)_[qkvQKV]|output\.lora_(down|up)_[oO])\.weight", _lora
    ),
    "prefix": _entry(LAYER + r"attention\.attention\.(key|value)_tokens", _prefix),
    "prompt": _entry(r"(deep_)?prompt_embeddings", _prompt),
    "bottleneck": _entry(rf"{_MODULE}linear_(down|up)sample{_LINEAR}", _bottleneck),
    "conformer": _entry(
        rf"{_MODULE}((lnorm|pwise_conv[12]|dwise_conv|bnorm){_LINEAR}|bnorm\.(running_(mean|var)|num_batches_tracked))",
        _conformer,
    ),
    "convpass": _entry(rf"{_MODULE}adapter_(down|conv|up){_LINEAR}", _convpass),
    "mixture": _entry(
        rf"{LAYER}(moa(_mhsa|_ffn)?\.({_EXPERT}|slot_params|scale)|router(_mhsa|_ffn)?\.ff{_LINEAR})",
        _mixture,
        side="attention",
    ),
}


@dataclass(frozen=True)
class Link:
    """One tensor of ours and the keys it has there; ``join`` and ``split`` convert, in and out."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor] = field(default=lambda parts: parts[0])
    split: Callable[[Tensor], list[Tensor]] = field(default=lambda tensor: [tensor])


def links(adapter: Adapter, names: Mapping[str, str], style: Style) -> Iterator[Link]:
    """Where every tensor of ``adapter`` goes; ``names`` maps module paths to published names.

    Changes of norms and biases that are kept as differences have no tensor of their own there and are left out.
    Raises ``UnsupportedError`` naming a part that the published code has no equal of.
    """
    for piece in adapter.pieces:
        if piece.key is None or (isinstance(piece.module, Swap) and not piece.module.absolute):
            continue
        found = list(_links_of(piece, names, style))
        if not found:
            raise UnsupportedError(
                f"adapter {adapter.name!r} cannot be written for the code of PETL-AST: it has no equal of "
                f"{piece.part!r} ({type(piece.module).__name__} at {piece.path!r})"
            )
        yield from found


def _links_of(piece: Piece, names: Mapping[str, str], style: Style) -> Iterator[Link]:
    edit, key = piece.module, piece.key
    place = names.get(piece.path, "")
    layer = match[0] if (match := re.match(LAYER, place + ".")) else ""
    letter = next((letter for letter, role in LETTERS.items() if role == piece.role), None)
    if isinstance(edit, Delta) and layer and letter:
        letter = letter.upper() if style.upper else letter
        inside = "output" if letter in "oO" else "attention"
        for ours in ("down", "up"):
            yield Link(f"{key}.{ours}", (f"{layer}attention.{inside}.lora_{ours}_{letter}.weight",))
    elif isinstance(edit, JointKV) and layer:
        for ours, theirs in (("keys", "key_tokens"), ("values", "value_tokens")):
            yield Link(f"{key}.{ours}", (f"{layer}attention.attention.{theirs}",), _first, _with_first)
    elif isinstance(edit, Tokens):
        deep = ("deep_prompt_embeddings",) if edit.depth > 1 else ()
        yield Link(
            f"{key}.tokens", ("prompt_embeddings", *deep), torch.cat, lambda rows: [rows[:1], rows[1:]][: edit.depth]
        )
    elif isinstance(edit, PooledHead):
        for ours in ("weight", "bias"):
            yield Link(f"{key}.linear.{ours}", (f"{HEAD}.{ours}",))
    elif isinstance(edit, Swap) and place:
        for ours in edit.names:
            yield Link(f"{key}.{ours}", (f"{place}.{ours}",))
    elif isinstance(edit, Branch) and layer and piece.role in SIDES.values() and edit.scale == 1.0:
        yield from _branch_links(edit, f"{key}.module", layer, piece.role, style)


def _branch_links(edit: Branch, key: str, layer: str, role: str, style: Style) -> Iterator[Link]:
    module = edit.module
    word = next(word for word, side in SIDES.items() if side == role)
    adapter = f"{layer}adapter_module" + ("" if style.single else f"_{word}")
    if isinstance(module, TwoLayerMLP) and module.activation == "gelu":
        if edit.reads == "stream" or module.norm is not None or isinstance(edit.scale, nn.Parameter):
            return  # the published adapter has neither
        for ours, theirs in BOTTLENECK.items():
            for leaf in ("weight", "bias"):
                yield Link(f"{key}.{ours}.{leaf}", (f"{adapter}.{theirs}.{leaf}",))
    elif isinstance(module, ConvolutionalBypass) and module.grid is None:
        for ours, theirs in CONVPASS.items():
            for leaf in ("weight", "bias"):
                own = "convolution" if ours == "conv" else ours
                yield Link(f"{key}.{own}.{leaf}", (f"{adapter}.{theirs}.{leaf}",))
    elif isinstance(module, ConformerConvolution):
        for name, _ in module.state_dict().items():
            ours, _, leaf = name.rpartition(".")
            keys = (f"{adapter}.{CONFORMER[ours]}.{leaf}",)
            if ours.startswith("pointwise") and leaf == "weight":  # theirs is a convolution of width one
                yield Link(f"{key}.{name}", keys, lambda parts: parts[0].squeeze(-1), lambda t: [t.unsqueeze(-1)])
            else:
                yield Link(f"{key}.{name}", keys)
    elif isinstance(module, Mixture):
        suffix = "" if style.single else f"_{word.lower()}"
        yield from _mixture_links(module, key, f"{layer}moa{suffix}", f"{layer}router{suffix}")


def _mixture_links(module: Mixture, key: str, moa: str, router: str) -> Iterator[Link]:
    if isinstance(module, DenseMixture):
        yield Link(f"{key}.router", (f"{router}.ff.weight",))
        yield Link(f"{key}.router_bias", (f"{router}.ff.bias",))
    elif isinstance(module, SoftMixture):
        yield Link(f"{key}.phi", (f"{moa}.slot_params",))
        if module.normalise:
            yield Link(f"{key}.scale", (f"{moa}.scale",))
    for ours, theirs in EXPERTS[module.experts.kind].items():
        for leaf, ending in (("weight", ""), ("bias", "_bias")):
            keys = tuple(f"{moa}.moa.{expert}.{theirs}.{leaf}" for expert in range(module.experts.count))
            if (ours, leaf) == ("up", "weight"):
                yield Link(f"{key}.experts.up", keys, lambda parts: torch.stack(parts).mT, lambda t: list(t.mT))
            else:
                yield Link(f"{key}.experts.{ours}{ending}", keys, torch.stack, list)


def _first(parts: list[Tensor]) -> Tensor:
    return parts[0].squeeze(0)


def _with_first(tensor: Tensor) -> list[Tensor]:
    return [tensor.unsqueeze(0)]


__all__ = ["COUNTER", "ENTRIES", "Entry", "HEAD", "LAYER", "Link", "PREFIXES", "Published", "Side", "Style", "links"]
