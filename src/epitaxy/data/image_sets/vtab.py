"""VTAB-1k: nineteen tasks with 1,000 training pictures each and their whole test sets.  Zhai et al., arXiv 1910.04867.

Read in the layout that NOAH, SSF and RepAdapter made usual: below ``<root>/<task>`` the pictures, and the lists
``train800.txt``, ``val200.txt``, ``train800val200.txt`` and ``test.txt`` with a path and a label in every line.  A path
may hold blanks, so the last one divides.  ``data.task`` names the task; the protocols are

* ``select``: train800 trains, val200 validates;
* ``final``: train800val200 trains, nothing validates, so that the last step is tested.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from epitaxy.core.errors import FormatError
from epitaxy.data.hub import read_hub
from epitaxy.data.image_sets.official import protocol_of, task_of
from epitaxy.data.layout import add, rooted, text_of, usable, verify
from epitaxy.data.spec import FINAL, SELECT, DataSpec, Pool, natural_order
from epitaxy.data.stored import Tree

TITLE = "VTAB-1k"


@dataclass(frozen=True)
class Task:
    """One of the nineteen: its group, its classes and its test pictures."""

    group: str
    classes: int
    test: int


TASKS = {
    "cifar": Task("Natural", 100, 10_000),
    "caltech101": Task("Natural", 102, 6_084),
    "dtd": Task("Natural", 47, 1_880),
    "oxford_flowers102": Task("Natural", 102, 6_149),
    "oxford_iiit_pet": Task("Natural", 37, 3_669),
    "svhn": Task("Natural", 10, 26_032),
    "sun397": Task("Natural", 397, 21_750),
    "patch_camelyon": Task("Specialized", 2, 32_768),
    "eurosat": Task("Specialized", 10, 5_400),
    "resisc45": Task("Specialized", 45, 6_300),
    "diabetic_retinopathy": Task("Specialized", 5, 42_670),
    "clevr_count": Task("Structured", 8, 15_000),
    "clevr_dist": Task("Structured", 6, 15_000),
    "dmlab": Task("Structured", 6, 22_735),
    "kitti": Task("Structured", 4, 711),
    "dsprites_loc": Task("Structured", 16, 73_728),
    "dsprites_ori": Task("Structured", 16, 73_728),
    "smallnorb_azi": Task("Structured", 18, 12_150),
    "smallnorb_ele": Task("Structured", 9, 12_150),
}
TRAIN, VALIDATION, BOTH, TEST = "train800", "val200", "train800val200", "test"
SIZES = {TRAIN: 800, VALIDATION: 200, BOTH: 1_000}
USED = {SELECT: {TRAIN: "train", VALIDATION: "validation", TEST: "test"}, FINAL: {BOTH: "train", TEST: "test"}}


def read_vtab(tree: Tree, spec: DataSpec) -> Pool:
    """The rows of one task with their splits; raises ``FormatError`` naming the list, line or file that is wrong."""
    protocol, name = protocol_of(spec, TITLE), task_of(spec, TITLE, TASKS)
    tree = _own(tree, name)
    pool = Pool([], "vision", "vtab")
    seen: dict[str, str] = {}
    labels: dict[str, Counter[str]] = {}
    for part in SIZES | {TEST: TASKS[name].test}:
        file = f"{part}.txt"
        if part not in USED[protocol] and file not in tree.files:
            continue
        lines = _lines(tree, file, pool, spec)
        labels[part] = Counter(label for _, _, label in lines)
        if part not in USED[protocol]:
            continue
        for where, path, label in lines:
            with usable(pool, spec, where):
                if path in seen:
                    raise FormatError(f"{where}: {path} is named already in {seen[path]}")
                seen[path] = where
                add(pool, tree, path, label, USED[protocol][part])
    _verify(pool, tree, spec, name, labels)
    pool.declared, pool.settled = natural_order({label for part in labels.values() for label in part}), True
    if protocol == FINAL:
        pool.notes.append(f"{spec.source}: protocol final: all 1,000 pictures train, none validate")
    return pool


def vtab_from_hub(spec: DataSpec) -> Pool:
    """A task stored as a data set of ``datasets``, one configuration for each task (``data.subset``, else the task).

    Its splits are called as the lists are, or ``train`` and ``validation``, of which ``final`` then takes both.
    """
    protocol, name = protocol_of(spec, TITLE), task_of(spec, TITLE, TASKS)
    pool = read_hub(replace(spec, subset=spec.subset or name))
    found = {row.split for row in pool.rows}
    roles = dict(USED[protocol])
    if protocol == SELECT and TRAIN not in found:
        roles |= {"train": "train", "validation": "validation", "val": "validation"}
    if protocol == FINAL and BOTH not in found:
        roles |= dict.fromkeys((TRAIN, VALIDATION, "train", "validation", "val"), "train")
    rows = [row for row in pool.rows if row.split in roles]
    sizes = {"train": 800 if protocol == SELECT else 1_000, "validation": 200 * (protocol == SELECT)}
    for row in rows:
        row.split = roles[str(row.split)]
    counts = Counter(row.split for row in rows)
    classes = {str(row.label) for row in rows}
    expected = {**sizes, "test": TASKS[name].test}
    checks = {f"pictures of {split}": (counts[split], count) for split, count in expected.items()}
    verify(pool, Tree(spec.source), spec, {"classes": (len(classes), TASKS[name].classes), **checks})
    pool.rows, pool.kind, pool.settled = rows, "vtab", True
    pool.declared = pool.declared or natural_order(classes)
    return pool


def _own(tree: Tree, name: str) -> Tree:
    """The part of ``tree`` that is the task's: a folder of its name, or the whole tree when it is the task itself."""
    if any(path == f"{name}/{TEST}.txt" or path.endswith(f"/{name}/{TEST}.txt") for path in tree.files):
        inner = rooted(tree, f"{name}/{TEST}.txt", f"{TITLE} {name}")
        files = {
            path.removeprefix(f"{name}/"): file for path, file in inner.files.items() if path.startswith(f"{name}/")
        }
        return Tree(f"{inner.root}/{name}", files)
    other = tree.root.rstrip("/").rpartition("/")[2]
    if other in TASKS and other != name:
        raise FormatError(f"{tree.root}: the folder of the task {other!r}, but data.task is {name!r}")
    return rooted(tree, f"{TEST}.txt", f"{TITLE} {name}")


def _lines(tree: Tree, file: str, pool: Pool, spec: DataSpec) -> list[tuple[str, str, str]]:
    """(How messages call the line, path, label) of a list."""
    found = []
    for number, line in enumerate(text_of(tree, file).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{tree.root}/{file}:{number}"
        parts = line.strip().rsplit(maxsplit=1)
        with usable(pool, spec, where):
            if len(parts) != 2 or not parts[1].isdigit():
                raise FormatError(f"{where}: expected a path, a blank and a whole number, found {line.strip()!r}")
            found.append((where, parts[0], str(int(parts[1]))))
    return found


def _verify(pool: Pool, tree: Tree, spec: DataSpec, name: str, labels: dict[str, Counter[str]]) -> None:
    task = TASKS[name]
    sizes = {**SIZES, TEST: task.test}
    counts = {f"lines of {part}.txt": (found.total(), sizes[part]) for part, found in labels.items()}
    every = {label for part in labels.values() for label in part}
    largest = max((int(label) for label in every), default=-1)
    verify(
        pool,
        tree,
        spec,
        {**counts, "classes": (len(every), task.classes), "largest label": (largest, task.classes - 1)},
    )
    if {TRAIN, VALIDATION, BOTH} <= labels.keys():
        differ = sorted(k for k, n in (labels[TRAIN] + labels[VALIDATION]).items() if labels[BOTH][k] != n)
        verify(
            pool,
            tree,
            spec,
            {f"labels that {TRAIN}.txt and {VALIDATION}.txt have and {BOTH}.txt has not": (differ, [])},
        )
