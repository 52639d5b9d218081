"""Log-mel features as Kaldi computes them, for batches of sounds of any length.

Frames of 25 ms every 10 ms, none of them over the edge; of each frame the mean is taken out, a pre-emphasis of 0.97
and a symmetric Hann window applied; the power spectrum is summed by triangles that are equally wide in mel; the
logarithm is taken of no less than 1.19e-7.  No dither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from epitaxy.core.errors import EpitaxyError

FLOOR = 1.192092955078125e-07
BLOCK = 4096  # frames computed at a time
SILENCE = math.log(FLOOR)  # what digital silence, and any constant, becomes


@dataclass(frozen=True)
class Filterbank:
    """Computes ``mels`` log-mel values per frame of sounds at ``rate`` Hz, from ``low`` to ``high`` Hz.

    ``high=None`` means half the rate.  ``subtract_clip_mean`` takes the mean of the whole clip out first, as AST's own
    code does; as each frame loses its mean anyway, this changes nothing but roundings.
    """

    mels: int = 128
    rate: int = 16000
    low: float = 20.0
    high: float | None = None
    pre_emphasis: float = 0.97
    subtract_clip_mean: bool = False

    def __post_init__(self) -> None:
        top = self.rate / 2 if self.high is None else self.high
        if self.mels < 1:
            raise EpitaxyError(f"a filterbank has at least one mel bin, got {self.mels}")
        if self.length < 2 or not 0 <= self.low < top <= self.rate / 2:
            raise EpitaxyError(
                f"a filterbank reaches from 0 or above to at most half the rate; got {self.low} to {top} Hz at "
                f"{self.rate} Hz"
            )

    @property
    def length(self) -> int:
        """Samples of a frame: 25 ms."""
        return self.rate * 25 // 1000

    @property
    def hop(self) -> int:
        """Samples between the starts of two frames: 10 ms."""
        return self.rate // 100

    def frames(self, samples: int) -> int:
        """How many frames so many samples give; what is shorter than a frame is filled up to one."""
        return 1 + max(0, samples - self.length) // self.hop

    def samples(self, frames: int) -> int:
        """How many samples so many frames cover."""
        return self.length + (frames - 1) * self.hop

    def __call__(self, waves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Features of ``waves`` (each ``t``), ``b frames mels`` in float32, and the number of frames of each, ``b``.

        Frames behind the end of a shorter sound hold the value of silence.
        """
        if not waves or any(wave.ndim != 1 or not wave.numel() for wave in waves):
            raise EpitaxyError("a filterbank takes at least one sound, each of one dimension and at least one sample")
        lengths = torch.tensor([self.frames(len(wave)) for wave in waves])
        longest = int(lengths.max())
        padded = torch.zeros(len(waves), self.samples(longest), dtype=torch.float64, device=waves[0].device)
        for row, wave in zip(padded, waves, strict=True):
            wave = wave.double()
            wave = wave - wave.mean() if self.subtract_clip_mean else wave
            used = min(len(wave), len(row))
            row[:used] = wave[:used]
        frames = padded.unfold(-1, self.length, self.hop)  # b frames length
        features = torch.cat([self._log_mel(part) for part in torch.split(frames, BLOCK, 1)], 1)
        behind = torch.arange(longest) >= lengths[:, None]
        return features.masked_fill(behind[..., None].to(features.device), SILENCE), lengths

    def _log_mel(self, frames: Tensor) -> Tensor:
        frames = frames - frames.mean(-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
        frames = (frames - self.pre_emphasis * before) * self._window.to(frames.device)
        power = torch.view_as_real(torch.fft.rfft(frames, self._points)).square().sum(-1)
        energy: Tensor = power @ self._triangles.to(frames.device)
        return energy.clamp_min(FLOOR).log().float()

    @property
    def _points(self) -> int:
        return 1 << (self.length - 1).bit_length()

    @cached_property
    def _window(self) -> Tensor:
        return torch.hann_window(self.length, periodic=False, dtype=torch.float64)

    @cached_property
    def _triangles(self) -> Tensor:
        """Weights of each mel bin over the spectrum, ``points/2+1 mels``."""
        top = self.rate / 2 if self.high is None else self.high
        frequencies = torch.arange(self._points // 2 + 1, dtype=torch.float64) * (self.rate / self._points)
        place = _mel(frequencies)[:, None]
        low, high = (float(_mel(torch.tensor(edge, dtype=torch.float64))) for edge in (self.low, top))
        edges = torch.linspace(low, high, self.mels + 2, dtype=torch.float64)
        rising = (place - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - place) / (edges[2:] - edges[1:-1])
        return torch.minimum(rising, falling).clamp_min(0)


def _mel(frequency: Tensor) -> Tensor:
    return 1127.0 * (1.0 + frequency / 700.0).log()
