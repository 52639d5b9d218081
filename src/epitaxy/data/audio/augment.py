"""SpecAugment on spectrograms (Park 2019, 1904.08779), as the audio transformers use it: one mask of each kind."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from epitaxy.data.audio.spec import Augment


def mask(features: Tensor, augment: Augment, source: np.random.Generator) -> Tensor:
    """A copy of normalised ``features`` (``frames mels``) with a stretch of bins and one of frames set to 0.

    The widths are uniform in 0 ... bound - 1, the places uniform among those that fit.
    """
    masked = features.clone()
    for axis, bound in ((1, augment.frequency), (0, augment.time)):
        size = features.shape[axis]
        if not bound:
            continue
        width = int(source.integers(min(bound, size + 1)))
        masked.narrow(axis, int(source.integers(size - width + 1)), width).zero_()
    return masked
