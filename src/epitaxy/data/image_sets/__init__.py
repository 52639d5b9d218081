"""The published picture data sets, read in the layouts that people have them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from epitaxy.core.errors import EpitaxyError
from epitaxy.data.hub import read_hub
from epitaxy.data.image_sets.aircraft import AIRCRAFT, read_aircraft
from epitaxy.data.image_sets.cifar100 import CIFAR100, read_cifar100
from epitaxy.data.image_sets.fgvc import folder_names, read_fgvc, read_fgvc_union
from epitaxy.data.image_sets.food101 import FOOD101, read_food101
from epitaxy.data.image_sets.official import Official, settle
from epitaxy.data.image_sets.vtab import read_vtab, vtab_from_hub
from epitaxy.data.spec import DataSpec, Pool
from epitaxy.data.stored import Tree

READERS: Mapping[str, Callable[[Tree, DataSpec], Pool]] = {
    "vtab": read_vtab,
    "fgvc": read_fgvc,
    "fgvc_union": read_fgvc_union,
    "cifar100": read_cifar100,
    "aircraft": read_aircraft,
    "food101": read_food101,
}
MIRRORED: Mapping[str, Official] = {"cifar100": CIFAR100, "aircraft": AIRCRAFT, "food101": FOOD101}

__all__ = ["READERS", "from_hub", "narrowed"]


def from_hub(spec: DataSpec) -> Pool:
    """A published set that is stored as a data set of the ``datasets`` library, under the same protocols and checks."""
    if spec.kind == "vtab":
        return vtab_from_hub(spec)
    if spec.kind not in MIRRORED:
        raise EpitaxyError(f"data.source: {spec.kind} is read from a folder, {spec.source} is no such folder")
    official = MIRRORED[spec.kind]
    pool = read_hub(spec)
    splits = {row.split for row in pool.rows}
    for row in pool.rows:
        if row.split == "validation" and "test" not in splits:  # some mirrors call the official test split so
            row.split = "test"
    return settle(pool, spec, official, spec.source)


def narrowed(path: Path, spec: DataSpec) -> Path:
    """The folder of the one set that ``spec.task`` names, below a root that holds several; else ``path`` itself."""
    if spec.task is None or not path.is_dir():
        return path
    wanted = [spec.task] if spec.kind == "vtab" else folder_names(spec.task)
    found = {folder.name.lower(): folder for folder in path.iterdir() if folder.is_dir()}
    return next((found[name.lower()] for name in wanted if name.lower() in found), path)
