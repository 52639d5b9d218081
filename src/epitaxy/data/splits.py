"""Data sets as three splits with one list of classes, decoded lazily."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from epitaxy.core.errors import FormatError, meant
from epitaxy.data import audio_sets, image_sets
from epitaxy.data.audio.sound import Sound
from epitaxy.data.audio.waveform import Mono
from epitaxy.data.check import Checked, Skipped, check_rows, read_bytes
from epitaxy.data.decode import Waveform, decode_audio, decode_image
from epitaxy.data.divide import Parts, Plan, count_classes, divide, limit, plan_splits, shared_content
from epitaxy.data.few_shot import few_shot, share
from epitaxy.data.folder import modality_of, read_folder
from epitaxy.data.hub import SAVED, read_hub
from epitaxy.data.shipped import PREFIX, shipped_archive
from epitaxy.data.spec import DataSpec, Modality, Pool, Row, natural_order
from epitaxy.data.stored import Tree, list_archive, list_folder
from epitaxy.data.table import SUFFIXES, is_table, read_table, table_files

READERS = {**audio_sets.READERS, **image_sets.READERS}

__all__ = ["DataSpec", "Example", "Examples", "Modality", "Splits", "Waveform", "load_splits"]


@dataclass(frozen=True)
class Example:
    """One example: a PIL image in RGB, a ``Waveform`` (or ``Sound``) or a string; its class number; how to call it."""

    value: Any
    label: int
    name: str


class Examples(Dataset[Example]):
    """A split: ``len``, ``[number]`` and iteration; ``labels`` and ``names`` are known without decoding."""

    def __init__(
        self, rows: Sequence[Row], classes: Sequence[str], modality: Modality, rate: int | None, mono: Mono = "mean"
    ) -> None:
        numbers = {label: number for number, label in enumerate(classes)}
        self.rows, self.classes, self.modality, self.rate = list(rows), tuple(classes), modality, rate
        self.mono, self.lazy = mono, False
        self.labels = [numbers[str(row.label)] for row in self.rows]

    @property
    def names(self) -> list[str]:
        """How messages call each example: mostly its path."""
        return [row.name for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Example:
        """Decode one example; raises ``FormatError`` naming the file when it cannot be read."""
        row = self.rows[number]
        return Example(self._value(row), self.labels[number], row.name)

    def _value(self, row: Row) -> Any:
        if isinstance(row.content, str):
            return row.content
        if self.lazy and self.modality == "audio" and self.rate is None:
            return Sound(row.content, row.name, self.mono)
        data = read_bytes(row)
        if self.modality == "vision":
            return decode_image(data, row.name)
        return decode_audio(data, row.name, self.rate, self.mono)

    def lazily(self) -> Examples:
        """The same rows with sounds that stay in their files until samples are asked for."""
        other = copy(self)
        other.lazy = True
        return other

    def __repr__(self) -> str:
        return f"Examples({len(self)} rows, {len(self.classes)} classes, {self.modality})"


@dataclass
class Splits:
    """Three splits, of which validation may be empty; ``groups`` names the set each class came from, where sets were
    joined; ``skipped`` lists (name, reason) of what was left out, ``notes`` what was decided or noticed."""

    train: Examples
    validation: Examples
    test: Examples
    classes: tuple[str, ...]
    modality: Modality
    kind: str
    skipped: Skipped = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)

    def lazily(self) -> Splits:
        """The same splits with sounds that stay in their files until samples are asked for."""
        parts = {role: getattr(self, role).lazily() for role in ("train", "validation", "test")}
        return replace(self, **parts)


def load_splits(spec: DataSpec) -> Splits:
    """Read the data that ``spec`` describes.

    Raises ``FormatError`` (``EpitaxyError`` for a contradiction in ``spec``) naming the file, class or split at
    fault; warns when two splits share content.
    """
    pool = _read(spec)
    notes = list(pool.notes)
    order = {id(row): place for place, row in enumerate(pool.rows)}
    plan = _plan(pool, spec, notes)
    checked = check_rows(pool, spec)
    parts = divide(checked, plan, spec, notes)
    classes = _settle_classes(pool, parts, checked, spec, notes)
    for leak in shared_content(parts, checked.digests):
        notes.append(f"{spec.source}: {leak}")
        warnings.warn(notes[-1], stacklevel=2)
    if checked.skipped:
        notes.append(
            f"{spec.source}: {len(checked.skipped)} examples were left out, the first is {checked.skipped[0][0]}"
        )
    if not pool.thinned:
        parts["train"] = share(parts["train"], spec, notes)
    parts["train"] = few_shot(parts["train"], order, spec, notes)
    limits = {"train": spec.limit_per_class}
    sets = {
        role: Examples(
            limit(rows, limits.get(role, spec.limit_evaluation_per_class), spec.seed),
            classes,
            pool.modality,
            spec.sampling_rate,
            spec.audio.mono if spec.audio is not None else "mean",
        )
        for role, rows in parts.items()
    }
    return Splits(
        sets["train"],
        sets["validation"],
        sets["test"],
        classes,
        pool.modality,
        pool.kind,
        checked.skipped,
        notes,
        pool.groups,
    )


def _plan(pool: Pool, spec: DataSpec, notes: list[str]) -> Plan:
    """Choose the splits, and let go of the rows that are in none of them."""
    found = dict.fromkeys([*(row.split for row in pool.rows), *(split for split, _ in pool.empty)])
    names = [name for name in found if name is not None]
    if pool.settled:
        plan = Plan("train", {role: role for role in ("validation", "test") if role in names})
    else:
        plan = plan_splits(names, spec)
    unused = Counter(row.split for row in pool.rows if not plan.uses(row))
    if unused:
        shown = ", ".join(f"{split or 'no split named'} ({count} rows)" for split, count in unused.items())
        notes.append(f"{spec.source}: these splits are not used: {shown}")
    pool.rows = [row for row in pool.rows if plan.uses(row)]
    if pool.empty and spec.on_bad == "error":
        raise FormatError(_fault(spec, [_emptiness(place) for place in pool.empty]))
    return plan


def _read(spec: DataSpec) -> Pool:
    path = Path(spec.source).expanduser()
    if spec.source.startswith(PREFIX):
        return _read_tree(list_archive(shipped_archive(spec.source.removeprefix(PREFIX))), spec)
    if spec.kind == "hub":
        return read_hub(spec)
    if spec.kind in image_sets.READERS:
        if _is_hub(path, spec):
            return image_sets.from_hub(spec)
        path = image_sets.narrowed(path, spec)
    if not path.exists():
        if spec.kind == "auto" and not _looks_like_path(spec.source):
            return read_hub(spec)
        near = meant(path.name, [item.name for item in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise FormatError(f"{spec.source}: no such file or folder{near}")
    if spec.kind in READERS:
        if path.is_file() and path.suffix != ".zip":
            raise FormatError(f"{spec.source}: expected the folder of the data set, or a .zip of it")
        return READERS[spec.kind](list_archive(path) if path.is_file() else list_folder(path), spec)
    if spec.kind == "csv" or (spec.kind == "auto" and path.is_file() and is_table(path)):
        return read_table(path, spec)
    if not path.is_dir() and path.suffix.lower() != ".zip":
        raise FormatError(f"{spec.source}: expected a folder, a .zip, or a table ({', '.join(SUFFIXES)})")
    if spec.kind == "auto" and path.is_dir():
        if any((path / name).exists() for name in SAVED):
            return read_hub(spec)
        if table_files(path):
            return read_table(path, spec)
    tree = list_archive(path) if path.is_file() else list_folder(path)
    return _read_tree(tree, spec)


def _read_tree(tree: Tree, spec: DataSpec) -> Pool:
    if spec.kind == "image_folder":
        return read_folder(tree, spec, "vision")
    if spec.kind == "audio_folder":
        return read_folder(tree, spec, "audio")
    modality = modality_of(tree)
    if modality is None and any(name.endswith((".parquet", ".arrow")) for name in tree.files):
        return read_hub(spec)
    return read_folder(tree, spec, modality or "vision")


def _is_hub(path: Path, spec: DataSpec) -> bool:
    """Whether a published set is a data set of the ``datasets`` library: a name of the hub, or saved in a folder."""
    if path.exists():
        return path.is_dir() and any((path / name).exists() for name in SAVED)
    return not _looks_like_path(spec.source) and "/" in spec.source


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith((".zip", *SUFFIXES))


def _settle_classes(pool: Pool, parts: Parts, checked: Checked, spec: DataSpec, notes: list[str]) -> tuple[str, ...]:
    """The classes, after checking that each is in every split; with ``on_bad="skip"`` gaps are noted, not refused."""
    if pool.settled:
        return _declared(pool, parts, spec, notes)
    lenient = spec.on_bad == "skip"
    counts = {role: count_classes(rows) for role, rows in parts.items()}
    faults = [_emptiness(place) for place in pool.empty]
    known = set().union(*counts.values()) | set(pool.declared)
    for label in natural_order(known):
        missing = [role for role in counts if not counts[role][label]]
        if 0 < len(missing) < len(counts):
            held = ", ".join(f"{counts[role][label]} in {role}" for role in counts if role not in missing)
            faults.append(f"class {label!r} is missing from {' and '.join(missing)} (it has {held})")
    if faults and not lenient:
        raise FormatError(_fault(spec, faults))
    notes.extend(f"{spec.source}: {fault}" for fault in faults)
    for role in ("validation", "test"):
        unknown = [row for row in parts[role] if not counts["train"][str(row.label)]]
        checked.skipped += [(row.name, f"its class {row.label!r} is not in train") for row in unknown]
        parts[role] = [row for row in parts[role] if counts["train"][str(row.label)]]
        if not parts[role]:
            raise FormatError(f"{spec.source}: the {role} split has no examples of a class that is in train")
    present = set(counts["train"])
    if pool.declared and present <= set(pool.declared):
        classes = tuple(label for label in pool.declared if label in present)
    else:
        classes = natural_order(present)
    if len(classes) < 2:
        raise FormatError(f"{spec.source}: a classifier needs at least two classes, found {', '.join(classes)}")
    return classes


def _declared(pool: Pool, parts: Parts, spec: DataSpec, notes: list[str]) -> tuple[str, ...]:
    """The classes the source declares, also those that a small training split lacks."""
    for role in ("train", "test"):
        if not parts[role]:
            raise FormatError(f"{spec.source}: the {role} split has no examples")
    held = count_classes(parts["train"])
    lacking = [label for label in pool.declared if not held[label]]
    if lacking:
        notes.append(
            f"{spec.source}: {len(lacking)} of {len(pool.declared)} classes have no training example, the first is "
            f"{lacking[0]!r}; they count in the test"
        )
    return pool.declared


def _emptiness(place: tuple[str | None, str]) -> str:
    return f"the class folder {'/'.join(filter(None, place))!r} is empty"


def _fault(spec: DataSpec, faults: Sequence[str]) -> str:
    more = f" (and {len(faults) - 1} more such faults)" if len(faults) > 1 else ""
    return f"{spec.source}: {faults[0]}{more}; mend it, or go on without with on_bad: skip"
