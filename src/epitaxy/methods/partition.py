"""Partitions: every element of a tensor belongs to exactly one of N parts.

MoSA (2312.02923) cuts a projection by ranks of random scores; here ranks are those of a stable sort of integers, so
that no element has two owners and none is without.  Part ``i`` owns the ranks ``[floor(i n / N), floor((i+1) n / N))``.

Scores and initial values come from Philox (Salmon et al., SC 2011) keyed by the seed and the place: a counter-based
generator whose raw words are the same on every machine, so an adapter's file need not hold what they determine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import SiteError

Partition = Literal["element", "row", "column", "out_slice", "rank_slice"]
MOST = 256  # owners are uint8


def bounds(size: int, parts: int) -> list[int]:
    """``floor(i size / parts)`` for ``i`` from 0 to ``parts``; raises ``SiteError`` for more parts than elements."""
    if not 1 <= parts <= min(size, MOST):
        raise SiteError(f"parts: expected 1 to {min(size, MOST)} parts of {size} elements, found {parts}")
    return [index * size // parts for index in range(parts + 1)]


def owners_of(scores: Tensor, parts: int, partition: Partition = "element") -> Tensor:
    """The owner of every element, uint8 of the shape of ``scores`` (out, in, ...), by ascending rank of the scores.

    "element" ranks all of them, "row" those of each row, "column" those of each column.  Equal scores rank in order.
    Raises ``SiteError`` for more parts than there are elements to rank.
    """
    if partition == "element":
        return _by_rank(scores.reshape(1, -1), parts).view(scores.shape)
    if partition == "row":
        return _by_rank(scores.flatten(1), parts).view(scores.shape)
    if partition == "column":
        return _by_rank(scores.flatten(1).t(), parts).t().reshape(scores.shape)
    raise SiteError(f"partition: {partition!r} owns whole slices, which take no scores")


def _by_rank(scores: Tensor, parts: int) -> Tensor:
    """Owners within each row of a matrix."""
    order = scores.argsort(dim=1, stable=True)
    return torch.empty(scores.shape, dtype=torch.uint8).scatter_(
        1, order, slice_owners(scores.shape[1], parts).expand_as(order)
    )


def slice_owners(size: int, parts: int) -> Tensor:
    """Owners of ``size`` neighbours cut into contiguous slices, uint8."""
    edges = torch.tensor(bounds(size, parts))
    return torch.repeat_interleave(torch.arange(parts, dtype=torch.uint8), edges.diff())


def balanced_owners(saliency: Tensor, parts: int) -> Tensor:
    """Owners, uint8 of the shape of ``saliency``, such that every part holds the same total of it.

    Elements are dealt in descending order, to and fro: totals differ by at most the largest value, counts by one.
    Raises ``SiteError`` for more parts than elements, and where a value is negative, NaN or infinite.
    """
    flat = saliency.detach().double().flatten().cpu()
    bounds(flat.numel(), parts)
    if not bool((torch.isfinite(flat) & (flat >= 0)).all()):
        raise SiteError("saliency: expected finite values of at least 0, found others")
    turn = torch.arange(flat.numel())
    place, backwards = turn % parts, (turn // parts) % 2 == 1
    dealt = torch.where(backwards, parts - 1 - place, place).to(torch.uint8)
    order = flat.argsort(descending=True, stable=True)
    return torch.empty_like(dealt).scatter_(0, order, dealt).view(saliency.shape)


def random_scores(seed: int, place: str, shape: tuple[int, ...]) -> Tensor:
    """Scores to rank: 63 random bits for each element, int64."""
    return torch.from_numpy((_words(seed, place, math.prod(shape)) >> np.uint64(1)).astype(np.int64)).view(shape)


def random_kaiming(seed: int, place: str, shape: tuple[int, ...]) -> Tensor:
    """The start of a weight (out, in, ...), float32: uniform within ``1 / sqrt(in)``, Kaiming with ``a = sqrt(5)``."""
    words = _words(seed, place, math.prod(shape)) >> np.uint64(11)
    unit = words.astype(np.float64) * 2.0**-52 - 1.0  # in [-1, 1)
    return torch.from_numpy((unit / math.sqrt(math.prod(shape[1:]))).astype(np.float32)).view(shape)


def _words(seed: int, place: str, count: int) -> np.ndarray:
    """Raw words of Philox keyed by the seed and the place; unlike numpy's distributions they never change."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=16).digest(), "little")
    return np.asarray(np.random.Philox(key=key).random_raw(count), dtype=np.uint64)


def split_parameters(owner: Adapter | nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor]]:
    """(name, parameter, owners, used) of every tensor that is cut into parts, for an optimiser.

    ``owners`` (uint8) has the parameter's shape; ``used`` (bool, one for each part) says which parts took part in a
    forward pass with gradients since it was last cleared, and may be shared by several parameters.  Names are those of
    ``named_parameters``.
    """
    modules: Iterator[tuple[str, nn.Module]]
    if isinstance(owner, Adapter):
        modules = (
            (f"{piece.key}.{name}" if name else piece.key, module)
            for piece in owner.pieces
            if piece.key is not None
            for name, module in piece.module.named_modules()
        )
    else:
        modules = owner.named_modules()
    for prefix, module in modules:
        find = getattr(module, "in_parts", None)
        if callable(find):
            for name, parameter, owners, used in find():
                yield f"{prefix}.{name}" if prefix else name, parameter, owners, used
