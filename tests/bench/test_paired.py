"""Differences between rows of a grid: paired by seed, averaged over folds, with their standard error."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import pytest

from epitaxy.bench.grid import Column, Grid, Row
from epitaxy.bench.outcome import AVERAGE, Outcome
from epitaxy.bench.paired import Paired, difference_tables, paired
from epitaxy.train.run_directory import read_json
from tests.bench.test_grid import GRID, grid  # noqa: F401  (a fixture)
from tests.cli.conftest import Epitaxy, epitaxy  # noqa: F401  (a fixture)
from tests.report.page_parser import Page

Scores = Mapping[tuple[int | None, int], float]


def _grid(columns: tuple[str, ...] = ("one", "two"), average: bool = True) -> Grid:
    return Grid(
        title="A title",
        recipe="base.yaml",
        out=Path("out"),
        rows={name: Row() for name in ("dense", "sparse", "other")},
        columns={name: Column() for name in columns},
        compare_with=("dense",),
        average=average,
    )


def _outcome(row: str, column: str, scores: Scores) -> Outcome:
    runs = [{"fold": fold, "seed": seed, "score": value} for (fold, seed), value in scores.items()]
    return Outcome(row, column, len(runs) + 1, len(runs), 0.0, None, None, None, runs=(*runs, {"fold": 9, "seed": 9}))


def test_differences_are_paired_by_seed_whatever_the_order() -> None:
    dense = {(None, 0): 50.0, (None, 1): 70.0, (None, 2): 90.0}
    sparse = {(None, 2): 93.0, (None, 1): 71.0, (None, 0): 51.0, (None, 3): 10.0}  # seed 3 has no partner
    found = paired(_grid(("one",)), [_outcome("dense", "one", dense), _outcome("sparse", "one", sparse)])
    error = statistics.stdev([1.0, 1.0, 3.0]) / math.sqrt(3)  # the spread of either row by itself is twenty points
    assert found == [Paired("sparse", "dense", "one", 3, pytest.approx(5 / 3), pytest.approx(error))]
    assert str(found[0]) == "+1.7 ± 0.7 (3)"


def test_folds_are_averaged_before_seeds_are_compared() -> None:
    dense = {(fold, seed): 10.0 * fold + seed for fold in (1, 2) for seed in (0, 1)}
    sparse = {key: value + {(1, 0): 1, (1, 1): 2, (2, 0): 3, (2, 1): 6}[key] for key, value in dense.items()}
    (one,) = paired(_grid(("one",)), [_outcome("dense", "one", dense), _outcome("sparse", "one", sparse)])
    assert (one.pairs, one.difference) == (2, pytest.approx(3.0))  # seeds: 2 and 4
    assert one.error == pytest.approx(statistics.stdev([2.0, 4.0]) / math.sqrt(2))

    def first(scores: Scores) -> Scores:
        return {key: value for key, value in scores.items() if key[1] == 0}

    (one,) = paired(_grid(("one",)), [_outcome("dense", "one", first(dense)), _outcome("sparse", "one", first(sparse))])
    assert (one.pairs, one.difference) == (2, pytest.approx(2.0))  # one seed: the folds 1 and 3
    assert one.error == pytest.approx(1.0)


def test_the_average_is_paired_too_and_needs_the_same_seeds_everywhere() -> None:
    outcomes = [
        _outcome("dense", "one", {(None, 0): 50.0, (None, 1): 60.0}),
        _outcome("dense", "two", {(None, 0): 80.0, (None, 1): 90.0}),
        _outcome("sparse", "one", {(None, 0): 54.0, (None, 1): 58.0}),
        _outcome("sparse", "two", {(None, 0): 78.0, (None, 1): 94.0}),
        _outcome("other", "one", {(None, 0): 51.0, (None, 1): 61.0}),
        _outcome("other", "two", {(None, 0): 81.0}),
    ]
    found = {(one.row, one.column): one for one in paired(_grid(), outcomes)}
    mean = found["sparse", AVERAGE]  # seed 0: +4 and -2, seed 1: -2 and +4
    assert (mean.pairs, mean.difference, mean.error) == (2, pytest.approx(1.0), pytest.approx(0.0))
    assert ("other", AVERAGE) not in found
    assert found["other", "two"].error is None
    assert str(found["other", "two"]) == "+1.0 (1)"
    ((against, columns, rows),) = difference_tables(_grid(), outcomes)
    assert (against, columns) == ("dense", ["", "one", "two", AVERAGE])
    assert rows[1] == ["other", "+1.0 ± 0.0 (2)", "+1.0 (1)", ""]
    assert AVERAGE not in {one.column for one in paired(_grid(average=False), outcomes)}


def test_the_command_shows_them_everywhere(grid: Path, epitaxy: Epitaxy) -> None:  # noqa: F811
    grid.write_text(GRID + "compare_with: Probe\n")
    said = epitaxy("bench", grid, "--only", "two")
    assert said.code == 0, said.err
    found = json.loads(Path("runs/digits/grid.json").read_text())
    scores = {
        (row, seed): 100 * read_json(Path(f"runs/digits/{row}/two/seed{seed}/result.json"))["test"]["accuracy"]
        for row in ("probe", "lora")
        for seed in (0, 1)
    }
    differences = [scores["lora", seed] - scores["probe", seed] for seed in (0, 1)]
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(2)
    (one,) = found["paired"]
    assert (one["row"], one["against"], one["column"], one["pairs"]) == ("LoRA", "Probe", "two", 2)
    assert (one["difference"], one["error"]) == (pytest.approx(mean), pytest.approx(error))
    wanted = f"{mean:+.1f} ± {error:.1f} (2)"
    assert "Minus Probe, in points" in said.out
    assert wanted in said.out
    assert f"| LoRA | {wanted} |" in Path("runs/digits/grid.md").read_text()
    page = Page(Path("runs/digits/grid.html"))
    assert page.faults == []
    assert wanted in page.text
