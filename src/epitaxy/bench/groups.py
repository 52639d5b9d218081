"""Columns in groups: the mean over each group, and the mean of these means, as VTAB-1k is reported.

A mean of group means is not the mean over all columns where the groups differ in size; both are found in papers, under
one name.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from epitaxy.bench.grid import GROUPS_MEAN, Grid
from epitaxy.bench.outcome import Outcome, shown
from epitaxy.bench.tables import table
from epitaxy.report.figures import count

COUNTING = (
    "Parameters: every number that the optimiser may change, the task head included, averaged over the columns. Parts "
    "that are cut from one set of weights count as these weights, once; what each part has of its own counts for each."
)


def group_means(grid: Grid, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """For each row, the mean over every group of columns, then the mean of these; without a score while one is missing.

    ``over_seeds`` is the spread of the seeds' means.  A published number is the one given for the group, else the mean
    of its columns'.
    """
    groups: dict[str, list[str]] = {}
    for name, column in grid.columns.items():
        if column.group is not None:
            groups.setdefault(column.group, []).append(name)
    found = []
    for row in grid.rows:
        cells = {one.column: one for one in outcomes if one.row == row and one.column in grid.columns}
        if not cells or not groups:
            continue
        told = grid.published.get(row, {})
        means = [
            _mean(row, group, [cells.get(name) for name in names], told.get(group)) for group, names in groups.items()
        ]
        found += means
        if len(means) > 1:
            found.append(_mean(row, GROUPS_MEAN, means, told.get(GROUPS_MEAN)))
    return found


def group_lines(grid: Grid, outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]] | None:
    """The table of group means as text: its columns and its rows; None for a grid without groups."""
    means = group_means(grid, outcomes)
    if not means:
        return None
    columns = list(dict.fromkeys(one.column for one in means))
    at = {(one.row, one.column): one for one in means}
    rows = []
    for row in grid.rows:
        sizes = [one.trained_parameters for one in outcomes if one.row == row and one.trained_parameters is not None]
        if (row, columns[-1]) in at:
            size = round(statistics.fmean(sizes)) if sizes else None
            rows.append([row, *(shown(at[row, column]) for column in columns), count(size)])
    return ["", *columns, "parameters"], rows


def markdown_parts(grid: Grid, outcomes: Sequence[Outcome]) -> list[str]:
    """The table of group means as parts of a page of Markdown."""
    lines = group_lines(grid, outcomes)
    if lines is None:
        return []
    names = ["method", *lines[0][1:]]
    return ["Means of groups of columns:", table([dict(zip(names, row, strict=True)) for row in lines[1]]), COUNTING]


def _mean(row: str, name: str, parts: Sequence[Outcome | None], published: float | None) -> Outcome:
    held = [part for part in parts if part is not None]
    whole = len(held) == len(parts) and all(part.complete and part.score is not None for part in held)
    told = [part.published for part in held if part.published is not None]
    if published is None and len(told) == len(parts):
        published = statistics.fmean(told)
    seeds = _by_seed(held) if whole else {}
    return Outcome(
        row,
        name,
        sum(part.planned for part in held),
        sum(part.finished for part in held),
        statistics.fmean(part.score for part in held if part.score is not None) if whole else None,
        statistics.stdev(seeds.values()) if len(seeds) > 1 else None,
        None,
        published,
        runs=tuple({"fold": None, "seed": seed, "score": score} for seed, score in seeds.items()),
    )


def _by_seed(parts: Sequence[Outcome]) -> Mapping[int, float]:
    """The mean over the parts for every seed that all have, each part averaged over its folds first."""
    tables = []
    for part in parts:
        scores: dict[int, list[float]] = {}
        for run in part.runs:
            scores.setdefault(run["seed"], []).append(float(run["score"]))
        tables.append({seed: statistics.fmean(values) for seed, values in scores.items()})
    common = [seed for seed in tables[0] if all(seed in table for table in tables)] if tables else []
    return {seed: statistics.fmean(table[seed] for table in tables) for seed in common}
