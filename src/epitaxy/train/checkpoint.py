"""Checkpoints: one safetensors file each, whose header holds everything that is no tensor.

One file means one atomic replacement: a checkpoint is there whole or not at all.  The one before is removed only
then.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from epitaxy.core.errors import FormatError
from epitaxy.core.storage import read_tensors, writing

SCHEMA = 1
FOLDER, PATTERN = "checkpoints", "step-*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``step`` optimiser steps: named tensors, and facts that JSON can hold."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below ``prefix/``."""
        start = prefix + "/"
        return {key.removeprefix(start): tensor for key, tensor in self.tensors.items() if key.startswith(start)}


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write ``checkpoint`` into ``folder`` and, once it is safely there, remove the older ones."""
    path = folder / f"step-{checkpoint.step:08d}.safetensors"
    write_tensors(path, checkpoint.tensors, {"schema": SCHEMA, "step": checkpoint.step, **checkpoint.facts})
    for other in folder.glob(PATTERN):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``, or None.  What a killed run left beside it is cleared away."""
    for draft in folder.glob(".*.draft"):
        draft.unlink(missing_ok=True)
    found = sorted(folder.glob(PATTERN))
    for older in found[:-1]:
        older.unlink(missing_ok=True)
    return found[-1] if found else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; raises ``FormatError`` naming the file when it is damaged or from a newer version."""
    tensors, metadata = read_tensors(path)
    try:
        facts = json.loads(metadata["facts"])
        schema, step = int(facts["schema"]), int(facts["step"])
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"{path}: not a checkpoint of epitaxy (its header has no readable facts)") from None
    if schema > SCHEMA:
        raise FormatError(f"{path}: a checkpoint of schema {schema}, this version reads up to {SCHEMA}")
    return Checkpoint(step, tensors, facts)


def remove_checkpoints(folder: Path) -> None:
    """Forget every earlier state of a run."""
    for pattern in (PATTERN, ".*.draft"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically: beside the target, flushed to disk, then moved into place."""
    from safetensors.torch import save_file

    own = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".draft")
        os.close(handle)
        try:
            save_file(own, draft, {"facts": json.dumps(facts)})
            os.chmod(draft, 0o644)
            _flush(Path(draft))
            os.replace(draft, path)
            _flush(path.parent)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(draft)
            raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
