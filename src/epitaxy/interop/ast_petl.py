"""State dicts of the code of PETL-AST and Soft-MoA, in and out: every method on AST, adapters on Wav2Vec2.

Such a file holds the whole model.  Its adapter tensors tell the method; of the base, norms and biases that differ
from the model's were trained, anything else that differs means another base.  Position tables are the exception: the
published code replaces them by zeros, so they are reported, not refused.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.anatomy import Anatomy, base_modules, describe, is_norm
from epitaxy.core.edits import Swap
from epitaxy.core.errors import EpitaxyError, FormatError, UnsupportedError, nearest
from epitaxy.core.files import (
    Contents,
    Format,
    fill,
    read_shapes,
    read_tensors,
    register_format,
    whole_tensors,
    write_atomically,
)
from epitaxy.core.host import attach, detach, hosted, require, unwrap
from epitaxy.core.registry import Composition, to_config
from epitaxy.interop.ast_petl_names import COUNTER, ENTRIES, HEAD, LAYER, Published, Side, Style, links
from epitaxy.interop.peft_config import base_value
from epitaxy.interop.peft_names import older_names
from epitaxy.interop.places import where
from epitaxy.methods.bitfit import BitFit
from epitaxy.methods.head import Head
from epitaxy.methods.norm_tuning import NormTuning

FILE = "ast_petl.pt"
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
PREFIXES = ("model.", "")
RENAMED = {  # parametrised by torch today
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


@dataclass
class Stored:
    """The tensors of one file, by key without prefix: of methods (by entry), of the head, of the base."""

    file: Path
    methods: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    style: Style = field(default_factory=Style)


@dataclass
class Trained:
    """Modules of the base whose own parameters a file changes, by path."""

    norms: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)


def load(
    model: nn.Module, path: Path | str, name: str = "default", options: Published | None = None, trainable: bool = False
) -> Adapter:
    """Put the adapter of an official state dict on ``model`` and make it the active one.

    ``options`` gives what the file does not tell; ``epitaxy.load`` takes the published settings.  Raises
    ``FormatError`` naming file and key, the model is then unchanged.
    """
    adapter = _read(unwrap(model), Path(path), name, options or Published())
    adapter.trainable = trainable
    return adapter


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def recognises(path: Path) -> bool:
    """Whether ``path`` is such a file, or a directory that we wrote one to; told from its keys."""
    file = _file(path)
    if not file.is_file() or file.suffix not in SUFFIXES:
        return False
    try:
        keys = [_short(key) for key in _shapes(file)]
    except FormatError:
        return False
    return any(key.startswith(f"{HEAD}.") or _entry_of(key) for key in keys)


def _shapes(file: Path) -> Mapping[str, tuple[int, ...]]:
    if file.suffix == ".safetensors":
        return read_shapes(file)[0]
    return {key: tuple(value.shape) for key, value in _tensors(file).items()}


def _tensors(file: Path) -> Mapping[str, Tensor]:
    """The tensors of ``file``; pickles may hold plain tensors and nothing else."""
    if file.suffix == ".safetensors":
        return read_tensors(file)[0]
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{file}: not a readable file of plain tensors ({reason})") from None
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise FormatError(f"{file}: expected a mapping of names to tensors")
    return content


def _short(key: str) -> str:
    return key.removeprefix(PREFIXES[0])


def _entry_of(key: str) -> str | None:
    return next((name for name, entry in ENTRIES.items() if entry.pattern.fullmatch(key)), None)


def _sort(tensors: Mapping[str, Tensor], file: Path) -> Stored:
    """Sort by short key; raises where the two names of one tensor hold different values."""
    stored, seen = Stored(file), dict[str, Tensor]()
    for key, value in tensors.items():
        short = _short(key)
        if short in seen:
            if not torch.equal(seen[short], value):
                raise FormatError(f"{file}: {key!r} and its other name hold different values")
            continue
        seen[short] = value
        entry = _entry_of(short)
        if entry is not None:
            stored.methods.setdefault(entry, {})[short] = value
        elif short.startswith(f"{HEAD}."):
            stored.head[short] = value
        else:
            stored.base[short] = value
    kept = [
        key for key in tensors if _short(key) not in stored.head and _short(key) not in stored.methods.get("prompt", {})
    ]
    prefixes = tuple(prefix for prefix in PREFIXES if any((key != _short(key)) == bool(prefix) for key in kept))
    own = [key for found in stored.methods.values() for key in found]
    stored.style = Style(
        upper=any(re.search(r"lora_\w+_[A-Z]\.", key) for key in own),
        single=any(re.match(LAYER + r"(adapter_module|moa|router)\.", key) for key in own),
        aliases=prefixes or PREFIXES,
        batches=next((int(value) for key, value in seen.items() if key.endswith(COUNTER)), 0),
    )
    return stored


def inspect(path: Path) -> Contents:
    """Tell what the file holds, without a model."""
    file = _file(path)
    stored = _sort(_tensors(file), file)
    methods = [to_config(_method(stored, name, Published(), None))[0] for name in stored.methods]
    if stored.head:
        methods += to_config(_head(stored, Published()))
    shapes = {
        key: tuple(value.shape) for part in (*stored.methods.values(), stored.head) for key, value in part.items()
    }
    name = re.sub(r"[^A-Za-z0-9_\-]", "_", (file.parent if path.is_dir() else file).resolve().stem).lstrip("-")
    return Contents(path, "ast_petl", name or "default", methods, {}, shapes, file.stat().st_size)


def _method(stored: Stored, name: str, options: Published, side: Side | None) -> Any:
    entry = ENTRIES[name]
    try:
        return entry.build(stored.methods[name], options, options.side or side or entry.side)
    except (StopIteration, IndexError):
        first = next(iter(stored.methods[name]))
        raise FormatError(f"{stored.file}: {first!r} is there, but not the tensors that belong to it") from None


def _head(stored: Stored, options: Published) -> Head:
    weight = stored.head.get(f"{HEAD}.weight")
    if weight is None or weight.dim() != 2:
        raise FormatError(f"{stored.file}: {HEAD}.weight is missing or no matrix")
    return Head(labels=int(weight.shape[0]), pool=options.pool, masked=False)


def _base_names(model: nn.Module) -> dict[str, str]:
    """Published name of every module of the trunk, by path."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    paths = [path for path in base_modules(model) if path]
    inner = {path: name for name, path in older_names(model, paths).items() if f"{path}.".startswith(f"{prefix}.")}
    return {path: name.removeprefix(prefix).removeprefix(".") for path, name in inner.items()}


def _base_tensors(model: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """(path, parameter or buffer) of everything in the trunk that a file holds, by published key."""
    found = {}
    for path, module in base_modules(model).items():
        for leaf in (
            *module._parameters,
            *(key for key in module._buffers if key not in module._non_persistent_buffers_set),
        ):
            full = f"{path}.{leaf}"
            new = next((old for old in RENAMED if full.endswith(old)), None)
            owner = path if new is None else full.removesuffix(f".{new}")
            if getattr(module, leaf) is not None and owner in names:
                key = f"{names[owner]}.{leaf if new is None else RENAMED[new]}"
                found[key.removeprefix(".")] = (path, leaf)
    return found


def _compare(model: nn.Module, anatomy: Anatomy, stored: Stored, known: Mapping[str, tuple[str, str]]) -> Trained:
    """Which norms and biases the file trained; raises where anything else of the base differs."""
    unknown = [key for key in stored.base if key not in known]
    if unknown:
        raise FormatError(
            f"{stored.file}: {len(unknown)} tensors have no place in this {type(model).__name__}, the first is "
            f"{unknown[0]!r}{nearest(unknown[0], known)}"
        )
    changed: dict[str, set[str]] = {}
    for key, value in stored.base.items():
        path, leaf = known[key]
        here = base_value(model, path, leaf)
        if key.endswith("position_embeddings"):
            _warn_of_positions(stored.file, value, here)
        elif value.shape != here.shape:
            raise FormatError(
                f"{stored.file}: made for another base: {key!r} has shape {tuple(value.shape)}, this model's is "
                f"{tuple(here.shape)}"
            )
        elif not torch.equal(value.to(here.dtype), here):
            changed.setdefault(path, set()).add(leaf)
    trained, modules = Trained(), base_modules(model)
    for path, leaves in changed.items():
        if is_norm(modules[path]) and ("weight" in leaves or path == anatomy.last):
            trained.norms.append(path)
        elif leaves == {"bias"}:
            trained.biases.append(path)
        else:
            raise FormatError(
                f"{stored.file}: made for another base, or the whole model was trained: {path}.{sorted(leaves)[-1]} "
                "differs, and only norms and biases can be read as trained"
            )
    return trained


def _warn_of_positions(file: Path, value: Tensor, here: Tensor) -> None:
    if value.shape == here.shape and torch.equal(value.to(here.dtype), here):
        return
    kind = "all zero, as the published code makes it" if not bool(value.any()) else f"of shape {tuple(value.shape)}"
    warnings.warn(
        f"{file}: trained with another position table ({kind}; this model's has shape {tuple(here.shape)}); "
        "outputs are those of the run only with that table",
        stacklevel=6,
    )


def _side(anatomy: Anatomy, trained: Trained) -> Side | None:
    """The sub-layer whose norms were trained, where it is only one."""
    sides: tuple[Side, ...] = ("attention", "mlp")
    told = [
        side for side in sides if {spot.path for spot in anatomy.roles.get(f"norm.{side}", ())} & set(trained.norms)
    ]
    return told[0] if len(told) == 1 else None


def _read(model: nn.Module, path: Path, name: str, options: Published) -> Adapter:
    file = _file(path)
    stored = _sort(_tensors(file), file)
    record = hosted(model)
    anatomy = record.anatomy if record is not None else describe(model)
    previous = record.state.active if record is not None else ()
    names = _base_names(model)
    known = _base_tensors(model, names)
    trained = _compare(model, anatomy, stored, known)
    parts = [_method(stored, entry, options, _side(anatomy, trained)) for entry in stored.methods]
    for paths, make in ((trained.norms, NormTuning), (trained.biases, BitFit)):
        if paths:
            at, layers = where(model, anatomy, paths)
            parts.append(make(at=at, legacy=True, layers=layers))
    if stored.head:
        parts.append(_head(stored, options))
    if not parts:
        raise FormatError(f"{file}: holds nothing that differs from this model")
    try:
        adapter = attach(model, parts[0] if len(parts) == 1 else Composition(tuple(parts)), name)
    except EpitaxyError as error:
        raise type(error)(f"{file}: {error}") from None
    try:
        fill(adapter, _values(adapter, names, stored), str(file))
    except EpitaxyError:
        detach(model, name)
        if record is not None:
            record.state.active = previous
        raise
    adapter.provenance = {"imported from": "ast_petl", "official": asdict(stored.style)}
    return adapter


def _values(adapter: Adapter, names: Mapping[str, str], stored: Stored) -> dict[str, Tensor]:
    """The file's tensors under our keys; raises on any that is left over or missing."""
    waiting = {**stored.head, **{key: value for found in stored.methods.values() for key, value in found.items()}}
    values: dict[str, Tensor] = {}
    for link in links(adapter, names, stored.style):
        parts = [waiting.pop(key, stored.base.get(key)) for key in link.theirs]
        missing = [key for key, part in zip(link.theirs, parts, strict=True) if part is None]
        if missing:
            raise FormatError(f"{stored.file}: {missing[0]!r} is missing")
        try:
            values[link.ours] = link.join([part for part in parts if part is not None])
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise FormatError(
                f"{stored.file}: {link.theirs[0]!r} and its like do not fit together ({reason})"
            ) from None
    left = [key for key in waiting if not key.endswith(COUNTER)]
    if left:
        raise FormatError(f"{stored.file}: {len(left)} tensors have no place here, the first is {left[0]!r}")
    return values


def _write(model: nn.Module, target: Path, name: str) -> None:
    """Write the whole state dict that the published code loads, as ``ast_petl.pt`` in the directory ``target``."""
    if target.exists() and not target.is_dir():
        raise FormatError(f"{target}: expected a directory to save into, found a file")
    adapter = require(model, name).adapters[name]
    tensors = official(model, adapter)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomically(target / FILE, buffer.getvalue())
    again = _tensors(target / FILE)
    if again.keys() != tensors.keys() or any(not torch.equal(again[key], tensors[key]) for key in tensors):
        raise FormatError(f"{target / FILE}: what was written does not read back; the disk may be full or failing")


def official(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The state dict of the published model class with this adapter: base, adapter, head, under both prefixes.

    Raises ``UnsupportedError`` naming what that code has no equal of.  The LoRA scale is not part of it.
    """
    names = _base_names(model)
    style = _style(adapter)
    trunk = {key: base_value(model, path, leaf) for key, (path, leaf) in _base_tensors(model, names).items()}
    own, top = dict[str, Tensor](), dict[str, Tensor]()
    values = whole_tensors(adapter)
    for link in links(adapter, names, style):
        for key, part in zip(link.theirs, link.split(values[link.ours]), strict=True):
            (top if key.startswith(HEAD) or ENTRIES["prompt"].pattern.fullmatch(key) else own)[key] = part.contiguous()
    for piece in adapter.pieces:
        if isinstance(piece.module, Swap) and not piece.module.absolute and piece.path in names:
            merged = piece.module.merged(model.get_submodule(piece.path))
            own.update({f"{names[piece.path]}.{leaf}": value.detach().cpu() for leaf, value in merged.items()})
    if f"{HEAD}.weight" not in top:
        raise UnsupportedError(
            f"adapter {adapter.name!r} cannot be written for the code of PETL-AST: it has no head that pools; "
            "add Head(pool='all')"
        )
    counters = {
        key.replace("bnorm.weight", COUNTER): torch.tensor(style.batches) for key in own if "bnorm.weight" in key
    }
    trunk.update(own | counters)
    return {f"{prefix}{key}": value for prefix in style.aliases for key, value in trunk.items()} | top


def _style(adapter: Adapter) -> Style:
    """How to spell the keys: as in the file the adapter came from, else as the published main classes do."""
    given = adapter.provenance.get("official")
    if isinstance(given, dict) and given.keys() == asdict(Style()).keys():
        return Style(**{**given, "aliases": tuple(given["aliases"])})
    roles = {piece.role for piece in adapter.pieces if piece.part.startswith("lora")}
    mixed = {piece.role for piece in adapter.pieces if piece.part.startswith(("dense_moa", "soft_moa")) and piece.key}
    prompts = any(piece.part.startswith("prompt") for piece in adapter.pieces)
    return Style(
        upper=not roles <= {"attention.q", "attention.v"},
        single=len(mixed) == 1,
        aliases=("",) if prompts else PREFIXES,
    )


register_format(
    Format("ast_petl", recognises, lambda model, path, name: _read(model, path, name, Published()), _write, inspect)
)

__all__ = ["FILE", "Published", "inspect", "load", "official", "recognises"]
