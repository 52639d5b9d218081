"""State dicts of other programs: safetensors, or pickles that hold plain tensors and nothing else."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from epitaxy.core.errors import FormatError
from epitaxy.core.storage import read_tensors


def read_state(file: Path, inner: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of ``file`` by name.

    ``inner`` are the keys under which a training code may keep the weights beside optimiser and epoch.  Raises
    ``FormatError`` for anything but names and tensors; nothing is unpickled.
    """
    if file.suffix == ".safetensors":
        return read_tensors(file)[0]
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        other = re.search(r"GLOBAL ([\w.]+)", str(error))
        if inner and other and isinstance(error, pickle.UnpicklingError):
            raise FormatError(
                f"{file}: holds {other[1]}, and nothing is unpickled; save the state dict alone, "
                f"torch.save(checkpoint[{inner[0]!r}], ...)"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{file}: not a readable file of plain tensors ({reason})") from None
    for name in inner:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise FormatError(f"{file}: expected a mapping of names to tensors")
    return content


__all__ = ["read_state"]
