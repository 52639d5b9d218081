"""A grid as one page: the table beside the published numbers, curves over the number of examples, accuracy and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from epitaxy.bench.grid import Grid, slug
from epitaxy.bench.groups import COUNTING, group_lines
from epitaxy.bench.outcome import CHOSEN, CHOSEN_COLUMNS, Outcome, averages, chosen_lines, input_notes, legend
from epitaxy.bench.paired import caption, difference_tables
from epitaxy.core.storage import write_atomically
from epitaxy.report import build_comparison
from epitaxy.report.charts import Mark, Series, line_chart, point_chart
from epitaxy.report.page import PAGE, render
from epitaxy.train.run_directory import RESULT


def build_page(
    grid: Grid, outcomes: Sequence[Outcome], failures: Mapping[str, str], out: Path, file: str = "grid.html"
) -> Path:
    """Write the page of a grid to ``out``, and beside it a comparison of the runs of every column."""
    everything = [*outcomes, *(averages(grid, outcomes) if grid.average else [])]
    at = {(one.row, one.column): one for one in everything}
    columns = list(dict.fromkeys(one.column for one in everything))
    page = render(
        "grid.html.j2",
        title=grid.title,
        legend=legend(outcomes),
        columns=[(name, _comparison(name, outcomes, out) if name in grid.columns else None) for name in columns],
        rows=[
            (row, [at.get((row, column)) for column in columns])
            for row in grid.rows
            if any(one.row == row for one in everything)
        ],
        groups=group_lines(grid, outcomes),
        counting=COUNTING,
        curves=curves(grid, outcomes),
        sizes=[
            (name, _sizes(name, outcomes)) for name in columns if name in grid.columns and _finished(name, outcomes)
        ],
        runs=[(one, [(run, _link(run, out)) for run in one.runs]) for one in outcomes],
        differences=[(caption(against), names, lines) for against, names, lines in difference_tables(grid, outcomes)],
        chosen=chosen_lines(outcomes),
        chosen_legend=CHOSEN,
        chosen_columns=CHOSEN_COLUMNS,
        failures=failures,
        notes=[*input_notes(outcomes), *grid.notes],
    )
    write_atomically(out / file, page.encode())
    return out / file


def curves(grid: Grid, outcomes: Sequence[Outcome]) -> list[tuple[str, Markup]]:
    """(heading, chart) for every curve of the grid: ours, and the published one where there is one."""
    places = {name: (column.curve, column.at) for name, column in grid.columns.items() if column.curve is not None}
    found = []
    for curve in dict.fromkeys(curve for curve, _ in places.values()):
        for heading, values in (
            (f"{curve}: ours", [(one, one.score if one.complete else None) for one in outcomes]),
            (f"{curve}: published", [(one, one.published) for one in outcomes]),
        ):
            series = []
            for row in grid.rows:
                points = [
                    (float(places[one.column][1] or 0), value)
                    for one, value in values
                    if one.row == row and places.get(one.column, ("", 0))[0] == curve and value is not None
                ]
                series.append(Series(row, sorted(points)))
            if any(line.points for line in series):
                chart = line_chart(series, heading, "training examples of each class", "accuracy in percent", log=True)
                found.append((heading, chart))
    return found


def _finished(column: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [one for one in outcomes if one.column == column and one.score is not None]


def _sizes(column: str, outcomes: Sequence[Outcome]) -> Markup:
    marks = [
        Mark(one.row, float(one.trained_parameters or 0), one.score or 0.0, _spread(one), _singles(one))
        for one in _finished(column, outcomes)
    ]
    metric = _finished(column, outcomes)[0].metric.replace("_", " ")
    return point_chart(marks, f"{column}: {metric} against size", "trained parameters", f"test {metric} in percent")


def _spread(one: Outcome) -> float:
    return one.over_seeds or one.over_folds or 0.0


def _singles(one: Outcome) -> list[float]:
    return [float(run["score"]) for run in one.runs if "score" in run]


def _comparison(column: str, outcomes: Sequence[Outcome], out: Path) -> str | None:
    """The page that compares the finished runs of a column, by its name relative to ``out``."""
    paths = [Path(run["path"]) for one in _finished(column, outcomes) for run in one.runs]
    paths = [path for path in paths if (path / RESULT).exists()]
    if not paths:
        return None
    name = f"{slug(column)}.html"
    build_comparison(paths, out / name, column)
    return name


def _link(run: Mapping[str, Any], out: Path) -> str | None:
    page = Path(run["path"]) / PAGE
    if not page.is_file():
        return None
    try:
        return page.resolve().relative_to(out.resolve()).as_posix()
    except ValueError:
        return None
