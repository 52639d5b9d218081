"""Small trees in the official layouts of the published picture sets, with real pictures that all differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

_number: Iterator[int] = count(1)


def picture(path: Path, width: int = 12, height: int = 9) -> Path:
    """A picture of noise that no other file holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(next(_number)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    return path


def vtab(root: Path, task: str = "cifar", classes: int = 3, blank: bool = True) -> Path:
    """A task of VTAB-1k: two training pictures of every class but the last in train800; a path with a blank in test."""
    folder = root / task
    lines: dict[str, list[str]] = {}
    for part, each in (("train800", 2), ("val200", 1), ("train800val200", 3), ("test", 2)):
        lines[part] = []
        for label in range(classes - (part in ("train800", "val200", "train800val200"))):
            for _ in range(each):
                space = " " if blank and part == "test" else ""
                path = f"images/{part}/{space}{len(lines[part]):06d}.jpg"
                picture(folder / path)
                lines[part].append(f"{path} {label}")
        (folder / f"{part}.txt").write_text("\n".join(lines[part]) + "\n")
    return root


def fgvc(root: Path, pictures: str = "images", first: int = 1, names: str = "") -> Path:
    """A set of FGVC: classes ``first``, 5 and 30 (against the order of text), 10 training, 1 held, 2 test pictures."""
    for part, each in (("train", 10), ("val", 1), ("test", 2)):
        entries: dict[str, int] = {}
        for label in (30, first, 5):
            for number in range(each):
                name = f"{names}{label:03d}/{part}_{number}.jpg"
                picture(root / pictures / name)
                entries[name] = label
        write(root / f"{part}.json", entries)
    return root


def write(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values))


def union(root: Path) -> Path:
    """The five sets of FGVC under one root."""
    for name, pictures in (("cars", ""), ("cub", "images"), ("dogs", "Images"), ("flowers", ""), ("nabirds", "images")):
        fgvc(root / f"FGVC-{name}", pictures)
    return root


def cifar100(root: Path, classes: int = 3, train: int = 20, test: int = 2) -> np.ndarray:
    """The binary version; returns the test pictures, ``n 32 32 3``."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    (root / "fine_label_names.txt").write_text("".join(f"name{classes - number}\n" for number in range(classes)))
    (root / "coarse_label_names.txt").write_text("all\n")
    pixels = np.zeros(0)
    for name, each in (("train", train), ("test", test)):
        labels = np.tile(np.arange(classes, dtype=np.uint8), each)
        pixels = rng.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
        rows = np.concatenate(
            [np.full((len(labels), 1), 9, np.uint8), labels[:, None], pixels.reshape(len(labels), -1)], 1
        )
        (root / f"{name}.bin").write_bytes(rows.tobytes())
    return pixels.transpose(0, 2, 3, 1)


def aircraft(root: Path) -> Path:
    """Two variants whose names hold blanks and strokes."""
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for part, each in (("train", 3), ("val", 2), ("test", 2)):
        for variant in ("F/A-18", "Boeing 717 200"):
            for _ in range(each):
                name = f"{next(_number):07d}"
                picture(root / f"data/images/{name}.jpg")
                lines[part].append(f"{name} {variant}")
    lines["trainval"] = lines["train"] + lines["val"]
    for part, held in lines.items():
        (root / f"data/images_variant_{part}.txt").write_text("\n".join(held) + "\n")
    return root


def food101(root: Path, form: str = "txt") -> Path:
    """Two dishes, twenty training and two test pictures each."""
    (root / "meta").mkdir(parents=True)
    for part, each in (("train", 20), ("test", 2)):
        names = {dish: [f"{dish}/{part}{number}" for number in range(each)] for dish in ("pho", "apple_pie")}
        for held in names.values():
            for name in held:
                picture(root / f"images/{name}.jpg")
        if form == "txt":
            (root / f"meta/{part}.txt").write_text("\n".join(name for held in names.values() for name in held) + "\n")
        else:
            write(root / f"meta/{part}.json", names)
    return root
