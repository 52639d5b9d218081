"""From bytes to a picture or a sound: PIL and soundfile, and a resampler of our own."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from epitaxy.core.errors import EpitaxyError, FormatError

IMAGE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"])
AUDIO_SUFFIXES = frozenset([".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff", ".au", ".opus"])
ZERO_CROSSINGS, KAISER_BETA, ROLLOFF = 32, 9.0, 0.95
CHUNK = 1 << 16


@dataclass(frozen=True)
class Waveform:
    """A mono sound: ``samples`` of shape ``t``, float32 within about [-1, 1], at ``rate`` Hz."""

    samples: NDArray[np.float32] = field(repr=False)
    rate: int

    def at(self, rate: int) -> Waveform:
        """The same sound at ``rate`` Hz: band-limited interpolation with a Kaiser-windowed sinc (linear phase)."""
        return self if rate == self.rate else _resample(self, rate)


def decode_image(data: bytes, name: str, quick: bool = False) -> Image.Image:
    """Decode a picture to RGB, upright.  ``quick`` lets a JPEG be decoded small: every byte read, little computed.

    Raises ``FormatError`` naming ``name`` and what is wrong.
    """
    if not data:
        raise FormatError(f"{name}: the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if quick:
                opened.draft("RGB", (max(1, opened.width // 8), max(1, opened.height // 8)))
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            return _to_rgb(upright)
    except Exception as error:  # decoders raise errors of every kind on damaged files
        raise FormatError(f"{name}: {_reason(error)}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        values = np.asarray(image, dtype=np.float64)
        if values.size and (values.min() < 0 or values.max() > 65535 or image.mode == "F"):
            raise ValueError(f"pixels of mode {image.mode} are not read; store 8 or 16 bits")
        image = Image.fromarray((values / 256).astype(np.uint8))  # PIL itself would clip at 255
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a known format"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than a picture can have"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") or type(error).__name__


def decode_audio(data: bytes, name: str, rate: int | None = None) -> Waveform:
    """Decode a sound to one channel, at ``rate`` Hz when given.  Raises ``FormatError`` naming what is wrong."""
    soundfile = _soundfile()
    if not data:
        raise FormatError(f"{name}: the file is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as opened:
            promised, stored_rate = opened.frames, int(opened.samplerate)
            samples = opened.read(dtype="float32", always_2d=True)
    except Exception as error:  # libsndfile's errors share no useful class
        raise FormatError(f"{name}: not a sound that can be read ({_reason(error)})") from None
    if len(samples) == 0:
        raise FormatError(f"{name}: holds no sound")
    if len(samples) < promised or _is_cut_wav(data):
        raise FormatError(f"{name}: the sound is truncated")
    if not np.isfinite(samples).all():
        raise FormatError(f"{name}: holds NaN or infinite samples")
    mono = np.ascontiguousarray(samples.mean(axis=1, dtype=np.float32))
    wave = Waveform(mono, stored_rate)
    return wave if rate is None else wave.at(rate)


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError):
        raise EpitaxyError("reading sounds needs the package soundfile: pip install 'epitaxy[audio]'") from None
    return soundfile


def _is_cut_wav(data: bytes) -> bool:
    """Whether a WAV file ends before its data chunk does; libsndfile reads such files without a word."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return False
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            return size not in (0, 0xFFFFFFFF) and at + 8 + size > len(data)  # streamed files say 0 or -1
        at += 8 + size + size % 2
    return False


def _resample(wave: Waveform, rate: int) -> Waveform:
    divisor = math.gcd(rate, wave.rate)
    up, down = rate // divisor, wave.rate // divisor
    table, reach = _kernel(up, down)
    count = max(1, math.ceil(len(wave.samples) * up / down))
    padded = torch.nn.functional.pad(torch.from_numpy(wave.samples), (reach - 1, reach + down))
    frames = padded.unfold(0, 2 * reach, 1)
    parts = []
    for start in range(0, count, CHUNK):
        position = torch.arange(start, min(start + CHUNK, count)) * down
        parts.append((frames[position // up] * table[position % up]).sum(-1))
    return Waveform(torch.cat(parts).numpy(), rate)


@lru_cache(maxsize=8)
def _kernel(up: int, down: int) -> tuple[Tensor, int]:
    """Filter taps for each of the ``up`` positions between two samples, ``up taps``, and their one-sided reach."""
    cutoff = ROLLOFF * min(1.0, up / down)
    reach = math.ceil(ZERO_CROSSINGS / cutoff)
    taps = torch.arange(1 - reach, reach + 1, dtype=torch.float64)
    distance = taps[None, :] - torch.arange(up, dtype=torch.float64)[:, None] / up
    window = torch.i0(KAISER_BETA * (1 - (distance / reach).square()).clamp_min(0).sqrt())
    kernel = torch.sinc(cutoff * distance) * window * (distance.abs() <= reach)
    return (kernel / kernel.sum(1, keepdim=True)).float(), reach
