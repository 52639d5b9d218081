"""One state dict of the code of PETL-AST: opened, and its tensors sorted into methods, head and base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from epitaxy.core.errors import FormatError
from epitaxy.core.storage import read_shapes
from epitaxy.interop.ast_petl_names import COUNTER, ENTRIES, HEAD, LAYER, PREFIXES, Style
from epitaxy.interop.state_dicts import read_state

FILE = "ast_petl.pt"


@dataclass
class Stored:
    """The tensors of one file, by key without prefix: of methods (by entry), of the head, of the base."""

    file: Path
    methods: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    style: Style = field(default_factory=Style)


def state_file(path: Path) -> Path:
    """The file itself, of a directory the one that we write."""
    return path / FILE if path.is_dir() else path


def state_shapes(file: Path) -> Mapping[str, tuple[int, ...]]:
    """Shapes by key."""
    if file.suffix == ".safetensors":
        return read_shapes(file)[0]
    return {key: tuple(value.shape) for key, value in read_state(file).items()}


def short(key: str) -> str:
    """The key without the prefix under which the published classes hold the trunk a second time."""
    return key.removeprefix(PREFIXES[0])


def entry_of(key: str) -> str | None:
    """Name of the method that a short key belongs to."""
    return next((name for name, entry in ENTRIES.items() if entry.pattern.fullmatch(key)), None)


def sort(tensors: Mapping[str, Tensor], file: Path) -> Stored:
    """Sort by short key; raises where the two names of one tensor hold different values."""
    stored, seen = Stored(file), dict[str, Tensor]()
    for key, value in tensors.items():
        name = short(key)
        if name in seen:
            if not torch.equal(seen[name], value):
                raise FormatError(f"{file}: {key!r} and its other name hold different values")
            continue
        seen[name] = value
        entry = entry_of(name)
        if entry is not None:
            stored.methods.setdefault(entry, {})[name] = value
        elif name.startswith(f"{HEAD}."):
            stored.head[name] = value
        else:
            stored.base[name] = value
    kept = [
        key for key in tensors if short(key) not in stored.head and short(key) not in stored.methods.get("prompt", {})
    ]
    prefixes = tuple(prefix for prefix in PREFIXES if any((key != short(key)) == bool(prefix) for key in kept))
    own = [key for found in stored.methods.values() for key in found]
    stored.style = Style(
        upper=any(re.search(r"lora_\w+_[A-Z]\.", key) for key in own),
        single=any(re.match(LAYER + r"(adapter_module|moa|router)\.", key) for key in own),
        aliases=prefixes or PREFIXES,
        batches=next((int(value) for key, value in seen.items() if key.endswith(COUNTER)), 0),
    )
    return stored


__all__ = ["FILE", "Stored", "entry_of", "short", "sort", "state_file", "state_shapes"]
