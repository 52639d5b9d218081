"""A few test examples with what the model said of them, stored so that a report needs neither data nor model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from epitaxy.core.storage import write_atomically
from epitaxy.data.audio.sound import Sound
from epitaxy.data.audio.waveform import Waveform
from epitaxy.tasks.metrics import Metrics

SIDE = 160  # pixels of the longer side of a stored picture
POINTS = 240  # bars of a stored waveform
LETTERS = 400


def choose(metrics: Metrics, count: int) -> list[int]:
    """Up to ``count`` positions: half of them wrong, the surest mistakes first, the rest right, evenly over classes."""
    pairs = list(zip(metrics.predictions, metrics.targets, strict=True))
    wrong = sorted(
        (place for place, (said, true) in enumerate(pairs) if said != true), key=lambda n: -metrics.confidences[n]
    )
    by_class: dict[int, list[int]] = {}
    for place, (said, true) in enumerate(pairs):
        if said == true:
            by_class.setdefault(true, []).append(place)
    ranked = [(rank, label, place) for label, places in by_class.items() for rank, place in enumerate(places)]
    right = [place for _, _, place in sorted(ranked)]
    half = min(len(wrong), max(count // 2, count - len(right)))
    return wrong[:half] + right[: count - half]


def store(data: Any, places: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Write the pictures of ``data`` at ``places`` below ``folder``; text and sound go into the returned entries."""
    entries = []
    for place in places:
        value = data[place].value
        entry: dict[str, Any] = {"index": place}
        if isinstance(value, Image.Image):
            file = folder / f"{place:06d}.png"
            write_atomically(file, _png(value))
            entry |= {"kind": "image", "file": f"{folder.name}/{file.name}"}
        elif isinstance(value, (Waveform, Sound)):
            entry |= {"kind": "audio", "envelope": _envelope(value), "seconds": round(value.seconds, 3)}
        else:
            text = str(value)
            entry |= {"kind": "text", "text": text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"}
        entries.append(entry)
    return entries


def _png(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    if max(small.size) > SIDE:
        small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _envelope(sound: Waveform | Sound) -> list[float]:
    """Largest absolute value in each of ``POINTS`` equal stretches."""
    count = min(POINTS, sound.count)
    peaks, done = np.zeros(count, np.float32), 0
    for block in sound.blocks():
        parts = np.arange(done, done + len(block)) * count // sound.count
        np.maximum.at(peaks, parts, np.abs(block))
        done += len(block)
    return [round(float(peak), 4) for peak in peaks]
