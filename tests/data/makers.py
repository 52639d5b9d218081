"""Small real files: pictures of one colour with noise, and tones."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def picture(path: Path, colour: tuple[int, int, int] = (120, 120, 120), seed: int = 0, side: int = 12) -> Path:
    """Write a picture in the format that the path's suffix names."""
    noise = np.random.default_rng(seed).integers(-30, 30, (side, side, 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pictures(root: Path, counts: Mapping[str, int], suffix: str = ".png") -> Path:
    """Fill folders, ``{"train/red": 4}``, with pictures that all differ; the last part names the colour."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            seed = zlib.crc32(f"{folder}/{number}".encode())
            colour = COLOURS.get(Path(folder).name, (120, 120, 120))
            picture(root / folder / f"{number:03d}{suffix}", colour, seed)
    return root


def tone(path: Path, frequency: float = 440.0, seconds: float = 0.25, rate: int = 16000, channels: int = 1) -> Path:
    """Write a sine in the format that the path's suffix names."""
    wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.repeat(wave[:, None], channels, axis=1), rate)
    return path
