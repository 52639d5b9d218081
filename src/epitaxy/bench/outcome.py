"""What a grid gave: every cell averaged over folds and seeds, beside the published number."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from epitaxy.bench.choosing import Verdict, described, judge
from epitaxy.bench.grid import Cell, Grid, also_title
from epitaxy.bench.tables import table
from epitaxy.core.errors import EpitaxyError
from epitaxy.report.figures import NOTHING
from epitaxy.report.page import normalisation_shown
from epitaxy.train.run_directory import RESULT, read_json

AVERAGE = "Average"
CHOSEN = (
    "Chosen on validation data: every value is trained and measured on the validation split, the best one makes the "
    "runs above. Test data take no part in it."
)
CHOSEN_COLUMNS = ("method", "column", "chosen", "validation")


@dataclass(frozen=True)
class Outcome:
    """One cell; scores are in percent, spreads sample standard deviations in points, None where they cannot be told.

    ``over_seeds`` is the spread of the seeds' means over all folds, ``over_folds`` that of the folds' means over all
    seeds.  ``score`` is the mean of the runs that are finished, ``finished`` of ``planned``.  ``choices`` tells, fold
    by fold, what was chosen on validation data; ``normalisations`` how the pixels of its pictures were normalised.
    """

    row: str
    column: str
    planned: int
    finished: int
    score: float | None
    over_seeds: float | None
    over_folds: float | None
    published: float | None
    metric: str = "accuracy"
    trained_parameters: int | None = None
    file_bytes: int | None = None
    train_seconds: float | None = None
    runs: tuple[Mapping[str, Any], ...] = ()
    choices: tuple[Verdict, ...] = ()
    normalisations: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether all of its runs are finished."""
        return self.finished == self.planned > 0

    @property
    def difference(self) -> float | None:
        """Ours minus the published, in points; only of a complete cell."""
        if not self.complete or self.score is None or self.published is None:
            return None
        return self.score - self.published

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        choices = [choice.to_dict() for choice in self.choices]
        return {**asdict(replace(self, choices=())), "difference": self.difference, "choices": choices}


def outcomes_of(cells: Sequence[Cell]) -> list[Outcome]:
    """What every cell gave in its metric, and behind it what it gave in further ones, each as a column of its own."""
    found = []
    for cell in cells:
        found.append(outcome(cell, cell.metric))
        for metric in cell.also:
            found.append(replace(outcome(cell, metric), column=also_title(cell.column, metric), published=None))
    return found


def outcome(cell: Cell, metric: str) -> Outcome:
    """Read the results of a cell's runs; raises ``EpitaxyError`` when they hold no such metric."""
    found: dict[tuple[int | None, int], float] = {}
    results, runs = [], []
    for planned in cell.runs:
        path = planned.recipe.out / RESULT
        run: dict[str, Any] = {"path": str(planned.recipe.out), "fold": planned.fold, "seed": planned.seed}
        if path.exists():
            result = read_json(path)
            if metric not in result["test"]:
                raise EpitaxyError(f"{path}: holds no metric {metric!r}, but {', '.join(result['test'])}")
            found[planned.fold, planned.seed] = 100 * float(result["test"][metric])
            run["score"] = found[planned.fold, planned.seed]
            results.append(result)
        runs.append(run)
    complete = len(found) == len(cell.runs)
    found_inputs = [one["data"]["normalisation"] for one in results if "normalisation" in one.get("data", {})]
    return Outcome(
        cell.row,
        cell.column,
        len(cell.runs),
        len(found),
        statistics.fmean(found.values()) if found else None,
        _spread(found, 1) if complete else None,
        _spread(found, 0) if complete else None,
        cell.published,
        metric,
        max((result["trained_parameters"] for result in results), default=None),
        max((result["file_bytes"] for result in results), default=None),
        sum(result["train_seconds"] for result in results) if results else None,
        tuple(runs),
        tuple(judge(choice) for choice in cell.choices),
        tuple(dict.fromkeys(normalisation_shown(used) for used in found_inputs)),
    )


def _spread(found: Mapping[tuple[int | None, int], float], which: int) -> float | None:
    """How much the means vary over the folds (0) or the seeds (1)."""
    groups: dict[int | None, list[float]] = {}
    for key, value in found.items():
        groups.setdefault(key[which], []).append(value)
    return statistics.stdev(map(statistics.fmean, groups.values())) if len(groups) > 1 else None


def averages(grid: Grid, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The mean over all columns, for each row; without a score while one is missing."""
    found = []
    for row in grid.rows:
        own = [one for one in outcomes if one.row == row and one.column in grid.columns]
        if not own:
            continue
        whole = len(own) == len(grid.columns)
        scores = [one.score for one in own if one.complete and one.score is not None]
        published = [one.published for one in own if one.published is not None]
        found.append(
            Outcome(
                row,
                AVERAGE,
                sum(one.planned for one in own),
                sum(one.finished for one in own),
                statistics.fmean(scores) if whole and len(scores) == len(own) else None,
                None,
                None,
                statistics.fmean(published) if whole and len(published) == len(own) else None,
            )
        )
    return found


def legend(outcomes: Sequence[Outcome]) -> str:
    """What a cell of the table says."""
    seeds = any(one.over_seeds is not None for one in outcomes)
    folds = any(one.over_folds is not None for one in outcomes)
    spread = " ± standard deviation over seeds" if seeds else " ± standard deviation over folds" if folds else ""
    mean = "mean over folds and seeds" if seeds and folds else "mean over folds" if folds else "mean over seeds"
    mean = mean if seeds or folds else "one run"
    return f"Ours in percent, {mean}{spread}; in brackets the published number and the difference in points."


def shown(one: Outcome | None) -> str:
    """One cell as text: ``86.4 ± 0.5 (88.4, -2.0)``; a dash where nothing is known, ``2/5`` while runs are missing."""
    if one is None:
        return ""
    published = "" if one.published is None else f"{one.published:.1f}"
    if one.score is None:
        return f"{NOTHING} ({published})" if published else NOTHING
    spread = one.over_seeds if one.over_seeds is not None else one.over_folds
    text = f"{one.score:.1f}" + ("" if spread is None else f" ± {spread:.1f}")
    if not one.complete:
        return f"{text} [{one.finished}/{one.planned}]" + (f" ({published})" if published else "")
    return text if one.difference is None else f"{text} ({published}, {one.difference:+.1f})"


def lines(grid: Grid, outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """The table as text: its columns and its rows."""
    everything = [*outcomes, *(averages(grid, outcomes) if grid.average else [])]
    at = {(one.row, one.column): one for one in everything}
    columns = list(dict.fromkeys(one.column for one in everything))
    rows = [name for name in grid.rows if any(row == name for row, _ in at)]
    return ["", *columns], [[row, *(shown(at.get((row, column))) for column in columns)] for row in rows]


def chosen_lines(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """What was chosen in every cell that chooses, as text; the fold is part of the column where there are folds."""
    found = []
    for one in outcomes:
        for verdict in one.choices:
            column = one.column + ("" if verdict.fold is None else f", fold {verdict.fold}")
            chosen = NOTHING if verdict.chosen is None else described(verdict.chosen)
            chosen += f" (the end of the list: {', '.join(verdict.edges)})" if verdict.edges else ""
            scores = "; ".join(f"{described(option['values'])}: {_tried(option)}" for option in verdict.options)
            found.append([one.row, column, chosen, f"{verdict.metric}: {scores}"])
    return found


def input_notes(outcomes: Sequence[Outcome]) -> list[str]:
    """How pixels were normalised, in one note, or in one for each way where the cells differ."""
    cells: dict[str, list[str]] = {}
    for one in outcomes:
        for used in one.normalisations:
            cells.setdefault(used, []).append(f"{one.row} / {one.column}")
    if len(cells) < 2:
        return [f"Pixels in [0, 1] normalised by {used}." for used in cells]
    return [f"Pixels in [0, 1] normalised by {used}: {', '.join(dict.fromkeys(own))}." for used, own in cells.items()]


def _tried(option: Mapping[str, Any]) -> str:
    if option["failed"] is not None:
        return "diverged"
    return NOTHING if option["score"] is None else f"{option['score']:.4f}"


def markdown(grid: Grid, outcomes: Sequence[Outcome], failures: Mapping[str, str], further: Sequence[str] = ()) -> str:
    """The table as a page of Markdown, with ``further`` parts below it."""
    columns, rows = lines(grid, outcomes)
    names = ["method", *columns[1:]]
    parts = [f"# {grid.title}", legend(outcomes), table([dict(zip(names, row, strict=True)) for row in rows])]
    parts += further
    chosen = chosen_lines(outcomes)
    if chosen:
        parts += [CHOSEN, table([dict(zip(CHOSEN_COLUMNS, line, strict=True)) for line in chosen])]
    if failures:
        parts.append("Failed:\n\n" + "\n".join(f"- {run}: {reason}" for run, reason in failures.items()))
    parts += [*input_notes(outcomes), *grid.notes]
    return "\n\n".join(parts) + "\n"


def as_json(file: Path, grid: Grid, outcomes: Sequence[Outcome], failures: Mapping[str, str]) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "grid": file.name,
        "title": grid.title,
        "metric": grid.metric,
        "seeds": list(grid.seeds),
        "cells": [one.to_dict() for one in outcomes],
        "averages": [one.to_dict() for one in averages(grid, outcomes)] if grid.average else [],
        "failures": dict(failures),
        "notes": list(grid.notes),
    }
