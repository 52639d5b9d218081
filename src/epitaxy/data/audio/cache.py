"""Features on disk: computed once for each content and setting, whatever the file is called."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epitaxy.core.errors import EpitaxyError
from epitaxy.core.storage import write_atomically

SUFFIX = ".features"
RENEW = 3600  # seconds after which reading an entry marks it as used again
KEPT = 0.8  # share of the limit that is left of the entries when a full cache is opened


class FeatureCache:
    """A directory of features, ``folder/ab/<key>.features``, each a safetensors file with a digest of its values.

    An entry that is cut off or changed is computed again.  A directory above ``limit`` bytes loses the entries that
    were unused for the longest when it is opened; one that fills up takes no new ones, since features are read in
    rounds, in which the oldest entry is the next one needed.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder).expanduser(), limit
        if self.folder.exists() and not self.folder.is_dir():
            raise EpitaxyError(f"{self.folder}: expected a directory for the cache of features, found a file")
        self.size = trim(self.folder, limit)

    def find(self, content: str, settings: Mapping[str, Any]) -> Tensor | None:
        """The features (``frames mels``, float32) of what has the digest ``content``; None when they are not there."""
        return _read(self._path(content, settings))

    def keep(self, content: str, settings: Mapping[str, Any], features: Tensor) -> None:
        """Store ``features``, while there is room."""
        data = _packed(features)
        if self.size + len(data) <= self.limit:
            write_atomically(self._path(content, settings), data)
            self.size += len(data)

    def _path(self, content: str, settings: Mapping[str, Any]) -> Path:
        key = hashlib.blake2b(json.dumps([content, settings], sort_keys=True).encode(), digest_size=20).hexdigest()
        return self.folder / key[:2] / (key + SUFFIX)


def trim(folder: Path, limit: int) -> int:
    """Remove the entries unused for the longest until ``folder`` is within its limit; the bytes that remain."""
    entries = []
    for path in folder.glob(f"*/*{SUFFIX}"):
        with suppress(FileNotFoundError):  # another process may trim too
            state = path.stat()
            entries.append((state.st_mtime, state.st_size, path))
    size = sum(entry[1] for entry in entries)
    if size > limit:
        for _, bytes_, path in sorted(entries):
            if size <= KEPT * limit:
                break
            with suppress(FileNotFoundError):
                path.unlink()
            size -= bytes_
    return size


def _packed(features: Tensor) -> bytes:
    from safetensors.numpy import save

    values = np.ascontiguousarray(features.numpy())
    return save({"features": values, "digest": _digest(values)})


def _digest(values: Any) -> Any:
    return np.frombuffer(hashlib.blake2b(values.tobytes(), digest_size=16).digest(), np.uint8)


def _read(path: Path) -> Tensor | None:
    """The features in ``path``; None when it is missing or not what was written."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        entry = load(path.read_bytes())
        values = entry["features"]
        if values.dtype != np.float32 or values.ndim != 2 or not np.array_equal(entry["digest"], _digest(values)):
            return None
        if time.time() - path.stat().st_mtime > RENEW:
            os.utime(path)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return torch.from_numpy(values.copy())
