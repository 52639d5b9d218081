"""Adapters on disk: a directory with ``adapter.safetensors``, ``adapter.json`` and a model card.

The tensor file carries the whole config in its header, so one atomic replacement of it is a complete save; the JSON
file repeats it for people.  Loading is strict: every tensor is used, every place filled, the base checked, and a
file that does not pass leaves the model as it was.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import EpitaxyError, FormatError, StateError, nearest
from epitaxy.core.fingerprint import check_base, fingerprint
from epitaxy.core.host import attach, detach, hosted, require, require_one, unwrap
from epitaxy.core.layouts import Layout
from epitaxy.core.registry import from_config
from epitaxy.core.storage import read_shapes, read_tensors, write_atomically

SCHEMA = 1
MARK = "epitaxy"  # the one entry of the header: several would be written in an order that differs from run to run
TENSORS, CONFIG, CARD = "adapter.safetensors", "adapter.json", "README.md"


@dataclass(frozen=True)
class Format:
    """A file format: how to recognise, read, write and inspect it."""

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[nn.Module, Path, str], Adapter]
    write: Callable[[nn.Module, Path, str], None] | None
    inspect: Callable[[Path], Contents]


@dataclass(frozen=True)
class Contents:
    """What a file holds, read without a model."""

    path: Path
    format: str
    name: str
    methods: list[dict[str, Any]]
    base: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    bytes: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def __str__(self) -> str:
        methods = "\n".join(
            "  " + ", ".join(f"{key}={value}" for key, value in method.items()) for method in self.methods
        )
        base = ", ".join(f"{key} {value}" for key, value in self.base.items() if value)
        return (
            f"{self.path}: {self.format} adapter {self.name!r}\n{methods}\n  base: {base}\n"
            f"  {len(self.shapes)} tensors, {self.parameters:,} values, {self.bytes:,} bytes"
        )


_FORMATS: dict[str, Format] = {}


def register_format(entry: Format) -> None:
    """Add a format; later ones are asked first."""
    _FORMATS[entry.name] = entry


def formats() -> dict[str, Format]:
    """Every known format by name."""
    return dict(_FORMATS)


def format_named(name: str) -> Format:
    """The format called ``name``."""
    if name not in _FORMATS:
        raise EpitaxyError(f"no format is called {name!r}{nearest(name, _FORMATS)}")
    return _FORMATS[name]


def recognise(path: Path) -> Format:
    """The format of what lies at ``path``; raises ``FormatError`` when it is none we read."""
    if not path.exists():
        raise FormatError(f"{path}: no such file or directory")
    for entry in reversed(_FORMATS.values()):
        if entry.recognises(path):
            return entry
    found = ", ".join(sorted(item.name for item in path.iterdir())[:8]) if path.is_dir() else path.name
    raise FormatError(f"{path}: not an adapter in a known format ({', '.join(_FORMATS)}); found {found or 'nothing'}")


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None, format: str = "epitaxy") -> Path:
    """Write one adapter of ``model`` to the directory ``path``; ``format`` may name another program's format.

    What is written is read back and compared before this returns.  With FSDP every rank calls this and the first one
    writes.  Returns the directory.
    """
    target = Path(path)
    record, name = require_one(model, name, "save")
    entry = format_named(format)
    if entry.write is None:
        raise EpitaxyError(f"format {format!r} can be read but not written")
    sharded = any(isinstance(tensor, DTensor) for tensor in record.adapters[name].tensors().values())
    for key, tensor in whole_tensors(record.adapters[name]).items():
        if tensor.numel() == 0:
            raise StateError(f"adapter {name!r} is not saved: {key} is empty here; gather sharded parameters first")
        if not bool(torch.isfinite(tensor).all()):
            raise StateError(f"adapter {name!r} is not saved: {key} holds NaN or infinite values")
    if not sharded or torch.distributed.get_rank() == 0:
        entry.write(unwrap(model), target, name)
    else:  # gathering takes every rank through the same calls; only the first one's files stay
        with tempfile.TemporaryDirectory() as discarded:
            entry.write(unwrap(model), Path(discarded), name)
    return target


def whole_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, shards gathered: with FSDP every rank must take part in this call."""
    return {
        key: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous().cpu()
        for key, tensor in adapter.tensors().items()
    }


def load(model: nn.Module, path: str | os.PathLike[str], name: str | None = None, trainable: bool = False) -> Adapter:
    """Read an adapter from ``path``, whatever its format, put it on ``model`` and make it the active one.

    ``name`` defaults to the one in the file.  Raises ``FormatError`` naming the file and what is wrong with it; the
    model is then unchanged.  A loaded adapter is frozen unless ``trainable``.
    """
    source = Path(path)
    entry = recognise(source)
    adapter = entry.read(unwrap(model), source, name or entry.inspect(source).name)
    adapter.trainable = trainable
    return adapter


def inspect(path: str | os.PathLike[str]) -> Contents:
    """Tell what adapter lies at ``path`` without loading a model."""
    source = Path(path)
    return recognise(source).inspect(source)


def _tensor_file(path: Path) -> Path:
    file = path / TENSORS if path.is_dir() else path
    if not file.exists():
        raise FormatError(f"{path}: {CONFIG} is there but {TENSORS} is missing")
    return file


def _recognises(path: Path) -> bool:
    if path.is_dir():
        return (path / TENSORS).exists() or (path / CONFIG).exists()
    return path.name == TENSORS


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    shapes, metadata = read_shapes(path)
    if MARK not in metadata:
        raise FormatError(f"{path}: a safetensors file that is not from epitaxy (its header has no {MARK!r})")
    try:
        config = json.loads(metadata[MARK])
        schema = int(config["schema"])
        if schema < 1:
            raise ValueError("schemas count from 1")
        missing = [key for key in ("name", "methods", "base") if key not in config]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise FormatError(f"{path}: its header has no readable config") from None
    if schema > SCHEMA:
        raise FormatError(f"{path}: written in schema {schema} by a newer epitaxy; this one reads up to {SCHEMA}")
    if missing:
        raise FormatError(f"{path}: its config lacks {', '.join(missing)}")
    kinds: dict[str, type] = {"name": str, "methods": list, "base": dict, "provenance": dict, "layout": dict}
    for key, kind in kinds.items():
        if not isinstance(config.get(key, kind()), kind):
            raise FormatError(f"{path}: {key!r} in its config should be a {kind.__name__}, found {config[key]!r}")
    if not all(isinstance(entry, dict) for entry in config["methods"]):
        raise FormatError(f"{path}: 'methods' in its config should be a list of mappings, found {config['methods']!r}")
    return shapes, config


def _inspect(path: Path) -> Contents:
    file = _tensor_file(path)
    shapes, config = _header(file)
    return Contents(
        path,
        "epitaxy",
        config["name"],
        config["methods"],
        config["base"],
        shapes,
        file.stat().st_size,
        config.get("provenance", {}),
    )


def _write(model: nn.Module, target: Path, name: str) -> None:
    from safetensors.torch import save as serialise

    from epitaxy.core.card import render
    from epitaxy.version import __version__

    record = require(model, name)
    adapter = record.adapters[name]
    if target.exists() and not target.is_dir():
        raise FormatError(f"{target}: expected a directory to save into, found a file")
    config = {
        "schema": SCHEMA,
        "name": name,
        "methods": adapter.config,
        "base": fingerprint(model).to_dict(),
        **({"layout": record.layout.to_dict()} if record.layout is not None else {}),
        "provenance": {**adapter.provenance, "epitaxy": __version__, "torch": torch.__version__},
    }
    card = _card_to_replace(target, name)
    text = json.dumps(config, sort_keys=True)
    tensors = whole_tensors(adapter)
    write_atomically(target / TENSORS, serialise(tensors, {MARK: text}))
    write_atomically(target / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    if card:
        values = sum(tensor.numel() for tensor in tensors.values())
        write_atomically(target / CARD, render(json.loads(text), values).encode())
    again, _ = read_tensors(target / TENSORS)
    if again.keys() != tensors.keys() or any(not torch.equal(again[key], tensors[key]) for key in tensors):
        raise FormatError(f"{target / TENSORS}: what was written does not read back; the disk may be full or failing")


def _card_to_replace(target: Path, name: str) -> bool:
    """Whether the model card may be written: there is none, or it is ours and nobody edited it.

    Raises when the directory holds an adapter of another name, which a save would destroy.
    """
    from epitaxy.core.card import render

    if (target / TENSORS).exists():
        shapes, config = _header(target / TENSORS)
        if config["name"] != name:
            raise FormatError(
                f"{target}: holds the adapter {config['name']!r}; save {name!r} elsewhere or delete that one"
            )
        parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
        if (target / CARD).exists():
            return (target / CARD).read_text() == render(config, parameters)
    return not (target / CARD).exists()


def _read(model: nn.Module, path: Path, name: str) -> Adapter:
    file = _tensor_file(path)
    _, config = _header(file)
    tensors, _ = read_tensors(file)
    warning = check_base(config["base"], fingerprint(model), str(file))
    layout = _layout(config, file)
    try:
        method = from_config(config["methods"])
    except EpitaxyError as error:
        raise FormatError(f"{file}: {error}") from None
    record = hosted(model)
    previous = record.state.active if record is not None else ()
    try:
        adapter = attach(model, method, name, layout)
    except EpitaxyError as error:
        raise type(error)(f"{file}: {error}") from None
    except (RuntimeError, MemoryError) as error:  # sizes that no memory holds
        raise FormatError(
            f"{file}: its methods cannot be built ({str(error).splitlines()[0].split('. ')[0]})"
        ) from None
    try:
        fill(adapter, tensors, str(file))
    except EpitaxyError:
        detach(model, name)
        if record is not None:
            record.state.active = previous
        raise
    adapter.provenance = dict(config.get("provenance", {}))
    if warning:
        warnings.warn(warning, stacklevel=4)
    return adapter


def _layout(config: Mapping[str, Any], file: Path) -> Layout | None:
    """The description of the model's blocks that the adapter was placed with, where its user had to give one."""
    if config.get("layout") is None:
        return None
    try:
        return Layout.from_dict(config["layout"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FormatError(f"{file}: its config holds a layout that cannot be read") from None


def fill(adapter: Adapter, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into an adapter: every tensor used, every place filled, shapes equal, values finite."""
    places = adapter.tensors()
    missing, extra = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    if missing:
        raise FormatError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
    if extra:
        raise FormatError(f"{source}: {len(extra)} tensors have no place in this adapter, the first is {extra[0]!r}")
    for key, place in places.items():
        if tensors[key].shape != place.shape:
            raise FormatError(
                f"{source}: {key!r} has shape {tuple(tensors[key].shape)}, this model needs {tuple(place.shape)}"
            )
        if torch.is_floating_point(tensors[key]) != torch.is_floating_point(place):
            raise FormatError(f"{source}: {key!r} is of type {tensors[key].dtype}, this model needs {place.dtype}")
        if not bool(torch.isfinite(tensors[key].to(place.dtype)).all()):
            raise FormatError(f"{source}: {key!r} holds NaN or infinite values")
    for key, place in places.items():
        place.copy_(tensors[key])
    for piece in adapter.pieces:
        for module in piece.module.modules():
            check = getattr(module, "check_filled", None)
            if callable(check):
                check(source)


register_format(Format("epitaxy", _recognises, _read, _write, _inspect))
