"""Which rows train, validate and test: the splits the source has, and shares cut from the training rows."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from epitaxy.core.errors import EpitaxyError, FormatError, nearest
from epitaxy.data.check import Checked
from epitaxy.data.spec import SPLITS, DataSpec, Row

DEFAULT_SHARE = {"validation": 0.1, "test": 0.2}
Parts = dict[str, list[Row]]


@dataclass(frozen=True)
class Plan:
    """Where each part comes from: the name of a split (None: the rows of a source without splits) or a share."""

    train: str | None
    others: Mapping[str, str | float]

    def uses(self, row: Row) -> bool:
        """Whether the row's split is one of those."""
        return row.split == self.train or row.split in self.others.values()


def plan_splits(names: Sequence[str], spec: DataSpec) -> Plan:
    """Choose among the splits ``names``.  Validation is never the test split, nor test the validation split.

    Raises ``FormatError`` for a split that is not there, ``EpitaxyError`` for one that is asked for twice.
    """
    train = _train_name(spec, names)
    chosen: dict[str, str | float] = {} if train is None else {"train": train}
    for role in ("test", "validation"):
        chosen[role] = _source_of(role, spec, names, chosen)
    chosen.pop("train", None)
    return Plan(train, chosen)


def divide(checked: Checked, plan: Plan, spec: DataSpec, notes: list[str]) -> Parts:
    """The rows of train, validation and test.  Raises ``FormatError`` for a class too small to be cut."""
    by_split: dict[str | None, list[Row]] = defaultdict(list)
    for row in checked.rows:
        by_split[row.split].append(row)
    parts = {role: list(by_split[source]) for role, source in plan.others.items() if isinstance(source, str)}
    parts["train"] = list(by_split[plan.train])
    if not parts["train"]:
        raise FormatError(f"{spec.source}: no training examples {'are left' if checked.skipped else 'there'}")
    shares = {role: source for role, source in plan.others.items() if isinstance(source, float)}
    if shares:
        parts.update(cut(parts["train"], shares, checked.digests, spec))
        for role, share in sorted(shares.items()):
            if getattr(spec, role) is None:
                notes.append(f"{spec.source}: no {role} split given, {share:.0%} of the training rows are used for it")
    return {role: sorted(parts.get(role, []), key=lambda row: row.name) for role in SPLITS}


def _train_name(spec: DataSpec, names: Sequence[str]) -> str | None:
    if not names:
        if spec.train != "train":
            raise FormatError(f"{spec.source}: has no named splits, so none is called {spec.train!r}")
        return None
    found = _named(spec.train, names)
    if found is None:
        raise FormatError(f"{spec.source}: no split is called {spec.train!r}{nearest(spec.train, names)}")
    return found


def _named(wanted: str, names: Collection[str]) -> str | None:
    """``wanted`` itself, or the other usual spelling of it that is there."""
    if wanted in names:
        return wanted
    aliases = next((group for group in SPLITS.values() if wanted in group), ())
    return next((alias for alias in aliases if alias in names), None)


def _source_of(role: str, spec: DataSpec, names: Sequence[str], taken: Mapping[str, str | float]) -> str | float:
    """The split that plays ``role``, or the share of the training rows to cut for it."""
    asked = getattr(spec, role)
    if isinstance(asked, float):
        return asked
    if isinstance(asked, str):
        found = _named(asked, names)
        if found is None:
            raise FormatError(f"{spec.source}: no split is called {asked!r}{nearest(asked, names)}")
        other = next((name for name, split in taken.items() if split == found), None)
        if other is not None:
            raise EpitaxyError(
                f"data.{role}: the split {found!r} is the {other} split already; each needs its own rows"
            )
        return found
    found = _named(role, names)
    if found is None or found in taken.values():
        return DEFAULT_SHARE[role]
    return found


def cut(rows: list[Row], shares: Mapping[str, float], digests: Mapping[int, bytes], spec: DataSpec) -> Parts:
    """Cut the shares from every class alike.  Rows of equal digest, such as copies of a file, stay on one side."""
    if sum(shares.values()) >= 1:
        raise EpitaxyError(
            f"{spec.source}: validation and test take {sum(shares.values()):.0%}, nothing is left to train on"
        )
    by_class: dict[str, dict[bytes, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row.name):
        by_class[str(row.label)][digests.get(id(row), row.name.encode())].append(row)
    parts: Parts = {"train": [], **{role: [] for role in shares}}
    for label in sorted(by_class):
        groups = list(by_class[label].values())
        order = np.random.default_rng([spec.seed, zlib.crc32(label.encode())]).permutation(len(groups))
        count = sum(len(group) for group in groups)
        if len(groups) <= len(shares):
            raise FormatError(
                f"{spec.source}: class {label!r} has {len(groups)} different examples, too few to cut "
                f"{' and '.join(sorted(shares))} from them; add examples or name a split"
            )
        queue = [groups[number] for number in order]
        for role, share in sorted(shares.items()):
            wanted, got = max(1, round(share * count)), 0
            while got < wanted and len(queue) > 1:
                got += len(queue[-1])
                parts[role] += queue.pop()
        parts["train"] += [row for group in queue for row in group]
    return parts


def limit(rows: list[Row], count: int | None, seed: int) -> list[Row]:
    """At most ``count`` rows of every class, chosen by ``seed``."""
    if count is None:
        return rows
    by_class: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_class[str(row.label)].append(number)
    kept: set[int] = set()
    for label, numbers in by_class.items():
        rng = np.random.default_rng([seed, zlib.crc32(label.encode()), 1])
        kept.update(numbers[place] for place in rng.permutation(len(numbers))[:count])
    return [row for number, row in enumerate(rows) if number in kept]


def shared_content(parts: Parts, digests: Mapping[int, bytes]) -> list[str]:
    """Warnings about content that two splits share, with the names of the first pair."""
    warnings = []
    seen = {role: {digests[id(row)]: row.name for row in rows if id(row) in digests} for role, rows in parts.items()}
    for first, second in (("train", "test"), ("train", "validation"), ("validation", "test")):
        common = sorted(seen[first].keys() & seen[second].keys(), key=lambda digest: seen[first][digest])
        if common:
            pair = f"{seen[first][common[0]]} and {seen[second][common[0]]}"
            warnings.append(
                f"{first} and {second} share {len(common)} examples of the same content, the first are {pair}; "
                f"the {second} score will be too good"
            )
    return warnings


def count_classes(rows: Sequence[Row]) -> Counter[str]:
    """How many rows each class has."""
    return Counter(str(row.label) for row in rows)
