"""Partitions: every element has one owner, whatever the sizes, ties and seeds; the same everywhere."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from epitaxy import EpitaxyError
from epitaxy.methods.partition import (
    balanced_owners,
    bounds,
    owners_of,
    random_kaiming,
    random_scores,
    slice_owners,
)

PINNED_SCORES = [7126129992224098942, 3615927865654573311, 7545309712640246226]
PINNED_START = [-0.4325258433818817, -0.23277105391025543, -0.06327944248914719, 0.6521831154823303]


def counts(owners: Tensor, parts: int) -> list[int]:
    return owners.flatten().long().bincount(minlength=parts).tolist()


def by_hand(scores: Tensor, parts: int) -> Tensor:
    """Sort, then deal out the ranks one by one."""
    ranked = sorted(range(scores.numel()), key=lambda index: (float(scores.flatten()[index]), index))
    owners = torch.zeros(scores.numel(), dtype=torch.uint8)
    for rank, index in enumerate(ranked):
        owners[index] = next(
            part
            for part in range(parts)
            if part * scores.numel() // parts <= rank < (part + 1) * scores.numel() // parts
        )
    return owners.view(scores.shape)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 49, 98, 103, 107])
@pytest.mark.parametrize("shape", [(16, 12), (7, 17), (128, 1)])
def test_owners_by_rank(parts: int, shape: tuple[int, int]) -> None:
    """Also where a fraction of floating point misses the last element (49, 98, 103, 107 parts)."""
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(parts))
    owners = owners_of(scores, parts)
    assert torch.equal(owners, by_hand(scores, parts))
    found = counts(owners, parts)
    assert sum(found) == scores.numel()
    assert max(found) - min(found) <= 1


def test_equal_scores_have_one_owner_each() -> None:
    """Thresholds would give elements at a tie to two parts or to none."""
    owners = owners_of(torch.zeros(6, 5), 4)
    assert counts(owners, 4) == [7, 8, 7, 8]
    assert torch.equal(owners.flatten(), slice_owners(30, 4))


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_rows_and_columns(parts: int) -> None:
    scores = random_scores(3, "mlp.0/up", (11, 6))
    rows, columns = owners_of(scores, parts, "row"), owners_of(scores, parts, "column")
    for index in range(11):
        assert torch.equal(rows[index], by_hand(scores[index].double(), parts))
    for index in range(6):
        assert torch.equal(columns[:, index], by_hand(scores[:, index].double(), parts))


@pytest.mark.parametrize(
    ("partition", "shape", "parts", "size"),
    [("element", (2, 3), 7, 6), ("row", (9, 3), 4, 3), ("column", (3, 9), 4, 3), ("element", (40, 40), 257, 256)],
)
def test_more_parts_than_elements(partition: Any, shape: tuple[int, int], parts: int, size: int) -> None:
    with pytest.raises(EpitaxyError, match=rf"^parts: expected 1 to {size} parts of \d+ elements, found {parts}$"):
        owners_of(torch.rand(shape), parts, partition)


def test_bounds_cover_without_gaps() -> None:
    for size in range(1, 40):
        for parts in range(1, size + 1):
            edges = bounds(size, parts)
            assert edges[0] == 0
            assert edges[-1] == size
            assert {high - low for low, high in itertools.pairwise(edges)} <= {
                size // parts,
                -(-size // parts),
            }


def test_scores_are_the_same_on_every_machine() -> None:
    """Pinned, because files of adapters do not hold what the seed determines."""
    assert random_scores(0, "mlp.0/up", (3,)).tolist() == PINNED_SCORES
    start = random_kaiming(0, "mlp.0/down/start", (2, 2)).double().flatten().tolist()
    assert start == pytest.approx(PINNED_START, abs=0)
    assert not torch.equal(random_scores(0, "mlp.0/up", (9,)), random_scores(0, "mlp.1/up", (9,)))
    assert not torch.equal(random_scores(0, "mlp.0/up", (9,)), random_scores(1, "mlp.0/up", (9,)))
    assert not torch.equal(random_scores(0, "mlp.0/up", (9,)), random_scores(0, "mlp.0/down", (9,)))


def test_the_start_is_kaiming_uniform() -> None:
    start = random_kaiming(5, "mlp.0/down/start", (64, 100))
    assert float(start.abs().max()) <= 0.1
    assert float(start.std()) == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert abs(float(start.mean())) < 3e-3


@pytest.mark.parametrize("parts", [1, 2, 4, 7])
def test_balanced_owners_hold_equal_totals(parts: int) -> None:
    """Where owners by count, of the same sizes, do not."""
    scores = torch.rand(24, 10, generator=torch.Generator().manual_seed(0)) ** 6
    owners = balanced_owners(scores, parts)
    totals = torch.stack([scores[owners == part].sum() for part in range(parts)])
    assert float(totals.max() - totals.min()) <= float(scores.max())
    found = counts(owners, parts)
    assert max(found) - min(found) <= 1
    if parts > 1:
        ranked = torch.stack([scores[owners_of(scores, parts) == part].sum() for part in range(parts)])
        assert float(ranked.max() - ranked.min()) > float(scores.max())


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_saliency_that_is_none(value: float) -> None:
    with pytest.raises(EpitaxyError, match="saliency: expected finite values of at least 0"):
        balanced_owners(torch.tensor([1.0, value, 2.0]), 2)
