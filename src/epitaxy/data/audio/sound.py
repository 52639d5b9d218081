"""A sound that stays in its file until samples are asked for, and then gives only those."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

from epitaxy.core.errors import FormatError
from epitaxy.data.audio.decoding import open_sound
from epitaxy.data.audio.waveform import Mono, Samples, Waveform, resample

MARGIN = 2048  # samples of the result computed on either side of a stretch, so that resampling does not show there


class Stored(Protocol):
    """Encoded content that is read when it is needed."""

    def read(self) -> bytes: ...


class Sound:
    """Stands where a ``Waveform`` does: ``samples``, ``rate``, ``seconds`` and ``at`` decode on demand.

    ``content`` with a ``path`` is read by seeking, in memory that does not grow with the file; other content, such as
    a member of an archive, is held encoded while it is read.  All raise ``FormatError`` as ``decode_audio`` does.
    """

    def __init__(self, content: Stored, name: str, mono: Mono = "mean") -> None:
        self.content, self.name, self.mono = content, name, mono

    @cached_property
    def _shape(self) -> tuple[int, int]:
        with open_sound(self.data(), self.name) as opened:
            return opened.count, opened.rate

    @property
    def count(self) -> int:
        """Number of samples, by the file's header."""
        return self._shape[0]

    @property
    def rate(self) -> int:
        """Sampling rate in Hz."""
        return self._shape[1]

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.count / self.rate

    @property
    def samples(self) -> Samples:
        """All samples, decoded anew each time."""
        with open_sound(self.data(), self.name) as opened:
            return opened.read(0, None, self.mono)

    def at(self, rate: int) -> Waveform:
        """All of it at ``rate`` Hz."""
        return Waveform(self.samples, self.rate).at(rate)

    def stretch(self, start: int, count: int, rate: int) -> Samples:
        """``count`` samples at ``rate`` Hz from sample ``start`` of that rate, or as many as there are."""
        divisor = math.gcd(self.rate, rate)
        up, down = rate // divisor, self.rate // divisor  # every ``up`` samples of the result meet ``down`` stored ones
        lead = min(start, start % up + up * math.ceil(MARGIN / up))
        first = (start - lead) // up * down
        lead = start - first // down * up
        last = min(self.count, math.ceil((start + count) * down / up) + MARGIN * max(1, down // up))
        if first >= last:
            raise FormatError(
                f"{self.name}: holds {self.seconds:.2f} s, asked for {count} samples from {start / rate:.2f} s"
            )
        with open_sound(self.data(), self.name) as opened:
            found = opened.read(first, last, self.mono)
        if self.rate != rate:
            found = resample(found, self.rate, rate)
        return found[lead : lead + count]

    def digest(self) -> str:
        """Digest of the encoded content; that of a file on disk is computed again only when the file has changed."""
        path = getattr(self.content, "path", None)
        try:
            if path is None:
                return hashlib.blake2b(self._bytes, digest_size=16).hexdigest()
            state = os.stat(path)
            return _file_digest(str(path), state.st_mtime_ns, state.st_size)
        except FileNotFoundError:
            raise FormatError(f"{self.name}: no such file") from None
        except OSError as error:
            raise FormatError(f"{self.name}: cannot be read ({error.strerror or error})") from None

    def blocks(self) -> Iterator[Samples]:
        """All samples, block by block."""
        with open_sound(self.data(), self.name) as opened:
            yield from opened.blocks(self.mono)

    def data(self) -> bytes | Path:
        """The encoded content, or where it lies."""
        path = getattr(self.content, "path", None)
        return self._bytes if path is None else Path(path)

    @cached_property
    def _bytes(self) -> bytes:
        try:
            return self.content.read()
        except FileNotFoundError:
            raise FormatError(f"{self.name}: no such file") from None
        except (OSError, ValueError) as error:
            raise FormatError(f"{self.name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


@lru_cache(maxsize=1 << 17)
def _file_digest(path: str, modified: int, size: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
