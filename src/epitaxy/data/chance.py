"""The chances of one training example, decided by a draw and by nothing else."""

from __future__ import annotations

import numpy as np

Draw = tuple[int, ...]  # (seed, epoch, row): what decides the chances of one training example, wherever it is made


def chance(draw: Draw) -> np.random.Generator:
    """The source of chance of one training example: the same in a resumed run and in every data worker."""
    return np.random.default_rng(list(draw))
