"""The grids of the visual benchmark: their settings, and whole columns on tiny models and tiny copies of the sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from epitaxy.bench.grid import cells_of, load_grid
from epitaxy.data.image_sets.vtab import TASKS
from epitaxy.train.recipe_files import load_recipe
from epitaxy.train.run_directory import read_recipe
from tests.cli.conftest import Epitaxy, epitaxy  # noqa: F401  (a fixture)
from tests.data import image_trees as trees
from tests.tasks.bases import save_vit

# peak learning rate, bottleneck, parts, the projection that is cut, deep, as the released scripts have them
SCRIPTS = {
    "cub": (1e-3, 64, 4, "up", 0.0),
    "nabirds": (5e-4, 64, 4, "up", 0.0),
    "flowers": (5e-3, 64, 4, "up", 0.0),
    "dogs": (5e-4, 64, 4, "up", 0.0),
    "cars": (5e-3, 64, 2, "down", 0.01),
    "union": (5e-4, 64, 2, "both", 0.0),
    "cifar100": (5e-4, 64, 4, "up", 0.0),
    "food101": (5e-4, 64, 4, "up", 0.0),
    "aircraft": (5e-3, 64, 4, "up", 0.0),
    "vtab1k": (5e-3, 16, 4, "up", 0.0),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_recipes_have_the_published_settings(name: str) -> None:
    recipe = load_recipe(f"mosa/{name}")
    method, train, image = recipe.method[0], recipe.train, recipe.data.image
    assert recipe.objective is not None
    assert image is not None
    found = (train.learning_rate, method["bottleneck"], method["parts"], method["split"], recipe.objective.deep)
    assert found == SCRIPTS[name]
    assert (method["partition"], method["bias"], method["norm"], method["reads"]) == (
        "element",
        "parts",
        "layer",
        "stream",
    )
    assert (method["activation"], method["scale"], method["dropout"]) == ("gelu", 0.1, 0.1)
    assert (recipe.objective.weight, recipe.objective.add, recipe.objective.consistency) == (1.0, 0.0, "sym_kl")
    assert (train.epochs, train.batch, train.warmup, train.schedule, train.clip) == (100, 128, 0.1, "cosine", None)
    assert (train.weight_decay, train.decay, train.epsilon, train.optimiser) == (0.01, "weights", 1e-6, "hf_adamw")
    assert (train.idle, train.base_mode, train.keep_best) == ("momentum", "train", False)
    assert (image.normalisation, image.resize) == ("imagenet", "exact" if name == "vtab1k" else "short_side")


def test_the_rows_differ_in_what_they_say() -> None:
    cells = {cell.title: cell for cell in cells_of(*load_grid("mosa/fgvc"))}
    assert len(cells) == 8 * 5
    dense, tied, ours = (
        cells[f"{row} / CUB"].runs[0].recipe
        for row in ("Bottleneck, GELU", "Bottleneck, GELU + KL", "MoSA, recommended")
    )
    assert dense.method == tied.method
    assert (dense.objective is None, tied.objective == ours.objective) == (True, True)
    assert dense.train == tied.train == ours.train
    shared = [key for key in dense.method[0] if key in ours.method[0] and key != "method"]
    assert [key for key in shared if dense.method[0][key] != ours.method[0][key]] == []
    assert [len(cells[f"{row} / CUB"].trials) for row in ("Linear", "MoSA, recommended", "MoSA as published")] == [
        4,
        4,
        0,
    ]
    for column, name in (
        ("CUB", "cub"),
        ("NABirds", "nabirds"),
        ("Flowers", "flowers"),
        ("Dogs", "dogs"),
        ("Cars", "cars"),
    ):
        published, script = cells[f"MoSA as published / {column}"].runs[0].recipe, load_recipe(f"mosa/{name}")
        assert (published.method, published.objective, published.data) == (
            script.method,
            script.objective,
            script.data.__class__(**{**script.data.__dict__, "protocol": "select"}),
        )
        assert (published.train.learning_rate, published.train.optimiser) == (script.train.learning_rate, "hf_adamw")


def test_the_columns_of_vtab() -> None:
    _, grid = load_grid("mosa/vtab")
    assert {name: column.group for name, column in grid.columns.items()} == {name: TASKS[name].group for name in TASKS}
    (cell,) = cells_of(*load_grid("mosa/vtab"), ["MoSA, recommended/svhn"])
    assert {(trial.recipe.data.protocol, trial.recipe.data.task) for trial in cell.trials} == {("select", "svhn")}
    assert {(run.recipe.data.protocol, run.recipe.data.task) for run in cell.runs} == {("final", "svhn")}
    (published,) = cells_of(*load_grid("mosa/vtab"), ["MoSA as published/svhn"])
    script = load_recipe("mosa/vtab1k")
    assert published.runs[0].recipe.method == script.method
    assert published.runs[0].recipe.train.learning_rate == script.train.learning_rate


TINY = ["data.verify=false", "data.image.size=16", "train.epochs=2", "train.batch=4"]


def test_vtab_chooses_on_800_and_tests_what_trained_on_1000(epitaxy: Epitaxy, tmp_path: Path) -> None:  # noqa: F811
    base, root = save_vit(tmp_path / "vit", ["0", "1", "2"]), trees.vtab(tmp_path / "vtab", "svhn")
    words = ["bench", "mosa/vtab", f"base={base}", f"data.source={root}", *TINY, "--out", str(tmp_path / "out")]
    done = epitaxy(*words, "--only", "Bottleneck, GELU + KL/svhn", "--only", "MoSA*/svhn")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out/grid.json").read_text())
    cells = {cell["row"]: cell for cell in found["cells"] if cell["column"] == "svhn"}
    for row in ("Bottleneck, GELU + KL", "MoSA, recommended"):
        (choice,) = cells[row]["choices"]
        assert cells[row]["finished"] == 3
        for run in cells[row]["runs"]:
            recipe, result = read_recipe(Path(run["path"])), json.loads((Path(run["path"]) / "result.json").read_text())
            assert recipe.train.learning_rate == choice["chosen"]["train.learning_rate"]
            assert result["data"]["counts"] == {"train": 6, "validation": 0, "test": 6}
            assert result["objective"] is not None
        for option in choice["options"]:
            (path,) = option["paths"]
            tried = read_recipe(Path(path))
            assert (tried.data.protocol, tried.train.keep_best, tried.objective == recipe.objective) == (
                "select",
                False,
                True,
            )
            lines = [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]
            assert option["score"] == lines[-1]["validation_accuracy"]
    assert cells["MoSA as published"]["finished"] == 3
    assert not cells["MoSA as published"]["choices"]
    markdown = (tmp_path / "out/grid.md").read_text()
    assert "normalised by imagenet: mean 0.485" in markdown
    assert "| MoSA as published |" in markdown.partition("Means of groups")[2]


@pytest.mark.slow
def test_a_column_of_fgvc(epitaxy: Epitaxy, tmp_path: Path) -> None:  # noqa: F811
    base, root = save_vit(tmp_path / "vit", ["1", "5", "30"]), trees.union(tmp_path / "all")
    words = ["bench", "mosa/fgvc", f"base={base}", f"data.source={root}", *TINY, "--out", str(tmp_path / "out")]
    done = epitaxy(*words, "--only", "Cars")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out/grid.json").read_text())
    cells = {cell["row"]: cell for cell in found["cells"] if cell["column"] == "Cars"}
    assert {cell["finished"] for cell in cells.values()} == {3}
    sizes = {row: cell["trained_parameters"] for row, cell in cells.items()}
    assert sizes["Linear"] < sizes["Bottleneck, GELU"] == sizes["MoSA, recommended"] < sizes["MoSA as published"]
    assert cells["MoSA as published"]["difference"] == pytest.approx(cells["MoSA as published"]["score"] - 83.4)
    assert len(found["paired"]) > 0
