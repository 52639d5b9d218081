"""Sound files, read whole or in stretches by seeking: WAV, FLAC, Ogg, MP3 and whatever else libsndfile knows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.audio.waveform import Mono, Samples, Waveform

AUDIO_SUFFIXES = frozenset([".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff", ".au", ".opus"])
BLOCK = 1 << 20  # samples of one channel read at a time when a whole file is looked through


def decode_audio(data: bytes, name: str, rate: int | None = None, mono: Mono = "mean") -> Waveform:
    """Decode a sound to one channel, at ``rate`` Hz when given.  Raises ``FormatError`` naming what is wrong."""
    with open_sound(data, name) as sound:
        wave = Waveform(sound.read(0, None, mono), sound.rate)
    return wave if rate is None else wave.at(rate)


def check_audio(data: bytes | Path, name: str) -> int:
    """Read a sound through, block by block, keeping nothing; the number of its samples.

    Raises ``FormatError`` naming what is wrong.
    """
    with open_sound(data, name) as sound:
        return sum(len(block) for block in sound.blocks())


@contextmanager
def open_sound(data: bytes | Path, name: str) -> Iterator[OpenSound]:
    """A sound file opened for reading, from its bytes or where it lies.

    Raises ``FormatError`` for a file that is missing, empty, foreign or cut off.
    """
    soundfile = _soundfile()
    try:
        with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            if not size:
                raise FormatError(f"{name}: the file is empty")
            cut = _is_cut_wav(stream, size)
            stream.seek(0)
            try:
                opened = soundfile.SoundFile(stream)
            except Exception as error:  # libsndfile's errors share no useful class
                raise FormatError(f"{name}: not a sound that can be read ({_reason(error)})") from None
            with opened:
                sound = OpenSound(opened, name)
                if not sound.count:
                    raise FormatError(f"{name}: holds no sound")
                if cut:
                    raise FormatError(f"{name}: the sound is truncated")
                yield sound
    except FileNotFoundError:
        raise FormatError(f"{name}: no such file") from None
    except OSError as error:
        raise FormatError(f"{name}: cannot be read ({error.strerror or error})") from None


class OpenSound:
    """An open file of ``count`` samples at ``rate`` Hz in ``channels`` channels."""

    def __init__(self, opened: Any, name: str) -> None:
        self.opened, self.name = opened, name
        self.count, self.rate, self.channels = int(opened.frames), int(opened.samplerate), int(opened.channels)

    def read(self, start: int, stop: int | None, mono: Mono = "mean") -> Samples:
        """The samples from ``start`` to ``stop`` (None: to the end) as one channel.

        Raises ``FormatError`` when the file ends before it said, or holds NaN or infinite samples.
        """
        stop = self.count if stop is None else min(stop, self.count)
        try:
            if start or self.opened.tell():
                self.opened.seek(start)
            found = self.opened.read(stop - start, dtype="float32", always_2d=True)
        except Exception as error:
            raise FormatError(f"{self.name}: not a sound that can be read ({_reason(error)})") from None
        if not len(found):
            raise FormatError(f"{self.name}: holds no sound")
        if len(found) < stop - start:
            raise FormatError(f"{self.name}: the sound is truncated")
        if not np.isfinite(found).all():
            raise FormatError(f"{self.name}: holds NaN or infinite samples")
        one = found[:, 0] if mono == "left" or self.channels == 1 else found.mean(axis=1, dtype=np.float32)
        return np.ascontiguousarray(one)

    def blocks(self, mono: Mono = "mean") -> Iterator[Samples]:
        """All samples, in stretches."""
        for start in range(0, self.count, BLOCK):
            yield self.read(start, start + BLOCK, mono)


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError):
        raise EpitaxyError("reading sounds needs the package soundfile: pip install 'epitaxy[audio]'") from None
    return soundfile


def _reason(error: Exception) -> str:
    text = getattr(error, "error_string", None) or str(error)  # libsndfile's own words, without the stream's name
    return (text.splitlines() or [type(error).__name__])[0].rstrip(".") or type(error).__name__


def _is_cut_wav(stream: BinaryIO, length: int) -> bool:
    """Whether a WAV file ends before its data chunk does; libsndfile reads such files without a word."""
    stream.seek(0)
    head = stream.read(12)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return False
    at = 12
    while at + 8 <= length:
        stream.seek(at)
        chunk = stream.read(8)
        size = int.from_bytes(chunk[4:], "little")
        if chunk[:4] == b"data":
            return size not in (0, 0xFFFFFFFF) and at + 8 + size > length  # streamed files say 0 or -1
        at += 8 + size + size % 2
    return False
