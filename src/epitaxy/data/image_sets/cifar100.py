"""CIFAR-100: 60,000 pictures of 32 by 32 pixels in 100 classes.  Krizhevsky 2009.

Read from the binary version (``train.bin``, ``test.bin``, ``fine_label_names.txt``), or from folders ``train/<class>``
and ``test/<class>`` of pictures.  The version for Python is pickled and never opened.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from epitaxy.core.errors import FormatError
from epitaxy.data.folder import read_folder
from epitaxy.data.image_sets.official import Official, settle
from epitaxy.data.layout import rooted, text_of
from epitaxy.data.spec import DataSpec, Pool, Row, Stored
from epitaxy.data.stored import File, Tree

CIFAR100 = Official("cifar100", "CIFAR-100", 100, {"train": 50_000, "test": 10_000})
FILES, NAMES = {"train": "train.bin", "test": "test.bin"}, "fine_label_names.txt"
SIDE = 32
RECORD = 2 + 3 * SIDE * SIDE  # coarse class, fine class, then red, green and blue, row by row


@dataclass(frozen=True, slots=True)
class Record:
    """A picture of a binary file, given as a PNG."""

    file: Stored
    number: int

    def read(self) -> bytes:
        """Its bytes as a PNG."""
        if isinstance(self.file, File):
            with Path(self.file.path).open("rb") as stream:
                stream.seek(self.number * RECORD)
                data = stream.read(RECORD)
        else:
            data = self.file.read()[self.number * RECORD : (self.number + 1) * RECORD]
        if len(data) != RECORD:
            raise OSError("the file ends before this picture")
        pixels = np.frombuffer(data, np.uint8, offset=2).reshape(3, SIDE, SIDE).transpose(1, 2, 0)
        encoded = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(encoded, "PNG", compress_level=0)
        return encoded.getvalue()


@dataclass(frozen=True, slots=True)
class Held:
    """A file out of an archive, unpacked once instead of for every picture."""

    data: bytes

    def read(self) -> bytes:
        """Its bytes."""
        return self.data


def read_cifar100(tree: Tree, spec: DataSpec) -> Pool:
    """The rows of CIFAR-100; raises ``FormatError`` naming the file that is wrong."""
    if not any(path.endswith(FILES["test"]) for path in tree.files):
        if any(path.rpartition("/")[2] == "train" for path in tree.files):
            raise FormatError(
                f"{tree.root}: the pickled version of CIFAR-100, which is never opened; take the binary version "
                "(cifar-100-binary.tar.gz) and unpack it"
            )
        return settle(read_folder(tree, spec, "vision"), spec, CIFAR100, tree.root)
    tree = rooted(tree, FILES["test"], CIFAR100.title)
    names = [line.strip() for line in text_of(tree, NAMES).splitlines() if line.strip()]
    pool = Pool([], "vision", "cifar100", declared=tuple(names))
    for split, name in FILES.items():
        pool.rows += _rows(tree, name, split, names)
    return settle(pool, spec, CIFAR100, tree.root)


def _rows(tree: Tree, name: str, split: str, names: list[str]) -> list[Row]:
    where = f"{tree.root}/{name}"
    if name not in tree.files:
        raise FormatError(f"{where}: no such file")
    data = tree.files[name].read()
    if not data or len(data) % RECORD:
        raise FormatError(f"{where}: expected records of {RECORD} bytes, found {len(data)} bytes")
    labels = np.frombuffer(data, np.uint8).reshape(-1, RECORD)[:, 1]
    if labels.max() >= len(names):
        number = int(labels.argmax())
        raise FormatError(f"{where}: picture {number} has class {labels[number]}, {NAMES} names {len(names)}")
    file = tree.files[name] if isinstance(tree.files[name], File) else Held(data)
    return [
        Row(Record(file, number), names[label], split, f"{where}[{number:05}]") for number, label in enumerate(labels)
    ]
