"""Module names in PEFT files, where an older transformers, or a model with or without its head, named them otherwise.

An adapter for ``encoder.layer.0.attention.attention.query`` fits what is ``layers.0.attention.q_proj`` today.
transformers keeps a table of such renamings for its own checkpoints; the same table serves here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from epitaxy.core.anatomy import base_modules
from epitaxy.core.errors import FormatError, nearest


def names_in_file(model: nn.Module, wanted: Iterable[str], source: str) -> dict[str, str]:
    """Return {name in the file: module path in ``model``} for the one naming in which every ``wanted`` name exists.

    Raises ``FormatError`` naming the first name that no naming explains, and the nearest modules.
    """
    paths = [path for path in base_modules(model) if path]
    needed = sorted(set(wanted))
    best: list[str] = needed
    for naming in _namings(model, paths):
        unknown = [name for name in needed if name not in naming]
        if not unknown:
            return naming
        if len(unknown) < len(best):
            best = unknown
    raise FormatError(
        f"{source}: made for another base model: {len(best)} of its {len(needed)} modules do not exist in this "
        f"{type(model).__name__}, the first is {best[0]!r}{nearest(best[0], paths)}"
    )


def _namings(model: nn.Module, paths: list[str]) -> Iterable[dict[str, str]]:
    plain = {path: path for path in paths}
    older = older_names(model, paths)
    head = getattr(model, "base_model_prefix", "")
    for naming in (plain, older):
        yield naming
        if head and isinstance(head, str):
            yield {f"{head}.{name}": path for name, path in naming.items()}
            yield {name.removeprefix(f"{head}."): path for name, path in naming.items()}


def older_names(model: nn.Module, paths: list[str]) -> dict[str, str]:
    """Names that transformers 4 gave the modules, where transformers knows them; otherwise today's."""
    renamings = _renamings(model)
    names: dict[str, str] = {}
    for path in paths:
        key = f"{path}.weight"
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        names.setdefault(key.removesuffix(".weight"), path)
    return names


def _renamings(model: nn.Module) -> list[Any]:
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    if not isinstance(model, PreTrainedModel):
        return []
    table = get_model_conversion_mapping(model, add_legacy=False)
    return [entry.reverse_transform() for entry in reversed(table) if isinstance(entry, WeightRenaming)]


__all__ = ["names_in_file", "older_names"]
