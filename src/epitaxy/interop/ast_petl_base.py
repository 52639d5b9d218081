"""The base in a state dict of the code of PETL-AST: its names there, and what a file trained of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from epitaxy.core.anatomy import Anatomy, base_modules
from epitaxy.core.errors import FormatError, nearest
from epitaxy.core.kinds import is_norm
from epitaxy.interop.ast_petl_names import Side
from epitaxy.interop.ast_petl_state import Stored
from epitaxy.interop.peft_config import base_value
from epitaxy.interop.peft_names import older_names

RENAMED = {  # parametrised by torch today
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


@dataclass
class Trained:
    """Modules of the base whose own parameters a file changes, by path."""

    norms: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)


def base_names(model: nn.Module) -> dict[str, str]:
    """Published name of every module of the trunk, by path."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    paths = [path for path in base_modules(model) if path]
    inner = {path: name for name, path in older_names(model, paths).items() if f"{path}.".startswith(f"{prefix}.")}
    return {path: name.removeprefix(prefix).removeprefix(".") for path, name in inner.items()}


def base_tensors(model: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
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


def compare(model: nn.Module, anatomy: Anatomy, stored: Stored, known: Mapping[str, tuple[str, str]]) -> Trained:
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


def trained_side(anatomy: Anatomy, trained: Trained) -> Side | None:
    """The sub-layer whose norms were trained, where it is only one."""
    sides: tuple[Side, ...] = ("attention", "mlp")
    told = [
        side for side in sides if {spot.path for spot in anatomy.roles.get(f"norm.{side}", ())} & set(trained.norms)
    ]
    return told[0] if len(told) == 1 else None


__all__ = ["Trained", "base_names", "base_tensors", "compare", "trained_side"]
