"""The rows of a batch with learned tokens in front: how many, which ones each row sees, what masks become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from epitaxy.core.edits.edit import Arguments, cast
from epitaxy.core.route import Route

if TYPE_CHECKING:
    from epitaxy.core.edits.tokens import Tokens


def total(edits: Mapping[int, Tokens], route: Route | None) -> int:
    counts = [edit.count for edit in edits.values()]
    return sum(counts) if route is None else max(counts)


def _dropping(edits: Mapping[int, Tokens], route: Route | None) -> tuple[bool, ...]:
    """Whether each row is without the distillation token; one entry for all rows where there is no route."""
    if route is None:
        return (any(edit.dropped is not None for edit in edits.values()),)
    return tuple(number in edits and edits[number].dropped is not None for number in route.numbers)


def gone(edits: Mapping[int, Tokens], route: Route | None) -> int | None:
    """Place of the distillation token in the model's own sequence when no row has it, so that it can leave."""
    if not all(_dropping(edits, route)):
        return None
    return next(edit.dropped for edit in edits.values() if edit.dropped is not None)


def hiding(edits: Mapping[int, Tokens], route: Route | None, batch: int, device: torch.device) -> Tensor | None:
    """The rows, ``b``, that only may not see the distillation token because other rows need it; None without any."""
    rows = _dropping(edits, route)
    if route is None or all(rows) or not any(rows):
        return None
    numbers = [number in edits and edits[number].dropped is not None for number in range(len(route.names) + 1)]
    return torch.tensor(numbers, device=device)[route.expanded(batch, device)]


def special_tokens(edits: Mapping[int, Tokens], route: Route | None, special: int) -> int:
    """How many of the model's ``special`` tokens are in the sequence."""
    return special if not edits or gone(edits, route) is None else special - 1


def leading(edits: Mapping[int, Tokens], route: Route | None, batch: int, device: torch.device) -> Tensor | None:
    """Which tokens at the start of the sequence each row sees, ``b tokens``; None when every row sees all."""
    seen, hidden = visible(edits, route, batch, device), hiding(edits, route, batch, device)
    if hidden is None:
        return seen
    place = next(edit.dropped for edit in edits.values() if edit.dropped is not None)
    before = torch.ones(batch, place + (total(edits, route) if seen is None else 0), dtype=torch.bool, device=device)
    return torch.cat([*([] if seen is None else [seen]), before, ~hidden[:, None]], dim=1)


def gather(
    edits: Mapping[int, Tokens],
    route: Route | None,
    layer: int,
    batch: int,
    like: Tensor,
    carried: Tensor | None = None,
) -> Tensor:
    """Tokens of every row, ``b tokens width``.

    Without a route all edits apply to every row, one after the other.  Rows with fewer tokens are padded at the left.
    Edits without tokens for this layer keep their part of ``carried``, the tokens as the last block left them.
    """
    if route is None:
        parts, start = [], 0
        for edit in edits.values():
            if layer < edit.depth:
                parts.append(cast(edit.tokens[layer], like).expand(batch, -1, -1))
            elif carried is not None:
                parts.append(carried[:, start : start + edit.count])
            start += edit.count
        return torch.cat(parts, dim=1)
    index = route.expanded(batch, like.device)
    longest = max(edit.count for edit in edits.values())
    rows, renewed = [], []
    for number in range(len(route.names) + 1):
        routed = edits.get(number)
        fresh = routed is not None and layer < routed.depth
        own = cast(routed.tokens[layer], like) if routed is not None and fresh else like.new_zeros(0, like.shape[-1])
        rows.append(F.pad(own, (0, 0, longest - own.shape[0], 0)))
        renewed.append(fresh)
    tokens = torch.stack(rows)[index]
    if carried is not None and not all(renewed):
        tokens = torch.where(torch.tensor(renewed, device=like.device)[index][:, None, None], tokens, carried)
    return tokens


def visible(edits: Mapping[int, Tokens], route: Route | None, batch: int, device: torch.device) -> Tensor | None:
    """Which of the leading tokens of each row are real, ``b tokens``; None when all are."""
    if route is None:
        return None
    longest = max(edit.count for edit in edits.values())
    counts = [edits[number].count if number in edits else 0 for number in range(len(route.names) + 1)]
    if all(counts[number] == longest for number in route.numbers):
        return None
    real = [[position >= longest - count for position in range(longest)] for count in counts]
    return torch.tensor(real, device=device)[route.expanded(batch, device)]


def fit_mask(call: Arguments, count: int, place: int | None) -> Arguments:
    """The call of a block with its mask made for the sequence with tokens."""
    args, kwargs = call
    if "attention_mask" in kwargs:
        return args, {**kwargs, "attention_mask": widen(_without(kwargs["attention_mask"], place), count)}
    if len(args) > 1 and isinstance(args[1], Tensor):
        return (args[0], widen(_without(args[1], place), count), *args[2:]), kwargs
    return call


def _without(mask: Tensor | None, place: int | None) -> Tensor | None:
    """The mask of a sequence that lacks the token at ``place``."""
    if mask is None or place is None:
        return mask
    mask = torch.cat([mask[..., :place], mask[..., place + 1 :]], dim=-1)
    if mask.dim() == 4 and mask.shape[-2] > 1:
        mask = torch.cat([mask[..., :place, :], mask[..., place + 1 :, :]], dim=-2)
    return mask


def widen(mask: Tensor | None, count: int) -> Tensor | None:
    """An encoder's mask for ``count`` more visible tokens at the start, in keys and, where it has them, queries."""
    if mask is None:
        return None
    visible = 1.0 if mask.dtype in (torch.bool, torch.long, torch.int) or mask.dim() == 2 else 0.0
    mask = F.pad(mask, (count, 0), value=visible)
    if mask.dim() == 4 and mask.shape[-2] > 1:
        mask = torch.cat([mask[..., :1, :].expand(*mask.shape[:-2], count, -1), mask], dim=-2)
    return mask
