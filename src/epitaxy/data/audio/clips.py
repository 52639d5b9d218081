"""From sounds of any length to inputs of one: which stretches of a long one are taken, how a short one is filled up."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from epitaxy.data.audio.filterbank import SILENCE
from epitaxy.data.audio.spec import Long, Short


def starts(total: int, wanted: int, long: Long, windows: int, draw: np.random.Generator | None) -> list[int]:
    """First frames of the stretches of ``wanted`` frames to take of ``total``; only evaluation takes several.

    ``draw`` is the source of chance of a training example, None in evaluation, which knows no chance.
    """
    spare = total - wanted
    if spare <= 0 or long == "cut":
        return [0]
    if long in ("random", "windows") and draw is not None:
        return [int(draw.integers(spare + 1))]
    if long == "windows":
        count = min(windows, -(-total // wanted))
        if count > 1:
            return [round(number * spare / (count - 1)) for number in range(count)]
    return [spare // 2]


def fit(features: Tensor, wanted: int, short: Short, mean: float) -> Tensor:
    """Log-mel ``features`` (``frames mels``), not yet normalised, cut or filled up to ``wanted`` frames."""
    missing = wanted - len(features)
    if missing <= 0:
        return features[:wanted]
    if short == "repeat":
        return features.repeat(-(-wanted // len(features)), 1)[:wanted]
    level = {"pad": 0.0, "silence": SILENCE, "mean": mean}[short]
    return torch.nn.functional.pad(features, (0, 0, 0, missing), value=level)
