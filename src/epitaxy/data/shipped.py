"""The small data sets shipped with the package, checked against their digests and read inside their archives."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from epitaxy.core.errors import EpitaxyError, FormatError, nearest

PREFIX = "builtin:"


def shipped_names() -> tuple[str, ...]:
    """Names that can follow ``builtin:``."""
    return tuple(sorted(name.removesuffix(".zip") for name in _index()))


def shipped_card(name: str) -> dict[str, Any]:
    """What is known of a shipped set: title, source, licence, classes, counts."""
    entry = _index().get(f"{name}.zip")
    if entry is None:
        raise EpitaxyError(f"no shipped data set is called {name!r}{nearest(name, shipped_names())}")
    return dict(entry)


def shipped_archive(name: str) -> Path:
    """Path of the archive of a shipped set; raises ``FormatError`` when it is missing or not what was shipped."""
    expected = str(shipped_card(name)["sha256"])
    path = _folder() / f"{name}.zip"
    if not path.is_file():
        raise FormatError(f"{path}: missing from this installation of epitaxy")
    state = path.stat()
    found = _digest(str(path), state.st_mtime_ns, state.st_size)
    if found != expected:
        raise FormatError(f"{path}: its sha256 is {found[:16]}..., expected {expected[:16]}...; install epitaxy anew")
    return path


def _folder() -> Path:
    return Path(str(files("epitaxy.data") / "shipped"))


def _index() -> dict[str, Any]:
    index = json.loads((_folder() / "index.json").read_text(encoding="utf-8"))
    assert isinstance(index, dict)
    return index


@lru_cache(maxsize=16)
def _digest(path: str, modified: int, size: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
