"""Mean and standard deviation of log-mel values over a data set, computed in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from epitaxy.core.errors import EpitaxyError


def measure(features: Iterable[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation over all values of all clips (each ``frames mels``), padding not included.

    Sums of squares are taken around each clip's own mean and joined by Chan's rule, so that nothing cancels.  Raises
    ``EpitaxyError`` when there is nothing to measure, or all values are one.
    """
    count, mean, squares = 0, 0.0, 0.0
    for clip in features:
        values = clip.double()
        own, size = float(values.mean()), values.numel()
        apart = own - mean
        total = count + size
        squares += float((values - own).square().sum()) + apart * apart * count * size / total
        mean += apart * size / total
        count = total
    if count < 2 or squares <= 0:
        raise EpitaxyError("data.audio.statistics: train: the training sounds have no variance; give [mean, std]")
    return mean, math.sqrt(squares / (count - 1))
