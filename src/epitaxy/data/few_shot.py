"""Few-shot training: so many examples of every class, the first in the order of the source or drawn by a seed.

The published protocol (Cappellazzo et al., arXiv 2312.03694) takes the first k items of every class in the order of
the files; validation and test stay whole.  One such choice says little: random draws show how much the result depends
on it.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from epitaxy.core.errors import FormatError
from epitaxy.data.spec import DataSpec, Row, natural_order


def select(labels: Sequence[Hashable], shots: int, seed: int | None = None) -> list[int]:
    """Positions of ``shots`` items of every class, classes in order, all of a class that has fewer.

    Without a ``seed`` the first ones; with one they are drawn, and a larger draw of the same seed contains a smaller.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        places[str(label)].append(place)
    chosen = []
    for label in natural_order(set(places)):
        held = places[label]
        if seed is not None:
            order = np.random.default_rng([seed, zlib.crc32(label.encode()), 2]).permutation(len(held))
            held = [held[number] for number in order]
        chosen += sorted(held[:shots])
    return chosen


def share(rows: Sequence[Row], spec: DataSpec, notes: list[str]) -> list[Row]:
    """``spec.fraction`` of the rows of every class, at least one, drawn by ``spec.seed``; a larger one contains it."""
    if spec.fraction is None:
        return list(rows)
    by_class: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.name):
        by_class[str(row.label)].append(row)
    kept: set[int] = set()
    for label, held in by_class.items():
        order = np.random.default_rng([spec.seed, zlib.crc32(label.encode()), 3]).permutation(len(held))
        kept |= {id(held[number]) for number in order[: max(1, round(spec.fraction * len(held)))]}
    notes.append(
        f"{spec.source}: {len(kept)} of {len(rows)} training examples are used, {spec.fraction:g} of every class, "
        f"drawn with seed {spec.seed}"
    )
    return [row for row in rows if id(row) in kept]


def few_shot(rows: Sequence[Row], order: Mapping[int, int], spec: DataSpec, notes: list[str]) -> list[Row]:
    """The rows that ``spec.shots`` leaves of the training split; ``order`` is each row's place in the source, by id.

    Raises ``FormatError`` for a class with fewer examples, unless ``spec.shots_lacking`` is "all".
    """
    if spec.shots is None:
        return list(rows)
    held: dict[str, int] = defaultdict(int)
    for row in rows:
        held[str(row.label)] += 1
    lacking = [label for label in natural_order(set(held)) if held[label] < spec.shots]
    if lacking:
        told = (
            f"{spec.source}: data.shots: {spec.shots} examples of every class are asked for, class {lacking[0]!r} has "
            f"{held[lacking[0]]}" + (f" and {len(lacking) - 1} more classes lack some" if len(lacking) > 1 else "")
        )
        if spec.shots_lacking == "error":
            raise FormatError(f"{told}; ask for fewer, or take all there are with data.shots_lacking: all")
        notes.append(f"{told}; all there are are taken")
    ordered = sorted(rows, key=lambda row: order[id(row)])
    kept = {id(ordered[place]) for place in select([row.label for row in ordered], spec.shots, spec.shots_seed)}
    how = "the first of the source" if spec.shots_seed is None else f"drawn with seed {spec.shots_seed}"
    notes.append(f"{spec.source}: few-shot: {spec.shots} training examples of every class, {how}")
    return [row for row in rows if id(row) in kept]
