"""Means of groups of columns, and the notes on how pixels were normalised."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from epitaxy.bench.grid import Column, Grid, Row, cells_of, load_grid
from epitaxy.bench.groups import COUNTING, group_lines, group_means
from epitaxy.bench.outcome import Outcome, averages, input_notes
from epitaxy.train.recipe import RecipeError
from tests.bench.test_grid import GRID, grid  # noqa: F401  (a fixture)
from tests.cli.conftest import Epitaxy, epitaxy  # noqa: F401  (a fixture)
from tests.report.page_parser import Page

SCORES = {"a": (60.0, 70.0), "b": (80.0, 82.0), "c": (10.0, 30.0)}


def _grid(**more: object) -> Grid:
    columns = {
        "a": Column(group="Natural"),
        "b": Column(group="Natural"),
        "c": Column(group="Structured"),
        "d": Column(),
    }
    return Grid(title="t", recipe="r", out=Path("o"), rows={"M": Row()}, columns=columns, **more)  # type: ignore[arg-type]


def _outcome(
    column: str, scores: tuple[float, ...] | None = None, published: float | None = None, size: int = 9
) -> Outcome:
    scores = SCORES[column] if scores is None else scores
    runs = tuple({"fold": None, "seed": seed, "score": score} for seed, score in enumerate(scores))
    mean = statistics.fmean(scores) if scores else None
    return Outcome("M", column, 2, len(scores), mean, None, None, published, trained_parameters=size, runs=runs)


def test_a_mean_of_group_means_is_not_the_mean_of_columns() -> None:
    found = {one.column: one for one in group_means(_grid(), [_outcome(name) for name in "abc"])}
    assert list(found) == ["Natural", "Structured", "Mean of groups"]
    assert [one.score for one in found.values()] == [73.0, 20.0, 46.5]
    assert found["Natural"].over_seeds == pytest.approx(statistics.stdev([70.0, 76.0]))
    assert found["Mean of groups"].over_seeds == pytest.approx(statistics.stdev([(70 + 10) / 2, (76 + 30) / 2]))
    columns, rows = group_lines(
        _grid(), [_outcome("a", size=100), _outcome("b", size=200), _outcome("c", size=900)]
    ) or ([], [])
    assert columns == ["", "Natural", "Structured", "Mean of groups", "parameters"]
    assert rows == [["M", "73.0 ± 4.2", "20.0 ± 14.1", "46.5 ± 9.2", "400"]]


def test_an_unfinished_column_leaves_its_group_without_a_score() -> None:
    found = {one.column: one for one in group_means(_grid(), [_outcome("a"), _outcome("b", (80.0,)), _outcome("c")])}
    assert (found["Natural"].score, found["Structured"].score, found["Mean of groups"].score) == (None, 20.0, None)
    missing = {one.column: one for one in group_means(_grid(), [_outcome("a"), _outcome("c")])}
    assert (missing["Natural"].score, missing["Mean of groups"].score) == (None, None)


def test_published_numbers_of_groups() -> None:
    given = _grid(published={"M": {"Natural": 75.0, "Structured": 21.0}})
    found = {one.column: one for one in group_means(given, [_outcome(name) for name in "abc"])}
    assert (found["Natural"].published, found["Natural"].difference) == (75.0, -2.0)
    assert found["Mean of groups"].published == 48.0
    own = {
        one.column: one for one in group_means(_grid(), [_outcome(name, published=50.0 + len(name)) for name in "abc"])
    }
    assert own["Natural"].published == 51.0
    rounded = _grid(published={"M": {"Natural": 75.0, "Structured": 21.0, "Mean of groups": 48.1}})
    assert group_means(rounded, [_outcome(name) for name in "abc"])[-1].published == 48.1


def test_a_grid_without_groups_has_no_table_of_them() -> None:
    plain = Grid(title="t", recipe="r", out=Path("o"), rows={"M": Row()}, columns={"a": Column()})
    assert group_means(plain, [_outcome("a")]) == []
    assert group_lines(plain, [_outcome("a")]) is None
    assert averages(plain, [_outcome("a")])[0].score == 65.0


def test_mistakes_are_named(grid: Path) -> None:  # noqa: F811
    with_group = GRID.replace("curve: Digits, at: 2", "group: Small, curve: Digits, at: 2")
    grid.write_text(with_group.replace("{two: 30.0, four: 40.0}", "{Smal: 30.0}"))
    with pytest.raises(RecipeError, match=r"published: no column is called 'Smal'; did you mean 'Small'"):
        load_grid(str(grid))
    grid.write_text(with_group.replace("group: Small", "group: four"))
    with pytest.raises(RecipeError, match=r"a group may not be called 'four', a column is"):
        load_grid(str(grid))


def test_notes_on_normalisation() -> None:
    from dataclasses import replace

    same = [replace(_outcome(name), normalisations=("half: mean 0.5",)) for name in "ab"]
    assert input_notes(same) == ["Pixels in [0, 1] normalised by half: mean 0.5."]
    mixed = [*same, replace(_outcome("c"), normalisations=("none: mean 0",))]
    assert input_notes(mixed) == [
        "Pixels in [0, 1] normalised by half: mean 0.5: M / a, M / b.",
        "Pixels in [0, 1] normalised by none: mean 0: M / c.",
    ]
    assert input_notes([_outcome("a")]) == []


def test_the_page_has_groups_and_normalisation(grid: Path, epitaxy: Epitaxy) -> None:  # noqa: F811
    text = GRID.replace("curve: Digits, at: 2", "group: Small").replace("curve: Digits, at: 4", "group: Large")
    grid.write_text(text.replace("seeds: [0, 1]", "seeds: [0]"))
    done = epitaxy("bench", grid, "train.steps=1", "data.image.normalisation=none", "--only", "Probe")
    assert done.code == 0, done.err
    assert "Means of groups" in done.out
    found = json.loads(Path("runs/digits/grid.json").read_text())
    scores = {cell["column"]: cell["score"] for cell in found["cells"] if cell["row"] == "Probe"}
    means = {one["column"]: one["score"] for one in found["groups"] if one["row"] == "Probe"}
    assert means == {
        "Small": scores["two"],
        "Large": scores["four"],
        "Mean of groups": statistics.fmean(scores.values()),
    }
    page = Path("runs/digits/grid.html").read_text()
    markdown = Path("runs/digits/grid.md").read_text()
    for place in (page, markdown):
        assert COUNTING in place
        assert "Pixels in [0, 1] normalised by none: mean 0, 0, 0; std 1, 1, 1." in place
    assert Page(Path("runs/digits/grid.html")).faults == []
    assert cells_of(*load_grid(str(grid)))[0].published == 30.0
