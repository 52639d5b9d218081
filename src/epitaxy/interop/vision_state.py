"""State dicts of codes that adapt vision transformers: opened, and what they hold put on a model.

Such a file holds adapters, often a head, and often the frozen base beside them.  A format (``mosa``, ``adaptformer``,
``adapter_plus``) knows names; here is what they share: adapters go to blocks by number, the base is compared with the
model's by role, and a file that is not used up, or that is of another base, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter, Piece
from epitaxy.core.anatomy import Anatomy, describe
from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.core.files import Contents, fill
from epitaxy.core.host import attach, detach, hosted, unwrap
from epitaxy.core.layouts import SPECIAL_TOKENS
from epitaxy.core.registry import Composition, methods_in, to_config
from epitaxy.interop.peft_config import base_value
from epitaxy.interop.state_dicts import read_state
from epitaxy.methods.head import Head

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
INNER = ("model", "state_dict")  # where training codes keep the weights beside optimiser and epoch
TABLES = ("position_embeddings", "pos_embed")
Block = int | tuple[int, int]  # a number, or stage and number within the stage
Place = tuple[str, Block]  # role and block


@dataclass(frozen=True)
class Named:
    """One tensor and how its file calls it."""

    key: str
    value: Tensor


@dataclass
class Reading:
    """What one file says, under our names.

    ``parts`` holds the tensors of each place by their name inside a piece; ``head`` weight and bias; ``base`` what is
    not trained, as (role or name, block, leaf).
    """

    file: Path
    method: Any = None
    parts: dict[Place, dict[str, Named]] = field(default_factory=dict)
    head: dict[str, Named] = field(default_factory=dict)
    base: list[tuple[str, Block | None, str, Named]] = field(default_factory=list)

    def add(self, place: Place, name: str, key: str, value: Tensor) -> None:
        """File one tensor under ``name`` of ``place``; raises where two keys claim it."""
        held = self.parts.setdefault(place, {})
        if name in held:
            raise FormatError(f"{self.file}: {held[name].key!r} and {key!r} are the same tensor of one adapter")
        held[name] = Named(key, value)

    def alike(self, needed: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of the first place, after checking that every place has ``needed`` and equal sizes.

        Widths may differ between the stages of a pyramid, so there only the number of axes is compared.
        """
        first_place, first = next(iter(self.parts.items()))
        for place, held in self.parts.items():
            for name in needed:
                if name not in held:
                    there = next(iter(held.values())).key
                    raise FormatError(f"{self.file}: {there!r} is there, but not the {name} that belongs to it")
            for name, named in held.items():
                if name not in first:
                    raise FormatError(f"{self.file}: {named.key!r} is there, but the adapter of {first_place} has none")
                shape, other = tuple(named.value.shape), tuple(first[name].value.shape)
                same_stage = isinstance(place[1], int) or place[1][0] == first_place[1][0]  # type: ignore[index]
                if (shape != other) if same_stage else (len(shape) != len(other)):
                    raise FormatError(
                        f"{self.file}: {named.key!r} has shape {shape}, expected {other} as {first[name].key!r}"
                    )
        return {name: named.value for name, named in first.items()}


def plain_state(file: Path) -> dict[str, Tensor]:
    """The tensors of ``file`` by name, without the prefix of a data-parallel wrapper."""
    content = read_state(file, INNER)
    wrapped = all(key.startswith("module.") for key in content)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in content.items()}


def holds(path: Path, pattern: re.Pattern[str]) -> bool:
    """Whether ``path`` is a state dict with a key that ``pattern`` finds."""
    if not path.is_file() or path.suffix not in SUFFIXES:
        return False
    try:
        return any(pattern.search(key) for key in plain_state(path))
    except FormatError:
        return False


def contents(reading: Reading, format: str) -> Contents:
    """What ``inspect`` tells of a file."""
    shapes = {named.key: tuple(named.value.shape) for held in reading.parts.values() for named in held.values()}
    shapes |= {named.key: tuple(named.value.shape) for named in reading.head.values()}
    name = re.sub(r"[^A-Za-z0-9_\-]", "_", reading.file.resolve().stem).lstrip("-") or "default"
    methods = [entry for part in _methods(reading) for entry in to_config(part)]
    return Contents(reading.file, format, name, methods, {}, shapes, reading.file.stat().st_size)


def put_on(model: nn.Module, reading: Reading, name: str, format: str) -> Adapter:
    """Attach what was read and fill it; whatever does not fit leaves the model as it was."""
    model = unwrap(model)
    record = hosted(model)
    anatomy = record.anatomy if record is not None else describe(model)
    previous = record.state.active if record is not None else ()
    compare_base(model, anatomy, reading)
    numbers = {place: _number(reading, anatomy, place[1]) for place in reading.parts}
    if reading.method is not None:
        blocks, present = len(anatomy.spots("block")), sorted(set(numbers.values()))
        layers = None if present == list(range(blocks)) else tuple(present)
        reading = replace(reading, method=replace(reading.method, layers=layers))
    methods = _methods(reading)
    if not methods:
        raise FormatError(f"{reading.file}: holds no adapter and no head")
    try:
        adapter = attach(model, methods[0] if len(methods) == 1 else Composition(tuple(methods)), name)
    except EpitaxyError as error:
        raise type(error)(f"{reading.file}: {error}") from None
    try:
        fill(adapter, dict(_values(adapter, anatomy, reading, numbers)), str(reading.file))
    except EpitaxyError:
        detach(model, name)
        if record is not None:
            record.state.active = previous
        raise
    adapter.provenance = {"imported from": format}
    return adapter


def _methods(reading: Reading) -> list[Any]:
    found = [] if reading.method is None else methods_in(reading.method)
    if reading.head:
        weight = reading.head.get("weight")
        if weight is None or weight.value.dim() != 2 or "bias" not in reading.head:
            raise FormatError(f"{reading.file}: its head has no weight of two axes and a bias")
        found = [*found, Head(labels=int(weight.value.shape[0]))]
    return list(found)


def _number(reading: Reading, anatomy: Anatomy, block: Block) -> int:
    """The number of a block in the model."""
    spots = anatomy.spots("block")
    if isinstance(block, int):
        if block < len(spots):
            return block
    else:
        ending = f"layers.{block[0]}.blocks.{block[1]}"
        for number, spot in enumerate(spots):
            if f".{spot.path}".endswith(f".{ending}"):
                return number
    raise FormatError(
        f"{reading.file}: made for another base: it has a block {block}, this {anatomy.family} has {len(spots)} blocks"
    )


def _values(
    adapter: Adapter, anatomy: Anatomy, reading: Reading, numbers: Mapping[Place, int]
) -> Iterator[tuple[str, Tensor]]:
    by_number = {(role, numbers[role, block]): held for (role, block), held in reading.parts.items()}
    for piece in adapter.pieces:
        if piece.key is None:
            continue
        for name, named in _held(piece, anatomy, reading, by_number).items():
            yield f"{piece.key}.{name}", named.value


def _held(
    piece: Piece, anatomy: Anatomy, reading: Reading, by_number: Mapping[tuple[str, int], dict[str, Named]]
) -> dict[str, Named]:
    if piece.role == "head":
        return {f"linear.{leaf}": named for leaf, named in reading.head.items()}
    block = anatomy.block_of(piece.path)
    assert block is not None and block.layer is not None  # noqa: PT018
    return by_number.get((piece.role, block.layer), {})


def compare_base(model: nn.Module, anatomy: Anatomy, reading: Reading) -> None:
    """Raise ``FormatError`` where a tensor of the file's base is not the model's own."""
    for role, block, leaf, named in reading.base:
        here = _base_tensor(model, anatomy, role, None if block is None else _number(reading, anatomy, block), leaf)
        if here is None:
            raise FormatError(f"{reading.file}: {named.key!r} has no place in this {type(model).__name__}")
        if here.numel() != named.value.numel() or (here.dim() == named.value.dim() and here.shape != named.value.shape):
            raise FormatError(
                f"{reading.file}: made for another base: {named.key!r} has shape {tuple(named.value.shape)}, this "
                f"model's is {tuple(here.shape)}"
            )
        if not torch.equal(named.value.reshape(here.shape).to(here.dtype), here):
            raise FormatError(
                f"{reading.file}: made for another base, or the whole model was trained: {named.key!r} differs from "
                "this model's"
            )


def _base_tensor(model: nn.Module, anatomy: Anatomy, role: str, number: int | None, leaf: str) -> Tensor | None:
    if role == "cls":
        return _own(model, lambda name: name in SPECIAL_TOKENS[0])
    if role == "positions":
        return _own(model, lambda name: name in TABLES) if number is None else None
    if role.startswith("="):  # a path below a block, or of the whole model, by its ending
        root = "" if number is None else anatomy.spots("block")[number].path + "."
        ending = f".{role[1:]}" + (f".{leaf}" if leaf else "")
        return _own(model, None, root, ending)
    if role == "attention.qkv" and role not in anatomy.roles:
        thirds = [_base_tensor(model, anatomy, f"attention.{name}", number, leaf) for name in "qkv"]
        return None if any(third is None for third in thirds) else torch.cat([t for t in thirds if t is not None])
    spots = anatomy.roles.get(role, ())
    spot = next((spot for spot in spots if number is None or spot.layer == number), None)
    if spot is None or getattr(model.get_submodule(spot.path), leaf, None) is None:
        return None
    value = base_value(model, spot.path, leaf)
    if role in ("attention.q", "attention.k", "attention.v") and "attention.qkv" in anatomy.roles:
        value = value.chunk(3)[("attention.q", "attention.k", "attention.v").index(role)]
    return value


def _own(model: nn.Module, wanted: Callable[[str], bool] | None, root: str = "", ending: str = "") -> Tensor | None:
    """A parameter of the base by its last name, or by where it is and how its path ends."""
    for path, parameter in model.named_parameters():
        if ".epitaxy." in f".{path}":
            continue
        if wanted is None:
            if path.startswith(root) and f".{path}".endswith(ending):
                return parameter.detach()
        elif wanted(path.rpartition(".")[2]):
            return parameter.detach()
    return None


def match_base(reading: Reading, tensors: Mapping[str, Tensor], table: Sequence[tuple[str, str]]) -> None:
    """Sort what is left of a file by ``table`` of (pattern, role); raises for a name that is in none.

    Groups ``stage``, ``block`` and ``leaf`` of a pattern tell where; the role "" is a constant and is passed over; a
    role "=ending" is not a role but the ending of a parameter's path.
    """
    for key, value in tensors.items():
        for pattern, role in table:
            found = re.fullmatch(pattern, key)
            if found is None:
                continue
            groups = found.groupdict()
            block: Block | None = None
            if groups.get("block") is not None:
                block = int(groups["block"])
                if groups.get("stage") is not None:
                    block = (int(groups["stage"]), block)
            if role:
                reading.base.append((found.expand(role), block, groups.get("leaf") or "", Named(key, value)))
            break
        else:
            raise FormatError(f"{reading.file}: {key!r} is no name that this format knows")


__all__ = [
    "Block",
    "Named",
    "Place",
    "Reading",
    "compare_base",
    "contents",
    "holds",
    "match_base",
    "plain_state",
    "put_on",
]
