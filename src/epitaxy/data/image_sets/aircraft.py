"""FGVC-Aircraft: 10,000 pictures of 100 variants of aircraft.  Maji et al., arXiv 1306.5151, 2013.

``data/images/<id>.jpg`` and ``data/images_variant_{train,val,trainval,test}.txt``, each line an id, a blank and a
variant, which may hold blanks itself.  Protocol ``select`` trains on train and validates on val, ``final`` trains on
both, which is trainval.
"""

from __future__ import annotations

from epitaxy.core.errors import FormatError
from epitaxy.data.image_sets.official import Official, settle
from epitaxy.data.layout import add, rooted, text_of, usable
from epitaxy.data.spec import DataSpec, Pool
from epitaxy.data.stored import Tree

AIRCRAFT = Official("aircraft", "FGVC-Aircraft", 100, {"train": 3_334, "validation": 3_333, "test": 3_333})
LISTS = {
    split: f"images_variant_{name}.txt" for split, name in (("train", "train"), ("validation", "val"), ("test", "test"))
}
BOTH = "images_variant_trainval.txt"


def read_aircraft(tree: Tree, spec: DataSpec) -> Pool:
    """The rows of FGVC-Aircraft; raises ``FormatError`` naming the line or file that is wrong."""
    tree = rooted(tree, LISTS["test"], AIRCRAFT.title)
    pool = Pool([], "vision", "aircraft")
    seen: dict[str, str] = {}
    variants: dict[str, str] = {}
    for split, file in LISTS.items():
        for where, picture, variant in _lines(tree, file, pool, spec):
            with usable(pool, spec, where):
                if picture in seen:
                    raise FormatError(f"{where}: {picture} is named already in {seen[picture]}")
                seen[picture], variants[picture] = where, variant
                add(pool, tree, f"images/{picture}.jpg", variant, split)
    if BOTH in tree.files and spec.on_bad == "error":
        for where, picture, variant in _lines(tree, BOTH, pool, spec):
            if variants.get(picture) != variant or LISTS["test"] in seen.get(picture, ""):
                raise FormatError(
                    f"{where}: {picture} {variant} is neither in {LISTS['train']} nor in {LISTS['validation']}"
                )
    return settle(pool, spec, AIRCRAFT, tree.root)


def _lines(tree: Tree, file: str, pool: Pool, spec: DataSpec) -> list[tuple[str, str, str]]:
    """(How messages call the line, id of the picture, variant)."""
    found = []
    for number, line in enumerate(text_of(tree, file).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{tree.root}/{file}:{number}"
        picture, _, variant = line.strip().partition(" ")
        with usable(pool, spec, where):
            if not variant.strip():
                raise FormatError(f"{where}: expected an id, a blank and a variant, found {line.strip()!r}")
            found.append((where, picture, variant.strip()))
    return found
