"""Log-mel features as transformers' ``ASTFeatureExtractor`` makes them, for a whole batch at once."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from transformers import ASTFeatureExtractor

WINDOW, HOP, TRANSFORM, BINS = 400, 160, 512, 128
FLOOR = 1.192092955078125e-07  # the smallest power whose logarithm is taken; digital silence


@lru_cache(maxsize=1)
def _filters() -> Tensor:
    return torch.from_numpy(ASTFeatureExtractor(num_mel_bins=BINS).mel_filters).float()


def log_mel(waves: Tensor) -> Tensor:
    """Kaldi log-mel powers, ``n t 128``, of mono waves ``n samples`` in [-1, 1] at 16 kHz; not normalised."""
    frames = waves.unfold(1, WINDOW, HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    # Pre-emphasis within each frame; the first sample stands in for its own predecessor.
    before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    frames = (frames - 0.97 * before) * torch.hann_window(WINDOW, periodic=False)
    power = torch.fft.rfft(frames, TRANSFORM).abs().square()
    return (power @ _filters()).clamp_min(FLOOR).log()
