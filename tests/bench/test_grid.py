"""Grids: files to cells, cells to runs, runs to a table beside the published numbers."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from epitaxy.bench import carry_out as carrying
from epitaxy.bench import grid_page
from epitaxy.bench.grid import cells_of, load_grid
from epitaxy.bench.outcome import Outcome, averages, lines, outcome, outcomes_of, shown
from epitaxy.core.errors import EpitaxyError
from epitaxy.train.recipe import RecipeError
from epitaxy.train.run_directory import write_json
from tests.cli.conftest import Epitaxy, epitaxy  # noqa: F401  (a fixture)
from tests.report.page_parser import Page

BASE = """\
# The base of the grid
base: reference-vit
train: {batch: 8, steps: 3, log_every: 1, learning_rate: 1e-3}
samples: 0
"""
GRID = """\
# Two methods on two few-shot settings of the shipped digits
title: Digits
recipe: base.yaml
out: runs/digits
seeds: [0, 1]
rows:
  Probe: probe.yaml
  LoRA:
    set:
      method: [{method: lora, rank: 2}, head]
      train.learning_rate: 1e-2
columns:
  two: {set: {data: {source: "builtin:digits", limit_evaluation_per_class: 3, shots: 2}}, curve: Digits, at: 2}
  four: {set: {data: {source: "builtin:digits", limit_evaluation_per_class: 3, shots: 4}}, curve: Digits, at: 4}
cells:
  LoRA: {four: {method.lora.rank: 4, train.steps: 5}}
published:
  Probe: {two: 30.0, four: 40.0}
  LoRA: {two: 35.5}
average: true
notes: [The published numbers are made up.]
"""


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "probe.yaml").write_text("extends: base.yaml\nname: probe\nmethod: head\n")
    file = tmp_path / "grid.yaml"
    file.write_text(GRID)
    return file


def test_a_cell_is_base_row_column_and_exception(grid: Path) -> None:
    cells = {cell.title: cell for cell in cells_of(*load_grid(str(grid)))}
    assert list(cells) == ["Probe / two", "LoRA / two", "Probe / four", "LoRA / four"]
    plain, special = (cells[name].runs[1].recipe for name in ("LoRA / two", "LoRA / four"))
    assert (plain.method[0]["rank"], plain.train.steps, plain.data.shots) == (2, 3, 2)
    assert (special.method[0]["rank"], special.train.steps, special.data.shots) == (4, 5, 4)
    assert (plain.train.learning_rate, plain.train.batch, plain.train.seed) == (1e-2, 8, 1)
    assert plain.out == Path("runs/digits/lora/two/seed1")
    assert cells["Probe / four"].runs[0].recipe.train.learning_rate == 1e-3
    assert [cell.published for cell in cells.values()] == [30.0, 35.5, 40.0, None]


def test_folds_seed_keys_and_skipped_cells(grid: Path) -> None:
    grid.write_text(
        GRID.replace("seeds: [0, 1]", "seeds: [3]\nseed_keys: [train.seed, data.shots_seed]")
        .replace("curve: Digits, at: 4", "folds: [1, 4]")
        .replace('"builtin:digits", limit_evaluation_per_class: 3, shots: 4', "set, kind: esc50, shots: 4")
        .replace("{method.lora.rank: 4, train.steps: 5}", "{skip: true}")
    )
    cells = cells_of(*load_grid(str(grid)))
    assert [cell.title for cell in cells] == ["Probe / two", "LoRA / two", "Probe / four"]
    runs = cells[-1].runs
    assert [(run.fold, run.recipe.data.fold, run.recipe.data.shots_seed, run.recipe.train.seed) for run in runs] == [
        (1, 1, 3, 3),
        (4, 4, 3, 3),
    ]
    assert runs[1].recipe.out.name == "fold4-seed3"


def test_a_seed_may_set_the_seed_of_a_method(grid: Path) -> None:
    grid.write_text(
        GRID.replace("{method: lora, rank: 2}", "{method: mosa_lora, rank: 4}")
        .replace("method.lora.rank: 4", "train.batch: 4")
        .replace("seeds: [0, 1]", "seeds: [3, 5]\nseed_keys: [train.seed, method.mosa_lora.seed]")
    )
    cells = {cell.title: cell for cell in cells_of(*load_grid(str(grid)))}
    for cell in ("LoRA / two", "LoRA / four"):
        found = [(run.recipe.train.seed, run.recipe.method[0]["seed"]) for run in cells[cell].runs]
        assert found == [(3, 3), (5, 5)]
    assert [run.recipe.train.seed for run in cells["Probe / two"].runs] == [3, 5]


def test_only_and_scoped_overrides(grid: Path) -> None:
    file, loaded = load_grid(str(grid))
    assert [cell.title for cell in cells_of(file, loaded, ["l*/two"])] == ["LoRA / two"]
    assert len(cells_of(file, loaded, ["two", "Probe"])) == 3
    cells = cells_of(file, loaded, (), ["train.batch=2", "LoRA:train.steps=9", "Probe/four:data.shots=1"])
    found = [(c.runs[0].recipe.train.batch, c.runs[0].recipe.train.steps, c.runs[0].recipe.data.shots) for c in cells]
    assert found == [(2, 3, 2), (2, 9, 2), (2, 3, 1), (2, 9, 4)]
    with pytest.raises(RecipeError, match=r"no cell is called 'Prob'; did you mean 'Probe'"):
        cells_of(file, loaded, ["Prob"])
    with pytest.raises(RecipeError, match=r"no cell is called 'thre'"):
        cells_of(file, loaded, (), ["thre:train.steps=1"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title: Digits", "titel: Digits", r"'titel' is no key of a grid; did you mean 'title'"),
        ("  LoRA: {two: 35.5}", "  LORA: {two: 35.5}", r"published: no row is called 'LORA'; did you mean 'LoRA'"),
        ("{two: 35.5}", "{tow: 35.5}", r"published: no column is called 'tow'; did you mean 'two'"),
        ("{two: 35.5}", "{two: 135.5}", r"published.LoRA.two: input should be less than or equal to 100"),
        ("  Probe: probe.yaml", "  Probe: prob.yaml", r"rows.Probe.recipe: .*prob.yaml: no such recipe file"),
        (", at: 2}", "}", r"columns.two: curve and at belong together"),
        ("method.lora.rank: 4", "method.lora.rnk: 4", r"cells.LoRA.four: method 'lora' has no field 'rnk'"),
        ("  LoRA:\n", "  probe: {}\n  LoRA:\n", r"rows: 'Probe' cannot name a directory of its own"),
        ("average: true", "metric: UA", r"metric: no metric is called 'UA'; did you mean 'unweighted_accuracy'"),
        ("curve: Digits, at: 4", "also: [WA]", r"columns.four: no metric is called 'WA'; did you mean 'accuracy'"),
        ("average: true", "seed_keys: [method.lra.seed]", r"seed_keys: method.lra.seed: no method is called 'lra'"),
        ("average: true", "compare_with: Prob", r"compare_with: no row is called 'Prob'; did you mean 'Probe'"),
        ("rows:\n", "lines:\n", r"not a grid: expected the keys recipe, rows and columns"),
    ],
)
def test_mistakes_are_named(grid: Path, old: str, new: str, said: str) -> None:
    assert old in GRID
    grid.write_text(GRID.replace(old, new))
    with pytest.raises(RecipeError, match=said):
        cells_of(*load_grid(str(grid)))


def test_a_grid_is_no_recipe(grid: Path, epitaxy: Epitaxy) -> None:  # noqa: F811
    said = epitaxy("train", grid)
    assert said.code == 1
    assert "a grid of runs, not a recipe; carry it out with epitaxy bench" in said.err


def test_a_grid_of_pictures_runs_resumes_and_tells(grid: Path, epitaxy: Epitaxy) -> None:  # noqa: F811
    listed = epitaxy("bench", grid, "--dry-run", "--no-probe", "--only", "LoRA")
    assert listed.code == 0, listed.err
    assert re.search(r"LoRA / four +lora \(rank 4\) \+ head +2 +0 +5 ", listed.out)
    assert not Path("runs").exists()

    first = epitaxy("bench", grid, "--only", "Probe/two")
    assert first.code == 0, first.err
    assert "[2/2] Probe / two, seed 1: accuracy" in first.out
    kept = Path("runs/digits/probe/two/seed0/result.json").stat().st_mtime_ns
    partial = json.loads(Path("runs/digits/grid.json").read_text())
    assert [cell["finished"] for cell in partial["cells"]] == [2, 0, 0, 0]
    assert partial["averages"][0]["score"] is None

    whole = epitaxy("bench", grid)
    assert whole.code == 0, whole.err
    assert whole.out.count("finished before") == 2
    assert Path("runs/digits/probe/two/seed0/result.json").stat().st_mtime_ns == kept
    found = json.loads(Path("runs/digits/grid.json").read_text())
    for cell in found["cells"]:
        results = [json.loads((Path(run["path"]) / "result.json").read_text()) for run in cell["runs"]]
        scores = [100 * result["test"]["accuracy"] for result in results]
        assert cell["score"] == pytest.approx(statistics.fmean(scores))
        assert cell["over_seeds"] == pytest.approx(statistics.stdev(scores))
        assert cell["over_folds"] is None
        assert results[0]["data"]["counts"]["train"] == (20 if cell["column"] == "two" else 40)
    two = found["cells"][0]
    assert two["difference"] == pytest.approx(two["score"] - 30.0)
    assert found["averages"][0]["published"] == 35.0
    assert found["averages"][1]["published"] is None  # not all columns have a published number
    text = Path("runs/digits/grid.md").read_text()
    assert f"| Probe | {two['score']:.1f} ± {two['over_seeds']:.1f} (30.0, {two['difference']:+.1f}) |" in text
    assert "standard deviation over seeds" in text
    assert Page(Path("runs/digits/grid.html")).faults == []
    assert Page(Path("runs/digits/two.html")).faults == []
    page = Path("runs/digits/grid.html").read_text()
    assert page.count("<svg") == 4  # two curves, and accuracy against size in both columns
    assert "Digits: published" in page
    assert 'href="probe/two/seed0/report.html"' in page
    assert 'href="two.html"' in page
    assert not list(Path("runs").rglob("checkpoints"))


def test_an_interrupted_cell_is_resumed(grid: Path, epitaxy: Epitaxy, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from epitaxy.train.session import Session

    step = Session.step

    def interrupted(self: Session, batches: Any) -> Any:
        if self.standing.step == 2:
            raise KeyboardInterrupt
        return step(self, batches)

    words = ("bench", grid, "train.checkpoint_every=1", "--only", "LoRA/two")
    monkeypatch.setattr(Session, "step", interrupted)
    assert epitaxy(*words).code == 130
    assert Path("runs/digits/grid.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(grid.parent)
    again = epitaxy(*words)
    assert again.code == 0, again.err
    assert "going on at step 2 of 3" in again.err


def test_a_failing_cell_is_named_and_the_others_go_on(grid: Path, epitaxy: Epitaxy) -> None:  # noqa: F811
    words = ("bench", grid, "two:data.source=nowhere/digits.zip", "train.steps=1", "four:data.shots=1")
    failed = epitaxy(*words)
    assert failed.code == 1
    assert failed.err.count("failed: nowhere/digits.zip: no such file or folder") == 4
    assert failed.err.strip().splitlines()[-1].startswith("error: 4 of 8 runs failed")
    found = json.loads(Path("runs/digits/grid.json").read_text())
    assert [cell["finished"] for cell in found["cells"]] == [0, 0, 2, 2]
    assert "Probe / two, seed 0" in found["failures"]
    assert "Runs that failed the last time" in Path("runs/digits/grid.html").read_text()
    stopped = epitaxy(*words, "--stop", "--out", "other")
    assert stopped.code == 1
    assert "error: 1 of 8 runs failed" in stopped.err
    problem = epitaxy("bench", grid, "two:data.source=nowhere/digits.zip", "--dry-run", "--no-probe", "--only", "two")
    assert "Probe / two: cannot run yet: nowhere/digits.zip: no such file or folder" in problem.out


def test_data_are_read_once_for_runs_that_share_them(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    load = carrying.load_splits
    monkeypatch.setattr(carrying, "load_splits", lambda spec: reads.append(spec) or load(spec))
    cells = cells_of(*load_grid(str(grid)), [], ["train.steps=1"])
    assert carrying.carry_out(cells, lambda *_: None, progress=False) == {}
    assert [spec.shots for spec in reads] == [2, 4]


def test_means_and_spreads_of_folds_and_seeds(grid: Path, tmp_path: Path) -> None:
    grid.write_text(
        GRID.replace("curve: Digits, at: 4", "folds: [1, 2, 3]").replace(
            '"builtin:digits", limit_evaluation_per_class: 3', "set, kind: esc50"
        )
    )
    cell = cells_of(*load_grid(str(grid)), ["Probe/four"])[0]
    scores = {(1, 0): 0.5, (1, 1): 0.7, (2, 0): 0.6, (2, 1): 0.6, (3, 0): 0.9, (3, 1): 0.5}
    for planned in cell.runs[:-1]:
        _result(planned.recipe.out, scores[planned.fold or 0, planned.seed])
    partly = outcome(cell, "accuracy")
    assert (partly.finished, partly.planned, partly.over_folds, partly.difference) == (5, 6, None, None)
    assert shown(partly) == "66.0 [5/6] (40.0)"
    _result(cell.runs[-1].recipe.out, scores[3, 1])
    whole = outcome(cell, "accuracy")
    assert whole.score == pytest.approx(100 * statistics.fmean(scores.values()))
    by_seed = [statistics.fmean(value for (_, seed), value in scores.items() if seed == one) for one in (0, 1)]
    by_fold = [statistics.fmean(value for (fold, _), value in scores.items() if fold == one) for one in (1, 2, 3)]
    assert whole.over_seeds == pytest.approx(100 * statistics.stdev(by_seed))
    assert whole.over_folds == pytest.approx(100 * statistics.stdev(by_fold))
    assert whole.difference == pytest.approx(whole.score - 40.0)
    with pytest.raises(EpitaxyError, match=r"holds no metric 'recall', but accuracy"):
        outcome(cell, "recall")


def _result(out: Path, accuracy: float) -> None:
    out.mkdir(parents=True)
    test = {"accuracy": accuracy, "unweighted_accuracy": accuracy / 2, "macro_f1": accuracy / 4}
    result = {"test": test, "trained_parameters": 5, "file_bytes": 7, "train_seconds": 1.0}
    write_json(out / "result.json", result)


def test_an_average_needs_all_columns(grid: Path) -> None:
    _, loaded = load_grid(str(grid))
    one = Outcome("Probe", "two", 1, 1, 50.0, None, None, 30.0)
    other = Outcome("Probe", "four", 1, 1, 70.0, None, None, 40.0)
    assert averages(loaded, [one])[0].score is None
    mean = averages(loaded, [one, other])[0]
    assert (mean.score, mean.published, mean.difference) == (60.0, 35.0, 25.0)


def test_columns_have_metrics_of_their_own(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid.write_text(
        GRID.replace("curve: Digits, at: 2", "metric: macro_f1").replace(
            "curve: Digits, at: 4", "also: [unweighted_accuracy]"
        )
    )
    file, loaded = load_grid(str(grid))
    cells = cells_of(file, loaded)
    for number, cell in enumerate(cells):
        for planned in cell.runs:
            _result(planned.recipe.out, 0.5 + number / 10 + planned.seed / 100)
    found = outcomes_of(cells)
    assert [(one.column, one.metric) for one in found if one.row == "Probe"] == [
        ("two", "macro_f1"),
        ("four", "accuracy"),
        ("four, unweighted accuracy", "unweighted_accuracy"),
    ]
    scores = {(one.row, one.column): one.score for one in found}
    assert scores["Probe", "two"] == pytest.approx(50.5 / 4)
    assert scores["Probe", "four"] == pytest.approx(70.5)
    assert scores["Probe", "four, unweighted accuracy"] == pytest.approx(70.5 / 2)
    columns, rows = lines(loaded, found)
    assert columns == ["", "two", "four", "four, unweighted accuracy", "Average"]
    assert rows[0][2].endswith("(40.0, +30.5)")
    assert "(" not in rows[0][3]
    assert averages(loaded, found)[0].score == pytest.approx((50.5 / 4 + 70.5) / 2)  # of the columns of the grid
    monkeypatch.setattr(grid_page, "_comparison", lambda *_: None)  # it reads whole runs
    page = grid_page.build_page(loaded, found, {}, grid.parent).read_text()
    assert page.count("four, unweighted accuracy</th>") == 1
    assert "two: macro f1 against size" in page
