"""The grids of published tables, whole, on tiny models and tiny copies of the data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from epitaxy.bench.grid import cells_of, load_grid
from epitaxy.train.recipe_files import shipped_grids
from tests.cli.conftest import Epitaxy, epitaxy  # noqa: F401  (a fixture)
from tests.data import audio_trees as trees


@pytest.mark.parametrize("name", shipped_grids())
def test_grids_are_manuals_that_load(name: str) -> None:
    file, grid = load_grid(name)
    header = file.read_text(encoding="utf-8").partition("\ntitle:")[0]
    for word in (f"epitaxy bench {name}", "# Expected: ", "# Cost: "):
        assert word in header
    cells = cells_of(file, grid)
    left_out = sum(bool(keys.get("skip")) for row in grid.cells.values() for keys in row.values())
    assert len(cells) == len(grid.rows) * len(grid.columns) - left_out
    places = [planned.recipe.out for cell in cells for planned in cell.runs]
    assert len(set(places)) == len(places)
    for cell in cells:
        for planned in cell.runs:
            assert planned.recipe.full or any(part["method"] == "head" for part in planned.recipe.method)
            data = planned.recipe.data
            assert data.kind != "auto" or data.source.startswith("builtin:")
    groups = {column.group for column in grid.columns.values()} - {None}
    for row, told in grid.published.items():  # a row that has published numbers has them all, or those of all groups
        own = {cell.column for cell in cells if cell.row == row}
        assert own <= told.keys() or (groups and groups <= told.keys())
    if grid.published and not grid.select:
        assert set(grid.published) == set(grid.rows)


def test_the_settings_of_table_1() -> None:
    cells = {cell.title: cell for cell in cells_of(*load_grid("ast_petl/table1"))}
    assert sum(len(cell.runs) for cell in cells.values()) == 11 * 17
    rates = {"Full fine-tuning": 5e-5, "Linear": 1e-3, "BitFit": 5e-3, "SPT-300": 1e-2, "Prefix-24": 1e-2, "LoRA": 5e-3}
    for row, rate in rates.items():
        assert cells[f"{row} / UrbanSound8K"].runs[0].recipe.train.learning_rate == rate
    settings = {
        "ESC-50": (32, 50, 500, 24),
        "UrbanSound8K": (32, 30, 400, 24),
        "Speech Commands": (128, 75, 100, 0),
        "Fluent Speech Commands": (32, 75, 400, 0),
    }
    for column, expected in settings.items():
        recipe = cells[f"LoRA / {column}"].runs[0].recipe
        train, audio = recipe.train, recipe.data.audio
        assert audio is not None
        assert (train.batch, train.epochs, audio.frames, audio.augment.frequency) == expected
        assert (train.betas, train.epsilon, train.weight_decay, train.seed) == ((0.9, 0.98), 1e-6, 0.1, 10)
    kernels = [cells[f"Conformer Pfeiffer / {column}"].runs[0].recipe.method[0]["kernel"] for column in settings]
    assert kernels == [8, 8, 31, 31]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spectrogram transformer of 16 mel bins with the front end of AST."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_mel_bins=16,
        max_length=64,
    )
    folder = tmp_path_factory.mktemp("tiny") / "ast"
    model = ASTForAudioClassification(config)
    embeddings = model.audio_spectrogram_transformer.embeddings
    for table in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings):
        torch.nn.init.normal_(table, std=0.1)  # norms of the zeros they begin with have gradients without bound
    model.save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=16, max_length=64).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_table_1_runs_on_esc50(epitaxy: Epitaxy, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    root = trees.esc50(tmp_path / "ESC-50", rate=16000, samples=8000)
    words = ["bench", "ast_petl/table1", f"base={tiny}", f"ESC-50:data.source={root}", "data.verify=false"]
    words += ["data.audio.frames=48", "train.epochs=1", "samples=0", "--only", "ESC-50", "--out", str(tmp_path / "out")]
    outcome = epitaxy(*words)
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "out/grid.json").read_text())
    cells = [cell for cell in found["cells"] if cell["column"] == "ESC-50"]
    assert [(cell["finished"], cell["planned"]) for cell in cells] == [(5, 5)] * 11
    for cell in cells:
        assert cell["over_folds"] is not None
        assert cell["difference"] == pytest.approx(cell["score"] - cell["published"])
        folds = [json.loads((Path(run["path"]) / "result.json").read_text()) for run in cell["runs"]]
        assert {result["data"]["counts"]["test"] for result in folds} == {8}
    sizes = {cell["row"]: cell["trained_parameters"] for cell in cells}
    assert sizes["Linear"] < sizes["LoRA"] < sizes["Bottleneck Houlsby"] < sizes["Full fine-tuning"]
    assert all(average["score"] is None for average in found["averages"])


@pytest.mark.slow
def test_table_2_draws_a_curve(epitaxy: Epitaxy, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    root = trees.esc50(tmp_path / "ESC-50", rate=16000, samples=8000)
    words = ["bench", "ast_petl/table2", f"base={tiny}", f"ESC-50*:data.source={root}", "data.verify=false"]
    words += ["data.audio.frames=48", "train.epochs=1", "samples=0", "--out", str(tmp_path / "out")]
    outcome = epitaxy(*words, "--only", "LoRA/ESC-50*")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "out/grid.json").read_text())
    done = [cell for cell in found["cells"] if cell["finished"]]
    counts = [json.loads((Path(c["runs"][0]["path"]) / "result.json").read_text())["data"]["counts"] for c in done]
    assert [count["train"] for count in counts] == [2, 4, 8, 16]
    page = (tmp_path / "out/grid.html").read_text()
    assert "ESC-50: ours" in page
    assert "Speech Commands: published" in page
    assert "Speech Commands: ours" not in page
