"""Differences between the rows of a grid, run by run: what two methods share, the seed and its data, cancels out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from epitaxy.bench.grid import Grid
from epitaxy.bench.outcome import AVERAGE, Outcome
from epitaxy.bench.tables import table

Runs = Mapping[tuple[int | None, int], float]  # score in percent by (fold, seed)


@dataclass(frozen=True)
class Paired:
    """A row minus the row ``against`` on one column, in points, over the ``pairs`` of runs that both have.

    A pair is a seed, averaged over folds; with one seed it is a fold.  ``error`` is the standard error of the mean
    ``difference``; None for a single pair.
    """

    row: str
    against: str
    column: str
    pairs: int
    difference: float
    error: float | None

    def __str__(self) -> str:
        spread = "" if self.error is None else f" ± {self.error:.1f}"
        return f"{self.difference:+.1f}{spread} ({self.pairs})"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def paired(grid: Grid, outcomes: Sequence[Outcome]) -> list[Paired]:
    """Every row minus every row of ``grid.compare_with``, column by column; unfinished pairs are left out.

    With ``grid.average`` also over all columns: the seeds' mean differences over columns, where no pair is missing.
    """
    scores = {(one.row, one.column): _scores(one) for one in outcomes}
    columns = [name for name in grid.columns if any(column == name for _, column in scores)]
    found = []
    for against in grid.compare_with:
        for row in grid.rows:
            if row == against:
                continue
            by_column = [_differences(scores.get((row, name), {}), scores.get((against, name), {})) for name in columns]
            whole = grid.average and len(columns) == len(grid.columns) and len(columns) > 1
            together = [_over_columns(by_column)] if whole else []
            for name, differences in zip([*columns, AVERAGE], [*by_column, *together], strict=False):
                if differences:
                    values = list(differences.values())
                    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
                    found.append(Paired(row, against, name, len(values), statistics.fmean(values), error))
    return found


def _scores(one: Outcome) -> Runs:
    return {(run["fold"], run["seed"]): float(run["score"]) for run in one.runs if "score" in run}


def _differences(ours: Runs, theirs: Runs) -> dict[int | None, float]:
    """By seed, the mean over the folds; by fold where there is one seed alone."""
    common = {key: ours[key] - theirs[key] for key in ours if key in theirs}
    which = 0 if len({seed for _, seed in common}) == 1 else 1
    groups: dict[int | None, list[float]] = {}
    for key, value in common.items():
        groups.setdefault(key[which], []).append(value)
    return {key: statistics.fmean(values) for key, values in groups.items()}


def _over_columns(by_column: Sequence[Mapping[int | None, float]]) -> dict[int | None, float]:
    """The mean over columns of what all columns have; nothing when they do not have the same pairs."""
    if not by_column or any(set(one) != set(by_column[0]) for one in by_column):
        return {}
    return {key: statistics.fmean(one[key] for one in by_column) for key in by_column[0]}


def difference_tables(grid: Grid, outcomes: Sequence[Outcome]) -> list[tuple[str, list[str], list[list[str]]]]:
    """For each row compared with, its name and the table as text: columns, then rows."""
    everything = paired(grid, outcomes)
    found = []
    for against in grid.compare_with:
        own = {(one.row, one.column): str(one) for one in everything if one.against == against}
        columns = [name for name in [*grid.columns, AVERAGE] if any(column == name for _, column in own)]
        rows = [name for name in grid.rows if any(row == name for row, _ in own)]
        if rows:
            cells = [[row, *(own.get((row, column), "") for column in columns)] for row in rows]
            found.append((against, ["", *columns], cells))
    return found


def caption(against: str) -> str:
    """What a table of differences says."""
    return (
        f"Minus {against}, in points: mean of the differences between runs of the same seed ± its standard error "
        "(number of pairs)"
    )


def markdown_tables(grid: Grid, outcomes: Sequence[Outcome]) -> list[str]:
    """The tables of differences as parts of a page of Markdown."""
    return [
        f"{caption(against)}:\n\n" + table([dict(zip(["method", *columns[1:]], row, strict=True)) for row in rows])
        for against, columns, rows in difference_tables(grid, outcomes)
    ]
