"""State dicts of the code of PETL-AST and Soft-MoA, in and out: every method on AST, adapters on Wav2Vec2.

Such a file holds the whole model.  Its adapter tensors tell the method; of the base, norms and biases that differ
from the model's were trained, anything else that differs means another base.  Position tables are the exception: the
published code replaces them by zeros, so they are reported, not refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.anatomy import describe
from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.core.files import Contents, Format, fill, register_format
from epitaxy.core.host import attach, detach, hosted, unwrap
from epitaxy.core.registry import Composition, to_config
from epitaxy.interop.ast_petl_base import base_names, base_tensors, compare, trained_side
from epitaxy.interop.ast_petl_names import COUNTER, ENTRIES, HEAD, Published, Side, links
from epitaxy.interop.ast_petl_state import FILE, Stored, entry_of, short, sort, state_file, state_shapes
from epitaxy.interop.ast_petl_write import official, write
from epitaxy.interop.places import where
from epitaxy.interop.state_dicts import read_state
from epitaxy.methods.bitfit import BitFit
from epitaxy.methods.head import Head
from epitaxy.methods.norm_tuning import NormTuning

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


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


def recognises(path: Path) -> bool:
    """Whether ``path`` is such a file, or a directory that we wrote one to; told from its keys."""
    file = state_file(path)
    if not file.is_file() or file.suffix not in SUFFIXES:
        return False
    try:
        keys = [short(key) for key in state_shapes(file)]
    except FormatError:
        return False
    return any(key.startswith(f"{HEAD}.") or entry_of(key) for key in keys)


def inspect(path: Path) -> Contents:
    """Tell what the file holds, without a model."""
    file = state_file(path)
    stored = sort(read_state(file), file)
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


def _read(model: nn.Module, path: Path, name: str, options: Published) -> Adapter:
    file = state_file(path)
    stored = sort(read_state(file), file)
    record = hosted(model)
    anatomy = record.anatomy if record is not None else describe(model)
    previous = record.state.active if record is not None else ()
    names = base_names(model)
    known = base_tensors(model, names)
    trained = compare(model, anatomy, stored, known)
    parts = [_method(stored, entry, options, trained_side(anatomy, trained)) for entry in stored.methods]
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


register_format(
    Format("ast_petl", recognises, lambda model, path, name: _read(model, path, name, Published()), write, inspect)
)

__all__ = ["FILE", "Published", "inspect", "load", "official", "recognises"]
