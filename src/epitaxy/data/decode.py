"""From bytes to a picture, by PIL.  Sounds are decoded in ``epitaxy.data.audio`` and can be had from here too."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from epitaxy.core.errors import FormatError
from epitaxy.data.audio.decoding import AUDIO_SUFFIXES, decode_audio
from epitaxy.data.audio.waveform import Waveform

__all__ = ["AUDIO_SUFFIXES", "IMAGE_SUFFIXES", "Waveform", "decode_audio", "decode_image"]

IMAGE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"])


def decode_image(data: bytes, name: str, quick: bool = False) -> Image.Image:
    """Decode a picture to RGB, upright, 16 bits to 8, without its transparency; of several frames the first.

    ``quick`` lets a JPEG be decoded small: every byte read, little computed.
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
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns of the direct way
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a known format"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than a picture can have"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") or type(error).__name__
