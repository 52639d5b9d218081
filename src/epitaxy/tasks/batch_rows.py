"""Rows of a batch: the first few of them, or all of them twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epitaxy.core.errors import EpitaxyError


def count(batch: Mapping[str, Any]) -> int:
    """Examples in a batch: the length of its ``labels``, or else of its first tensor."""
    tensors = [value for value in (batch.get("labels"), *batch.values()) if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise EpitaxyError(f"the batch holds no tensors, only {', '.join(batch) or 'nothing'}")
    return len(tensors[0])


def first(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The first ``rows`` examples; what has not one row for each example (or window of one) stays as it is."""
    total = count(batch)
    ends = {total: rows}
    if "windows" in batch:  # then an example has several rows of inputs
        ends.setdefault(int(batch["windows"].sum()), int(batch["windows"][:rows].sum()))
    return {key: value[: ends[len(value)]] if _by_rows(value, ends) else value for key, value in batch.items()}


def doubled(batch: Mapping[str, Any]) -> dict[str, Any]:
    """All examples, and then all of them again."""
    sizes = {count(batch), int(batch["windows"].sum()) if "windows" in batch else 0}
    return {key: _twice(value) if _by_rows(value, sizes) else value for key, value in batch.items()}


def _by_rows(value: Any, sizes: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) in sizes
    return isinstance(value, (list, tuple)) and len(value) in sizes


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) else value + value
