"""A sound in memory: one channel, float32 within about [-1, 1], and its rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from epitaxy.core.errors import EpitaxyError, FormatError

Mono = Literal["mean", "left"]
Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Waveform:
    """A mono sound: ``samples`` of shape ``t``, float32 within about [-1, 1], at ``rate`` Hz.

    Other arrays are brought to that form: two dimensions are averaged over the shorter one, whole numbers scaled by
    their range (int16 by 2^-15), float64 rounded.  Raises ``FormatError`` for an array that is no sound.
    """

    samples: Samples = field(repr=False)
    rate: int

    def __post_init__(self) -> None:
        if isinstance(self.rate, bool) or self.rate < 1:
            raise FormatError(f"a sound has a sampling rate of at least 1 Hz, got {self.rate!r}")
        samples = self.samples
        if not (isinstance(samples, np.ndarray) and samples.dtype == np.float32 and samples.ndim == 1):
            object.__setattr__(self, "samples", to_mono(to_float(np.asarray(samples))))

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate

    def blocks(self) -> Iterator[Samples]:
        """All samples, as one stretch."""
        yield self.samples

    def at(self, rate: int) -> Waveform:
        """The same sound at ``rate`` Hz, band-limited (soxr, linear phase)."""
        return self if rate == self.rate else Waveform(resample(self.samples, self.rate, rate), rate)


def to_float(values: NDArray[Any]) -> Samples:
    """Samples of any numeric type as float32 within [-1, 1]; unsigned bytes lie around 128.

    24-bit samples are expected in the upper bytes of int32, where every decoder puts them.
    """
    kind = values.dtype
    if kind.kind == "f":
        return np.ascontiguousarray(values, dtype=np.float32)
    if kind == np.uint8:
        return ((values.astype(np.float32) - 128) / 128).astype(np.float32)
    if kind in (np.int8, np.int16, np.int32):
        return (values * 2.0 ** (1 - 8 * kind.itemsize)).astype(np.float32)
    raise FormatError(f"samples of type {kind} are no sound; expected floating point, uint8, int8, int16 or int32")


def to_mono(samples: Samples, mono: Mono = "mean") -> Samples:
    """One channel of ``t``, ``t channels`` or ``channels t`` samples: the shorter of two axes holds the channels."""
    if mono not in get_args(Mono):
        raise EpitaxyError(f"mono is one of {', '.join(get_args(Mono))}, got {mono!r}")
    if samples.ndim == 2 and samples.shape[0] != samples.shape[1]:
        axis = int(np.argmin(samples.shape)) if min(samples.shape) else 1
        picked = samples.take(0, axis) if mono == "left" else samples.mean(axis=axis, dtype=np.float32)
        return np.ascontiguousarray(picked)
    if samples.shape == (1, 1):
        return samples.reshape(1)
    if samples.ndim != 1:
        raise FormatError(f"an array of shape {samples.shape} is no sound; expected samples, or samples by channels")
    return np.ascontiguousarray(samples)


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """``samples`` (``t``) at ``wanted`` Hz: ``ceil(t wanted / rate)`` of them, the first at the same instant."""
    count = resampled_length(len(samples), rate, wanted)
    found: Samples = soxr().resample(samples, rate, wanted, quality="HQ")
    if len(found) < count:  # soxr rounds the length to nearest
        found = np.pad(found, (0, count - len(found)), mode="edge" if len(found) else "constant")
    return np.ascontiguousarray(found[:count], dtype=np.float32)


def resampled_length(count: int, rate: int, wanted: int) -> int:
    """How many samples ``count`` samples become."""
    return math.ceil(count * wanted / rate)


def soxr() -> Any:
    """The package soxr; raises ``EpitaxyError`` saying how to get it."""
    try:
        import soxr as package
    except (ImportError, OSError):
        raise EpitaxyError("sounds of another rate need the package soxr: pip install 'epitaxy[audio]'") from None
    return package
