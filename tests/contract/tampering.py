"""Adapter files with one thing wrong each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def header(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(file, framework="pt") as stream:
        return dict(stream.metadata())


def tampered(source: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """(what is wrong, directory) for copies of the adapter saved in ``source``."""
    tensors = load_file(source / "adapter.safetensors")
    first = sorted(tensors)[0]
    changes: dict[str, dict[str, Tensor]] = {
        "missing": {key: tensor for key, tensor in tensors.items() if key != first},
        "extra": {**tensors, "lora.nowhere.0.down": torch.zeros(2)},
        "shape": {**tensors, first: torch.zeros(*tensors[first].shape, 2)},
        "nan": {**tensors, first: torch.full_like(tensors[first], float("nan"))},
    }
    for what, changed in changes.items():
        target = scratch / what
        shutil.copytree(source, target)
        save_file(changed, target / "adapter.safetensors", header(source / "adapter.safetensors"))
        yield what, target
