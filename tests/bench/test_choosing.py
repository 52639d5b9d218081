"""Settings chosen on validation data: what is tried, who wins, what the runs then use, and that no test data help."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from epitaxy.bench.choosing import judge, settled
from epitaxy.bench.grid import cells_of, load_grid
from epitaxy.core.errors import EpitaxyError
from epitaxy.tasks.classification import Classification
from epitaxy.train import run as running
from epitaxy.train import trial as trying
from epitaxy.train.recipe import RecipeError, from_dict
from epitaxy.train.run_directory import read_recipe, write_json
from tests.cli.conftest import Epitaxy, epitaxy  # noqa: F401  (a fixture)
from tests.report.page_parser import Page

BASE = """\
base: reference-vit
data: {source: "builtin:digits", limit_per_class: 4, limit_evaluation_per_class: 3}
train: {batch: 8, steps: 3, log_every: 1, evaluate_every: 1}
samples: 0
"""
GRID = """\
title: Digits
recipe: base.yaml
out: runs/digits
seeds: [4, 5]
select: {train.learning_rate: [1e-3, 1e-2, 1e-1]}
rows:
  Probe: {set: {method: head}}
  LoRA:
    set: {method: [{method: lora, rank: 2}, head]}
    select: {train.learning_rate: [1e-3, 1e-2], method.rank: [1, 2]}
  Fixed: {set: {method: [bitfit, head], train.learning_rate: 7e-3}, select: {}}
columns:
  digits: {}
"""


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    file = tmp_path / "grid.yaml"
    file.write_text(GRID)
    return file


def _score(recipe: Any, score: float | None, loss: float | None = 1.0) -> None:
    recipe.out.mkdir(parents=True, exist_ok=True)
    failed = None if score is not None else "step 2: the loss is not a finite number"
    write_json(recipe.out / "trial.json", {"score": score, "loss": loss, "failed": failed})


def test_every_combination_is_tried_with_the_first_seed(grid: Path) -> None:
    cells = {cell.row: cell for cell in cells_of(*load_grid(str(grid)))}
    assert [len(cells[row].trials) for row in ("Probe", "LoRA", "Fixed")] == [3, 4, 0]
    tried = [(trial.recipe.train.learning_rate, trial.recipe.method[0]["rank"]) for trial in cells["LoRA"].trials]
    assert tried == [(1e-3, 1), (1e-3, 2), (1e-2, 1), (1e-2, 2)]
    assert {(trial.seed, trial.recipe.train.seed) for trial in cells["LoRA"].trials} == {(4, 4)}
    assert [run.seed for run in cells["LoRA"].runs] == [4, 5]
    places = [piece.recipe.out for cell in cells.values() for piece in (*cell.trials, *cell.runs)]
    assert len(set(places)) == len(places)
    assert cells["Probe"].trials[1].recipe.out == Path("runs/digits/probe/digits/choosing/learning_rate-0-01/seed4")


def test_seeds_and_keys_of_the_trials_and_folds(grid: Path) -> None:
    text = GRID.replace("seeds: [4, 5]", "seeds: [4]\nselect_seeds: [0, 1]\nselect_set: {train.steps: 2}")
    grid.write_text(text.replace("digits: {}", "digits: {set: {data.kind: esc50}, folds: [1, 2]}"))
    (cell,) = cells_of(*load_grid(str(grid)), ["Probe"])
    assert [(t.fold, t.seed, t.recipe.data.fold) for t in cell.trials[:4]] == [(1, 0, 1), (1, 1, 1)] * 2
    assert len(cell.trials) == 12
    assert {trial.recipe.train.steps for trial in cell.trials} == {2}
    assert cell.runs[0].recipe.train.steps == 3
    for trial in cell.trials:  # what is best on fold 1 is worst on fold 2
        rate = trial.recipe.train.learning_rate
        _score(trial.recipe, rate if trial.fold == 1 else 1 - rate)
    chosen = [settled(run.recipe, cell.choice(run.fold)).train.learning_rate for run in cell.runs]  # type: ignore[arg-type]
    assert chosen == [1e-1, 1e-3]


@pytest.mark.parametrize(
    ("scores", "losses", "metric", "best"),
    [
        ((0.5, 0.7, 0.6), (1, 1, 1), "accuracy", 1e-2),
        ((0.5, 0.7, 0.7), (1, 2, 1.5), "accuracy", 1e-1),  # a tie: the lower loss
        ((0.7, 0.7, 0.7), (1, 1, 1), "accuracy", 1e-3),  # all alike: the first
        ((0.5, None, 0.4), (1, None, 1), "accuracy", 1e-3),  # one diverged
        ((0.5, 0.7, 0.6), (1, 1, 1), "loss", 1e-3),  # losses fall
    ],
)
def test_the_best_on_validation_wins(
    grid: Path, scores: tuple[Any, ...], losses: tuple[Any, ...], metric: str, best: float
) -> None:
    (cell,) = cells_of(*load_grid(str(grid)), ["Probe"], [f"train.metric={metric}"])
    (choice,) = cell.choices
    assert judge(choice).chosen is None
    for trial, score, loss in zip(cell.trials, scores, losses, strict=True):
        with pytest.raises(EpitaxyError, match=r"not chosen yet: \d of 3 trials are open"):
            settled(cell.runs[0].recipe, choice)
        _score(trial.recipe, score, loss)
    assert judge(choice).chosen == {"train.learning_rate": best}
    final = settled(cell.runs[1].recipe, choice)
    assert (final.train.learning_rate, final.train.seed, final.out) == (best, 5, cell.runs[1].recipe.out)


def test_means_over_seeds_and_the_ends_of_the_list(grid: Path) -> None:
    grid.write_text(GRID.replace("select: {train", "select_seeds: [0, 1]\nselect: {train", 1))
    (cell,) = cells_of(*load_grid(str(grid)), ["Probe"])
    for trial, score in zip(cell.trials, (0.1, 0.9, 0.6, 0.6, 0.0, 0.8), strict=True):
        _score(trial.recipe, score)
    verdict = judge(cell.choices[0])
    assert [option["score"] for option in verdict.options] == pytest.approx([0.5, 0.6, 0.4])
    assert (verdict.chosen, verdict.edges) == ({"train.learning_rate": 1e-2}, ())
    for trial in cell.trials[:2]:
        _score(trial.recipe, 0.9)
    assert judge(cell.choices[0]).edges == ("train.learning_rate",)
    for trial in cell.trials:
        _score(trial.recipe, None)
    with pytest.raises(EpitaxyError, match=r"every setting tried failed, the first: step 2"):
        settled(cell.runs[0].recipe, cell.choices[0])


def test_a_key_that_an_override_sets_is_not_chosen(grid: Path) -> None:
    cells = cells_of(*load_grid(str(grid)), (), ["LoRA:train.learning_rate=5e-3", "Probe:train.learning_rate=5e-3"])
    by_row = {cell.row: cell for cell in cells}
    assert not by_row["Probe"].trials
    assert [dict(option.values) for option in by_row["LoRA"].choices[0].options] == [
        {"method.rank": 1},
        {"method.rank": 2},
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("train.learning_rate: [1e-3, 1e-2, 1e-1]", "data.source: [a]", r"'data.source' cannot be chosen"),
        ("train.learning_rate: [1e-3, 1e-2, 1e-1]", "train.seed: [1, 2]", r"'train.seed' cannot be chosen"),
        ("[1e-3, 1e-2, 1e-1]", "[]", r"select.train.learning_rate: expected a list of values"),
        ("[1e-3, 1e-2, 1e-1]", "[1e-3, 0.001]", r"a value is listed twice"),
        ("[1e-3, 1e-2, 1e-1]", "[fast]", r"select: train.learning_rate: .*found 'fast'"),
        ("method.rank: [1, 2]", "method.rnk: [1]", r"select: method 'lora' has no field 'rnk'"),
    ],
)
def test_mistakes_are_named(grid: Path, old: str, new: str, said: str) -> None:
    assert old in GRID
    grid.write_text(GRID.replace(old, new))
    with pytest.raises(RecipeError, match=said):
        cells_of(*load_grid(str(grid)))


def test_a_grid_chooses_runs_resumes_and_tells(
    grid: Path,
    epitaxy: Epitaxy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = epitaxy("bench", grid, "--dry-run", "--no-probe", "--only", "Probe")
    assert listed.code == 0, listed.err
    assert re.search(r"Probe / digits +head +0/3 +2 +0 +3 ", listed.out)
    assert "1 cells, 3 trials, 2 runs" in listed.out

    measured: list[int] = []
    evaluate = Classification.evaluate
    monkeypatch.setattr(
        Classification,
        "evaluate",
        lambda self, model, data, *a, **k: measured.append(id(data)) or evaluate(self, model, data, *a, **k),
    )
    from epitaxy.train.session import Session

    step = Session.step
    count = iter(range(100))

    def interrupted(self: Session, batches: Any) -> Any:
        if next(count) == 8:  # in the last trial
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(Session, "step", interrupted)
    assert epitaxy("bench", grid, "train.checkpoint_every=1", "--only", "Probe").code == 130
    assert len(set(measured)) == 3  # the validation data of each trial, no test data
    monkeypatch.undo()
    monkeypatch.chdir(grid.parent)
    partial = json.loads(Path("runs/digits/grid.json").read_text())["cells"][0]
    assert [option["finished"] for option in partial["choices"][0]["options"]] == [1, 1, 0]
    assert partial["choices"][0]["chosen"] is None

    whole = epitaxy("bench", grid, "train.checkpoint_every=1", "--only", "Probe")
    assert whole.code == 0, whole.err
    assert whole.out.count("finished before") == 2
    assert "going on at step 2 of 3" in whole.err
    found = json.loads(Path("runs/digits/grid.json").read_text())["cells"][0]
    (choice,) = found["choices"]
    best = max(choice["options"], key=lambda option: option["score"])
    assert choice["chosen"] == best["values"]
    for run in found["runs"]:
        assert read_recipe(Path(run["path"])).train.learning_rate == best["values"]["train.learning_rate"]
    for option in choice["options"]:
        (place,) = option["paths"]
        told = json.loads((Path(place) / "trial.json").read_text())
        lines = [json.loads(line) for line in (Path(place) / "metrics.jsonl").read_text().splitlines()]
        assert told["score"] == option["score"] == max(line["validation_accuracy"] for line in lines)
        assert not (Path(place) / "result.json").exists()
        assert not (Path(place) / "checkpoints").exists()
    text = Path("runs/digits/grid.md").read_text()
    assert f"| Probe | digits | learning_rate {best['values']['train.learning_rate']}" in text
    page = Page(Path("runs/digits/grid.html"))
    assert page.faults == []
    assert "Test data take no part" in Path("runs/digits/grid.html").read_text()
    again = epitaxy("bench", grid, "train.checkpoint_every=1", "--only", "Probe")
    assert again.out.count("finished before") == 5


def test_the_last_state_counts_where_the_recipe_keeps_the_last(grid: Path, epitaxy: Epitaxy) -> None:  # noqa: F811
    done = epitaxy("bench", grid, "--only", "Probe", "train.keep_best=false", "train.learning_rate=0.5")
    assert done.code == 0, done.err
    from epitaxy.train.trial import trial

    (cell,) = cells_of(*load_grid(str(grid)), ["Probe"], ["train.keep_best=false"])
    told = trial(cell.trials[2].recipe, progress=False)
    lines = (cell.trials[2].recipe.out / "metrics.jsonl").read_text().splitlines()
    assert told["score"] == json.loads(lines[-1])["validation_accuracy"]
    assert (told["state"], told["step"]) == ("last", 3)


def test_a_trial_that_diverges_loses_and_the_grid_goes_on(
    grid: Path,
    epitaxy: Epitaxy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss = Classification.loss

    def broken(self: Any, model: Any, batch: Any) -> Any:
        return loss(self, model, batch) * (float("nan") if broken.bad else 1.0)  # type: ignore[attr-defined]

    from epitaxy.train.session import Session

    start = Session.__init__

    def begin(self: Session, accelerator: Any, model: Any, trainable: Any, task: Any, config: Any, *rest: Any) -> None:
        broken.bad = config.learning_rate == 1e-1  # type: ignore[attr-defined]
        start(self, accelerator, model, trainable, task, config, *rest)

    monkeypatch.setattr(Classification, "loss", broken)
    monkeypatch.setattr(Session, "__init__", begin)
    done = epitaxy("bench", grid, "train.max_skipped=0", "--only", "Probe")
    assert done.code == 0, done.err
    assert "diverged: step 1: the loss is not a finite number" in done.out
    found = json.loads(Path("runs/digits/grid.json").read_text())["cells"][0]
    assert found["finished"] == 2
    assert found["choices"][0]["chosen"]["train.learning_rate"] != 1e-1
    assert "learning_rate 0.1: diverged" in Path("runs/digits/grid.md").read_text()


def test_a_trial_trains_as_its_run_does_with_the_objective_too(grid: Path) -> None:
    values: dict[str, Any] = {
        "out": "trial",
        "base": "reference-vit",
        "method": [{"method": "lora", "rank": 2, "dropout": 0.5}, "head"],
        "data": {"source": "builtin:digits", "limit_per_class": 2, "limit_evaluation_per_class": 1},
        "train": {"batch": 8, "steps": 3, "log_every": 1, "learning_rate": 1e-2, "evaluate_every": 3},
        "samples": 0,
    }

    def losses(out: str) -> list[float]:
        lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    tied = {**values, "objective": {"kind": "two_pass", "weight": 5.0}}
    trying.trial(from_dict(tied, "a test"), progress=False)
    running.run(from_dict({**tied, "out": "run"}, "a test"), progress=False)
    running.run(from_dict({**values, "out": "plain"}, "a test"), progress=False)
    assert len(losses("trial")) == 3
    assert losses("trial") == losses("run") != losses("plain")
