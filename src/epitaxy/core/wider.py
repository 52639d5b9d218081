"""Wider feed-forwards in a model's own class: which number of its config holds their width, and what it can take.

The number is found by building the class, without memory for weights, from the config with one number changed: it is
the one that changes the shapes of feed-forwards and of nothing else.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from epitaxy.core.errors import UnsupportedError

WIDTHS = ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim")
RATIO = "mlp_ratio"


@dataclass(frozen=True)
class Width:
    """One feed-forward: the paths of its two linear maps, its width outside, its hidden units, how many it needs."""

    up: str
    down: str
    outer: int
    hidden: int
    needed: int


def widened(model: nn.Module, widths: Sequence[Width]) -> dict[str, int]:
    """The hidden units that every feed-forward must get, by the path of its first map; changes the model's config.

    A model without a config gets the same number everywhere that it had one number before, as a class with one number
    for all needs.  Raises ``UnsupportedError`` where no number of the config sets these widths alone.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        _refuse_inner_config(model)
        ratio = smallest_ratio(widths)
        return {width.up: int(ratio * width.outer) for width in widths}
    before = shapes(model, config)
    for parts, field in _numbers(config):
        trial = copy.deepcopy(config)
        value = getattr(_part(trial, parts), field)
        if not _set(trial, parts, field, value + 1):
            continue
        found = shapes(model, trial)
        changed = {key for key, shape in found.items() if before.get(key) != shape}
        group = [width for width in widths if f"{width.up}.weight" in changed]
        own = {f"{path}.{leaf}" for width in group for path, leaf in _sized(width)}
        if not group or changed - own or any(width.needed > width.hidden for width in widths if width not in group):
            continue
        _choose(config, parts, field, group)
        after = shapes(model, config)
        return {width.up: after[f"{width.up}.weight"][0] for width in group}
    raise UnsupportedError(
        f"no number in the config of {type(model).__name__} sets the width of its feed-forwards and nothing else, "
        f"expected one of {', '.join((*WIDTHS, RATIO))}"
    )


def shapes(model: nn.Module, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the state dict of the model's class, built from ``config`` without memory for weights."""
    kind: Any = type(model)
    try:
        with torch.device("meta"):
            built = kind(copy.deepcopy(config))
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedError(f"{kind.__name__} cannot be built from its config alone: {reason}") from None
    return {key: tuple(value.shape) for key, value in built.state_dict().items()}


def smallest_ratio(widths: Sequence[Width]) -> float:
    """The smallest ratio with ``int(ratio * outer) >= needed`` for all, as vision transformers round it."""
    ratio = max(width.needed / width.outer for width in widths)
    while any(int(ratio * width.outer) < width.needed for width in widths):
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _choose(config: Any, parts: tuple[str, ...], field: str, group: Sequence[Width]) -> None:
    if field != RATIO:
        _set(config, parts, field, max(width.needed for width in group))
        return
    ratio = smallest_ratio(group)
    if not _set(config, parts, field, ratio):  # a config that holds whole ratios only, such as DINOv2's
        _set(config, parts, field, math.ceil(ratio))
        warnings.warn(
            f"{type(config).__name__} holds whole numbers as {RATIO} only, so the feed-forwards get {math.ceil(ratio)} "
            f"times the width where {ratio:.4g} would do",
            stacklevel=5,
        )


def _numbers(config: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a config, or one inside it, has a number that may be a width: (attributes that lead there, name)."""
    inner = [(name,) for name, value in vars(config).items() if name != "config" and hasattr(value, "save_pretrained")]
    for parts in ((), *inner):
        for field in (*WIDTHS, RATIO):
            value = getattr(_part(config, parts), field, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield parts, field


def _part(config: Any, parts: tuple[str, ...]) -> Any:
    for name in parts:
        config = getattr(config, name)
    return config


def _set(config: Any, parts: tuple[str, ...], field: str, value: float) -> bool:
    """Set a number of a config; False where the config does not take it."""
    part = _part(config, parts)
    previous = getattr(part, field)
    try:
        setattr(part, field, value)
    except Exception:  # each config checks its fields in its own way
        setattr(part, field, previous)
        return False
    return True


def _sized(width: Width) -> Iterator[tuple[str, str]]:
    yield from ((width.up, "weight"), (width.up, "bias"), (width.down, "weight"))


def _refuse_inner_config(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if path and hasattr(getattr(module, "config", None), "save_pretrained"):
            raise UnsupportedError(
                f"{type(model).__name__} has no config, but its part {path!r} has one that would no longer be true; "
                "fold that part by itself"
            )


__all__ = ["Width", "smallest_ratio", "widened"]
