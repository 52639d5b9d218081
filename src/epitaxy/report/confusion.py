"""The confusion matrix as a table, the scores of each class, and the pairs confused most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from epitaxy.report.figures import percent

FITS = 20  # classes that a table with numbers can show


@dataclass(frozen=True)
class Cell:
    """A count, and its share of the row, which sets the shade."""

    count: int
    share: float
    told: str


@dataclass(frozen=True)
class ClassScore:
    """How one class fared."""

    name: str
    examples: int
    recall: str
    precision: str


@dataclass(frozen=True)
class Confusion:
    """Everything the page shows of a confusion matrix ``[target][prediction]``."""

    classes: Sequence[str]
    rows: list[list[Cell]]
    scores: list[ClassScore]
    pairs: list[tuple[str, str, int]]
    numbers: bool


def confusion_of(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Confusion:
    """Prepare a matrix for the page."""
    rows, scores = [], []
    for true, row in enumerate(counts):
        total = sum(row)
        rows.append(
            [
                Cell(count, count / total if total else 0.0, f"{classes[true]} taken for {classes[said]}: {count}")
                for said, count in enumerate(row)
            ]
        )
        predicted = sum(line[true] for line in counts)
        scores.append(
            ClassScore(
                classes[true],
                total,
                percent(row[true] / total if total else None),
                percent(row[true] / predicted if predicted else None),
            )
        )
    pairs = [
        (classes[true], classes[said], count)
        for true, row in enumerate(counts)
        for said, count in enumerate(row)
        if true != said and count
    ]
    pairs.sort(key=lambda pair: -pair[2])
    return Confusion(classes, rows, scores, pairs[:8], len(classes) <= FITS)
