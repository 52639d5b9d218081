"""Files to be judged: named one by one or by folder, without labels; long sounds as windows read by seeking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.audio.sound import Sound
from epitaxy.data.audio.waveform import Mono, Waveform
from epitaxy.data.decode import AUDIO_SUFFIXES, IMAGE_SUFFIXES, decode_image
from epitaxy.data.spec import Modality
from epitaxy.data.stored import File, list_folder

SUFFIXES = {"vision": IMAGE_SUFFIXES, "audio": AUDIO_SUFFIXES, "text": frozenset([".txt"])}
WHAT = {"vision": "pictures", "audio": "sounds", "text": "texts"}
SLACK = 0.05  # seconds by which a sound may be longer than a window and still be taken whole


@dataclass(frozen=True)
class Windows:
    """How a sound is cut: windows of ``length`` seconds every ``hop`` seconds, at ``rate`` Hz, to one channel."""

    length: float
    hop: float
    rate: int
    mono: Mono = "mean"

    def __post_init__(self) -> None:
        if not self.length > 0:
            raise EpitaxyError(f"the window must be longer than 0 seconds, got {self.length:g}")
        if not 0 < self.hop <= self.length:
            raise EpitaxyError(
                f"the hop lies above 0 and at most at the window's {self.length:g} seconds, got {self.hop:g}; "
                "a larger one would leave parts of the sound out"
            )

    def starts(self, seconds: float) -> list[float]:
        """Where the windows of a sound begin; the last one ends with the sound, so that every part is in one."""
        if seconds <= self.length + SLACK:
            return [0.0]
        count = int((seconds - self.length) / self.hop) + 1
        found = [number * self.hop for number in range(count)]
        last = seconds - self.length
        return found if last - found[-1] < 1e-6 else [*found, last]


@dataclass(frozen=True)
class Piece:
    """What a model is shown at once: a whole input, or a window of a sound from ``start`` to ``end`` in seconds."""

    value: Any
    name: str
    start: float | None = None
    end: float | None = None
    label: int = 0


def collect(paths: Sequence[Path], modality: Modality) -> list[Path]:
    """All files in ``paths``, folders searched in order of name.  Raises ``FormatError`` for one that is not there."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [path / name for name in sorted(list_folder(path).files)]
            fitting = [file for file in inside if file.suffix.lower() in SUFFIXES[modality]]
            if not fitting:
                raise FormatError(f"{path}: no {WHAT[modality]} in this folder, {len(inside)} other files")
            found += fitting
        elif path.exists():
            found.append(path)
        else:
            raise FormatError(f"{path}: no such file or folder")
    return list(dict.fromkeys(found))


def pieces(path: Path, modality: Modality, windows: Windows | None) -> Iterator[Piece]:
    """What one file holds, piece by piece; memory does not grow with the length of a sound.

    Raises ``FormatError`` naming the file and what is wrong with it.
    """
    name = str(path)
    if modality == "audio":
        assert windows is not None
        yield from _windows(Sound(File(name), name, windows.mono), windows)
    elif modality == "vision":
        yield Piece(decode_image(_bytes(path), name), name)
    else:
        yield Piece(_text(path), name)


def _windows(sound: Sound, windows: Windows) -> Iterator[Piece]:
    seconds = sound.seconds
    starts = windows.starts(seconds)
    if len(starts) == 1:
        yield Piece(sound.at(windows.rate), sound.name, 0.0, seconds)
        return
    count = round(windows.length * windows.rate)
    for start in starts:
        samples = sound.stretch(round(start * windows.rate), count, windows.rate)
        yield Piece(Waveform(samples, windows.rate), sound.name, start, start + windows.length)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None


def _text(path: Path) -> str:
    try:
        text = _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not a text in UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise FormatError(f"{path}: the text is empty")
    return text
