"""Several processes evaluating one data set together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """Process ``rank`` of ``size``; ``gather`` joins the lists that all of them found."""

    rank: int = 0
    size: int = 1
    gather: Callable[[list[Any]], list[Any]] = list

    def batches(self, total: int, batch_size: int) -> Iterator[list[int]]:
        """This process's share of ``total`` rows: every ``size``-th, in batches.

        All processes get equally many batches, as sharded models need; the last row may come to several.
        """
        longest = -(-total // self.size)
        rows = [min(self.rank + place * self.size, total - 1) for place in range(longest)]
        for start in range(0, longest, batch_size):
            yield rows[start : start + batch_size]
