"""The order in which examples are seen: decided by (seed, epoch) alone, so that any step can be taken up again.

Epochs follow each other without a seam: a batch may hold the end of one and the start of the next, and all are full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Order:
    """Batches of row numbers for one process, from optimiser step ``first`` to ``last``.

    ``batch`` counts the rows of all ``processes`` together; each step has ``accumulate`` batches.
    """

    rows: int
    batch: int
    accumulate: int
    seed: int
    first: int
    last: int
    process: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return (self.last - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for places in self.places():
            yield [self.locate(place)[1] for place in places]

    def places(self) -> Iterator[list[int]]:
        """The batches as places in the endless row of epochs, which ``locate`` understands."""
        share = self.batch // self.processes
        for number in range(self.first * self.accumulate, self.last * self.accumulate):
            start = number * self.batch + self.process * share
            yield list(range(start, start + share))

    def locate(self, place: int) -> tuple[int, int]:
        """Epoch and row of a place."""
        epoch, within = divmod(place, self.rows)
        return epoch, int(_permutation(self.rows, self.seed, epoch)[within])


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)
