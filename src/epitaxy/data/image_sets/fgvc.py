"""Five sets of fine-grained classes in the splits of visual prompt tuning.  Jia et al., ECCV 2022, arXiv 2203.12119.

Below ``<root>`` lie ``train.json``, ``val.json`` and ``test.json``, each a mapping of file names to class numbers, and
the pictures.  ``data.task`` names the set.  Classes are the numbers of all three files, sorted and counted from 0: the
published code counts those of each file by itself, so that one missing class shifts all that follow; files that
disagree are refused.  ``data.fraction`` takes ``train_<fraction>.json`` where it is there, else draws its own share.

``fgvc_union`` joins the five under ``<root>/FGVC-cars`` and so on to one task of 1,173 classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epitaxy.core.errors import FormatError
from epitaxy.data.image_sets.official import protocol_of, task_of
from epitaxy.data.layout import add, disjoint, rooted, text_of, usable, verify
from epitaxy.data.spec import FINAL, SELECT, DataSpec, Pool
from epitaxy.data.stored import Tree

TITLE, UNION = "FGVC", "the union of FGVC"


@dataclass(frozen=True)
class Set:
    """A set as published: where its pictures lie, classes, and pictures to train on, of which ``held`` validate."""

    title: str
    pictures: str
    classes: int
    training: int
    held: int
    test: int


SETS = {  # in the order in which the union counts their classes
    "cars": Set("Stanford Cars", "", 196, 8_144, 815, 8_041),
    "cub": Set("CUB-200-2011", "images/", 200, 5_994, 600, 5_794),
    "dogs": Set("Stanford Dogs", "Images/", 120, 12_000, 1_200, 8_580),
    "flowers": Set("Oxford Flowers-102", "", 102, 2_040, 1_020, 6_149),
    "nabirds": Set("NABirds", "images/", 555, 23_929, 2_393, 24_633),
}
FILES = {"train": "train.json", "validation": "val.json", "test": "test.json"}


def folder_names(task: str) -> list[str]:
    """How the folder of a set is called below a root that holds several."""
    return [f"FGVC-{task}", task]


def read_fgvc(tree: Tree, spec: DataSpec) -> Pool:
    """The rows of one set; raises ``FormatError`` naming the file or entry that is wrong."""
    protocol_of(spec, TITLE)
    name = task_of(spec, TITLE, SETS)
    tree = rooted(tree, FILES["test"], SETS[name].title)
    pool = Pool([], "vision", "fgvc", settled=True)
    pool.thinned = _has_share(tree, spec)
    pool.declared = tuple(_read_set(pool, tree, spec, name, ""))
    return pool


def read_fgvc_union(tree: Tree, spec: DataSpec) -> Pool:
    """The rows of all five sets; a class is called ``cars/7``, and ``groups`` tells its set."""
    protocol_of(spec, UNION)
    pool = Pool([], "vision", "fgvc_union", settled=True)
    trees = {name: _below(tree, name) for name in SETS}
    pool.thinned = all(_has_share(part, spec) for part in trees.values())
    for name, part in trees.items():
        classes = _read_set(pool, part, spec, name, f"{name}/")
        pool.groups |= dict.fromkeys(classes, name)
    pool.declared = tuple(pool.groups)
    return pool


def _below(tree: Tree, name: str) -> Tree:
    """The set ``name`` below the root of the union."""
    wanted = [folder.lower() for folder in folder_names(name)]
    for path in sorted(tree.files, key=lambda path: (path.count("/"), path)):
        folders, _, file = path.rpartition("/")
        if file == FILES["test"] and folders.rpartition("/")[2].lower() in wanted:
            prefix = f"{folders}/"
            files = {key.removeprefix(prefix): found for key, found in tree.files.items() if key.startswith(prefix)}
            return Tree(f"{tree.root}/{folders}", files)
    raise FormatError(f"{tree.root}: not the layout of {UNION}: {folder_names(name)[0]}/{FILES['test']} is missing")


def _share_file(spec: DataSpec) -> str:
    return f"train_{spec.fraction:g}.json" if spec.fraction is not None else ""


def _has_share(tree: Tree, spec: DataSpec) -> bool:
    """Whether the set itself says which training pictures ``spec.fraction`` leaves."""
    return spec.protocol != FINAL and _share_file(spec) in tree.files


def _read_set(pool: Pool, tree: Tree, spec: DataSpec, name: str, prefix: str) -> list[str]:
    """Add the rows of a set to ``pool``; returns the names of its classes in order."""
    protocol = spec.protocol or SELECT
    found = {split: _entries(tree, file, pool, spec) for split, file in FILES.items()}
    _verify(pool, tree, spec, name, found)
    numbers = sorted({number for entries in found.values() for number in entries.values()})
    _agree(pool, tree, spec, found)
    disjoint(pool, tree, spec, "picture", {FILES[split]: {key: key for key in found[split]} for split in found})
    if pool.thinned:
        file = _share_file(spec)
        share = _entries(tree, file, pool, spec)
        for key, number in share.items():
            if found["train"].get(key) != number:
                raise FormatError(f"{tree.root}/{file}: {key!r} of class {number} is not in {FILES['train']}")
        found["train"] = share
        pool.notes.append(f"{tree.root}: trains on the {len(share)} pictures of {file}")
    for split, entries in found.items():
        role = "train" if split == "validation" and protocol == FINAL else split
        for key, number in entries.items():
            add(pool, tree, f"{SETS[name].pictures}{key}", f"{prefix}{number}", role)
    return [f"{prefix}{number}" for number in numbers]


def _entries(tree: Tree, file: str, pool: Pool, spec: DataSpec) -> dict[str, int]:
    """A file of a split: names of pictures and class numbers."""
    where = f"{tree.root}/{file}"

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        held: dict[str, Any] = {}
        for key, value in pairs:
            if key in held:
                raise FormatError(f"{where}: {key!r} is there twice")
            held[key] = value
        return held

    try:
        values = json.loads(text_of(tree, file), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise FormatError(f"{where}: not readable as JSON ({error})") from None
    if not isinstance(values, dict) or not values:
        raise FormatError(f"{where}: expected a mapping of file names to class numbers")
    found: dict[str, int] = {}
    for key, value in values.items():
        with usable(pool, spec, f"{where}: {key!r}"):
            found[key] = _number(where, key, value)
    return found


def _number(where: str, key: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and value.isdigit():
        return int(value)
    raise FormatError(f"{where}: {key!r}: expected a class number, found {value!r}")


def _agree(pool: Pool, tree: Tree, spec: DataSpec, found: Mapping[str, Mapping[str, int]]) -> None:
    """Every class is in every split."""
    classes = {split: set(entries.values()) for split, entries in found.items()}
    union = set().union(*classes.values())
    for split, own in classes.items():
        lacking = sorted(union - own)
        if lacking:
            holder = next(other for other in classes if lacking[0] in classes[other])
            told = (
                f"{tree.root}/{FILES[split]}: {len(lacking)} classes are missing that other splits have, the first is "
                f"{lacking[0]} (in {FILES[holder]})"
            )
            if spec.verify:
                raise FormatError(f"{told}; fetch the splits again, or go on as they are with data.verify: false")
            pool.notes.append(told)


def _verify(pool: Pool, tree: Tree, spec: DataSpec, name: str, found: Mapping[str, Mapping[str, int]]) -> None:
    """The official numbers; how the training pictures were divided is a choice, so that another one is only noted."""
    official = SETS[name]
    counts = {split: len(entries) for split, entries in found.items()}
    classes = {number for entries in found.values() for number in entries.values()}
    verify(
        pool,
        tree,
        spec,
        {
            "classes": (len(classes), official.classes),
            "pictures of train.json and val.json": (counts["train"] + counts["validation"], official.training),
            "pictures of test.json": (counts["test"], official.test),
        },
    )
    if counts["validation"] != official.held:
        pool.notes.append(
            f"{tree.root}/{FILES['validation']}: {counts['validation']} pictures, the published one has {official.held}"
        )
