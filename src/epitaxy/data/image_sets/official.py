"""What the readers of picture sets share: official numbers, and validation data cut from training where there are none.

Validation data are never the test split.  Protocol ``select`` holds a tenth of the training pictures of every class
back, drawn by ``data.seed``, or takes the validation split that the set has; ``final`` trains on all of them and
validates on none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from epitaxy.core.errors import EpitaxyError, FormatError, nearest
from epitaxy.data.divide import cut
from epitaxy.data.layout import chosen_protocol, refuse_fold, verify
from epitaxy.data.spec import FINAL, SELECT, DataSpec, Pool, natural_order
from epitaxy.data.stored import Tree

PROTOCOLS = (SELECT, FINAL)
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Official:
    """A set as published: its classes, and the pictures of every split."""

    kind: str
    title: str
    classes: int
    counts: Mapping[str, int]


def protocol_of(spec: DataSpec, title: str) -> str:
    """The protocol asked for; picture sets have no folds."""
    refuse_fold(spec, title)
    return chosen_protocol(spec, title, PROTOCOLS)


def task_of(spec: DataSpec, title: str, known: Mapping[str, object]) -> str:
    """The set that ``spec.task`` names; raises ``EpitaxyError`` when it is missing or unknown."""
    if spec.task is None:
        raise EpitaxyError(f"data.task: {title} holds {len(known)} sets; name one: {', '.join(known)}")
    if spec.task not in known:
        raise EpitaxyError(f"data.task: {title} has no set {spec.task!r}{nearest(spec.task, known)}")
    return spec.task


def settle(pool: Pool, spec: DataSpec, official: Official, root: str) -> Pool:
    """Check ``pool``, whose rows are in the splits of ``official``, and divide it as the protocol says."""
    protocol = protocol_of(spec, official.title)
    if pool.modality != "vision":
        raise FormatError(f"{root}: {official.title} holds pictures, found {pool.modality}")
    counts = Counter(row.split for row in pool.rows)
    classes = {str(row.label) for row in pool.rows}
    expected = {f"pictures of {split}": (counts[split], count) for split, count in official.counts.items()}
    verify(pool, Tree(root), spec, {"classes": (len(classes), official.classes), **expected})
    pool.kind, pool.settled = official.kind, True
    pool.declared = pool.declared or natural_order(classes)
    if protocol == FINAL:
        for row in pool.rows:
            row.split = "train" if row.split == "validation" else row.split
        pool.notes.append(f"{root}: protocol final: all training pictures train, none validate")
    elif not counts["validation"]:
        rows = [row for row in pool.rows if row.split == "train"]
        for row in cut(rows, {"validation": VALIDATION_SHARE}, {}, spec)["validation"]:
            row.split = "validation"
        pool.notes.append(f"{root}: validation is a tenth of the training pictures of every class, drawn by seed")
    return pool
