"""``epitaxy bench``: carry out a grid of runs, such as a table of a paper, and compare with what was published."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epitaxy.cli import arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from epitaxy.bench.carry_out import Piece
    from epitaxy.bench.grid import Cell, Grid

JSON, MARKDOWN = "grid.json", "grid.md"


def command(
    grid: Annotated[
        str,
        typer.Argument(metavar="GRID", help="A grid file, or a shipped one (ast_petl/table1).", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SCOPE:]KEY=VALUE",
            help="Changes to every cell, or to a row, a column or ROW/COLUMN: ESC-50:data.source=/data/ESC-50.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="Only this row, column or ROW/COLUMN; * stands for anything."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The directory of all runs.", show_default="as the grid says")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and their cost, and run nothing.")] = False,
    probe: Annotated[bool, typer.Option(help="With --dry-run: measure a few steps for the times.")] = True,
    stop: Annotated[bool, typer.Option("--stop", help="Stop at the first run that fails.")] = False,
    json: arguments.Json = False,
) -> None:
    """Carry out a grid of runs and compare it with published numbers.

    Every cell is one or more ordinary run directories, averaged over folds and seeds.  Where the grid says select, each
    value is first tried on validation data, and the best one makes the runs.  The same command again skips what is
    finished and resumes what was interrupted.  The directory gets grid.json, grid.md and grid.html.
    """
    from epitaxy.bench.grid import cells_of, chosen_of, load_grid

    file, loaded = load_grid(grid)
    place = out or loaded.out
    everything = cells_of(file, loaded, (), overrides or (), place)
    cells = chosen_of(file, loaded, everything, only or ())
    if dry_run:
        _list(cells, probe, json)
        return
    _carry_out(file, loaded, cells, everything, place, stop, json)


def _carry_out(
    file: Path, grid: Grid, cells: Sequence[Cell], table: Sequence[Cell], out: Path, stop: bool, json: bool
) -> None:
    """Run ``cells``, trials first; the files tell of the whole ``table``, part of which earlier calls filled."""
    from epitaxy.bench.carry_out import carry_out, ordered
    from epitaxy.cli.console import say
    from epitaxy.core.errors import EpitaxyError
    from epitaxy.report.figures import seconds
    from epitaxy.train.run import leads

    if out.exists() and not out.is_dir():
        raise EpitaxyError(f"{out}: expected a directory for the runs, found a file")
    total, number = sum(len(cell.runs) + len(cell.trials) for cell in cells), 0
    failures: dict[str, str] = {}

    def told(cell: Cell, piece: Piece, result: dict[str, Any] | None, reason: str | None, finished: bool) -> None:
        nonlocal number
        number += 1
        if not leads():
            return
        head = f"[{number}/{total}] {cell.title}, {piece.title}: "
        if result is None:
            failures[f"{cell.title}, {piece.title}"] = str(reason)
            print(f"{head}failed: {reason}", file=sys.stderr, flush=True)
        elif not json:
            scored = _scored(cell.metric, result)
            say(head + scored + (", finished before" if finished else f", {seconds(result.get('train_seconds'))}"))

    try:
        carry_out(cells, told, stop)
    finally:  # an interrupted grid leaves its table too
        if leads() and any(piece.recipe.out.exists() for _, piece in ordered(table)):
            _write(file, grid, table, failures, out, json)
    if failures:
        raise EpitaxyError(f"{len(failures)} of {total} runs failed; the same command goes on where it stopped")


def _scored(metric: str, result: dict[str, Any]) -> str:
    """The test score of a run, the validation score of a trial."""
    if "test" in result:
        return f"{metric} {100 * result['test'].get(metric, float('nan')):.2f} %"
    if result["score"] is None:
        return f"diverged: {result['failed']}"
    return f"validation {result['metric']} {result['score']:.4f}"


def _write(file: Path, grid: Grid, cells: Sequence[Cell], failures: dict[str, str], out: Path, json: bool) -> None:
    from epitaxy.bench.grid_page import build_page
    from epitaxy.bench.groups import COUNTING, group_lines, group_means, markdown_parts
    from epitaxy.bench.outcome import as_json, legend, lines, markdown, outcomes_of
    from epitaxy.bench.paired import caption, difference_tables, markdown_tables, paired
    from epitaxy.cli.console import say, say_json, table
    from epitaxy.core.storage import write_atomically
    from epitaxy.train.run_directory import write_json

    outcomes = outcomes_of(cells)
    found = as_json(file, grid, outcomes, failures)
    found["paired"] = [one.to_dict() for one in paired(grid, outcomes)]
    found["groups"] = [one.to_dict() for one in group_means(grid, outcomes)]
    write_json(out / JSON, found)
    further = [*markdown_parts(grid, outcomes), *markdown_tables(grid, outcomes)]
    write_atomically(out / MARKDOWN, markdown(grid, outcomes, failures, further).encode())
    page = build_page(grid, outcomes, failures, out)
    if json:
        say_json(found)
        return
    columns, rows = lines(grid, outcomes)
    say(f"\n{grid.title}")
    table(columns, rows, columns[1:])
    say(legend(outcomes))
    if (means := group_lines(grid, outcomes)) is not None:
        say("\nMeans of groups")
        table(*means, means[0][1:])
        say(COUNTING)
    for against, names, differences in difference_tables(grid, outcomes):
        say(f"\n{caption(against)}")
        table(names, differences, names[1:])
    say(f"{out / JSON}, {out / MARKDOWN}, {page}")


def _list(cells: Sequence[Cell], probe: bool, json: bool) -> None:
    """Every cell with its method, its cost, and how far its runs are."""
    from epitaxy.bench.carry_out import standing
    from epitaxy.cli.console import say, say_json, table
    from epitaxy.core.errors import EpitaxyError
    from epitaxy.report.figures import count, seconds
    from epitaxy.train.plan import plan

    found: list[dict[str, Any]] = []
    for cell in cells:
        states = [standing(planned) for planned in cell.runs]
        row: dict[str, Any] = {"cell": cell.title, "runs": len(states), "finished": states.count("finished")}
        row |= {"begun": states.count("begun"), "published": cell.published, "problem": None}
        tried = [standing(trial) for trial in cell.trials]
        row |= {"trials": len(tried), "tried": tried.count("finished")}
        row |= {"method": None, "steps": None, "trained_parameters": None, "seconds": None}
        try:
            told = plan(cell.runs[0].recipe, measure=probe, progress=True)
            row |= {"method": told.title, "steps": told.steps, "trained_parameters": told.trained_parameters}
            if told.time is not None:
                row["seconds"] = told.time.total * (len(states) - states.count("finished"))
                row["seconds"] += told.time.training * (len(tried) - tried.count("finished"))
        except EpitaxyError as error:
            row["problem"] = " ".join(str(error).split())
        found.append(row)
    if json:
        say_json(found)
        return
    choosing = any(row["trials"] for row in found)
    names = (*(("trials",) if choosing else ()), "runs", "finished", "steps", "trained parameters", "time left")
    table(
        ["cell", "method", *names],
        [
            [
                row["cell"],
                row["method"] or "?",
                *([f"{row['tried']}/{row['trials']}"] if choosing else []),
                str(row["runs"]),
                str(row["finished"]),
                count(row["steps"]),
                count(row["trained_parameters"]),
                seconds(row["seconds"]),
            ]
            for row in found
        ],
        names,
    )
    total = [row["seconds"] for row in found if row["seconds"] is not None]
    runs, trials = sum(row["runs"] for row in found), sum(row["trials"] for row in found)
    counted = f"{len(found)} cells, {f'{trials} trials, ' if trials else ''}{runs} runs"
    say(counted + (f", about {seconds(sum(total))} left on this machine" if total else ""))
    for row in found:
        if row["problem"]:
            say(f"{row['cell']}: cannot run yet: {row['problem']}")
