"""The verbs that need no run: methods, doctor, demo; and how words of the command line are read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTForImageClassification

from epitaxy.cli import demo, doctor
from epitaxy.cli.eval import spread
from epitaxy.core import registry
from epitaxy.train import recipe_files
from epitaxy.train.run_directory import read_recipe
from tests.cli.conftest import Epitaxy


def test_methods(epitaxy: Epitaxy) -> None:
    found = {method["name"]: method for method in json.loads(epitaxy("methods", "--json").out)}
    assert found["lora"]["fields"]["rank"] == 8
    assert "Hu et al." in found["lora"]["paper"]
    assert "merge" in found["bottleneck"]["cannot"]
    text = epitaxy("methods", "b*").out
    assert "bitfit" in text
    assert "lora" not in text
    assert "bottleneck=64" in text


def _stranger(folder: Path, attribute: str) -> None:
    """An installed package that announces a method."""
    (folder / "stranger.py").write_text(
        '"""Nothing at all: Stranger et al. 2026."""\n'
        "from dataclasses import dataclass\n"
        "from epitaxy.core.registry import method\n"
        '@method("nothing", cannot={"merge": "there is nothing"})\n'
        "@dataclass(frozen=True)\n"
        "class Nothing:\n"
        '    at: str = "mlp"\n'
        "    size: int = 3\n"
        "    def edits(self, site):\n"
        "        return iter(())\n"
    )
    info = folder / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[epitaxy.methods]\nnothing = stranger:{attribute}\n")


def test_methods_of_other_packages(tmp_path: Path) -> None:
    _stranger(tmp_path, "Nothing")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from epitaxy.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "methods", "noth*"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert "nothing (from stranger)" in done.stdout
    assert "at=mlp size=3" in done.stdout
    assert "merge: there is nothing" in done.stdout


def test_doctor_finds_methods_that_do_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stranger(tmp_path, "Absent")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    (finding,) = doctor._methods()
    assert finding.state == "bad"
    assert "stranger:Absent does not import" in finding.found


def test_doctor_finds_this_environment_fit(epitaxy: Epitaxy) -> None:
    outcome = epitaxy("doctor", "--json")
    findings = json.loads(outcome.out)
    assert outcome.code == 0, findings
    checked = {finding["what"] for finding in findings}
    assert {"reference-vit", "reference-ast", "builtin:digits", "builtin:words-unseen"} <= checked
    assert {"shipped recipes", "methods", "disk space here"} <= checked


def test_doctor_fails_on_damaged_data(epitaxy: Epitaxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import shutil

    from epitaxy.data import shipped

    shutil.copytree(shipped._folder(), tmp_path / "shipped")
    with (tmp_path / "shipped/digits.zip").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    monkeypatch.setattr(shipped, "_folder", lambda: tmp_path / "shipped")
    outcome = epitaxy("doctor")
    assert outcome.code == 1
    assert "builtin:digits" in next(line for line in outcome.out.splitlines() if line.startswith("bad"))


def test_doctor_names_a_torchvision_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    info = tmp_path / "torchvision-0.28.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = doctor._torchvision()
    assert finding.state == "bad"
    assert "0.28.0 does not load beside torch" in finding.found


@pytest.mark.parametrize(
    ("version", "number"), [("2.13.0+cpu", (2, 13, 0)), ("5.0", (5, 0)), ("1.10.0rc1", (1, 10, 0)), ("4.dev1", (4,))]
)
def test_versions_compare_as_numbers(version: str, number: tuple[int, ...]) -> None:
    assert doctor._number(version) == number


def test_adapters_may_follow_each_other() -> None:
    words = ["eval", "base", "--adapters", "a", "b", "train.batch=3", "--data", "x", "--adapters", "c"]
    assert spread(words) == [
        "eval",
        "base",
        *("--adapters", "a", "--adapters", "b"),
        "train.batch=3",
        *("--data", "x", "--adapters", "c"),
    ]


def test_demo(epitaxy: Epitaxy, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole demo on a tiny base: a table, a page with links, a folded model, and nothing done twice."""
    recipes = {}
    mosa = "[{method: mosa, bottleneck: 4}, head]\nobjective: two_pass"
    methods = {"linear-probe": "head", "lora": "[{method: lora, rank: 2}, head]", "full": "full", "mosa": mosa}
    for name, method in methods.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(
            f"name: {name}\nbase: {base}\nmethod: {method}\ndata: {data}\n"
            "train: {epochs: 3, batch: 8, learning_rate: 1e-2}\nsamples: 4\n"
        )
        recipes[f"demo/{name}"] = file
    monkeypatch.setattr(recipe_files, "shipped_recipes", lambda: recipes)
    monkeypatch.chdir(tmp_path)
    words = ["demo", "--seeds", "2", *(word for name in methods for word in ("--method", name))]
    outcome = epitaxy(*words)
    assert outcome.code == 0, outcome.err
    table = [
        line for line in outcome.out.splitlines() if line.startswith(("method", "head", "mosa (", "lora", "full fine"))
    ]
    assert [line.split("  ")[0] for line in table] == [
        "method",
        "head",
        "mosa (bottleneck 4, parts 4) + head, two passes (decoupled), symmetric KL",
        "lora (rank 2) + head",
        "full fine-tuning",
    ]
    assert all("±" in line for line in table[1:])
    runs = sorted(path.name for path in Path("demo-run/vision").iterdir() if path.is_dir())
    assert runs == sorted(f"{name}-seed{seed}" for name in methods for seed in (0, 1))
    weights = {
        path: path.read_bytes() for path in Path("demo-run/vision").rglob("*.safetensors")
    }  # each seed has a start of its own
    assert len(set(weights.values())) == 8
    seeds = [read_recipe(Path(f"demo-run/vision/mosa-seed{seed}")).method[0]["seed"] for seed in (0, 1)]
    assert seeds == [0, 1]
    folded = re.search(
        r"mosa-seed0 folded into a plain ViTForImageClassification: ([\d,]+) parameters and no adapter, .* on (\d+) "
        r"test pictures (\d+) of the answers are the same, and scores differ by at most (\S+)",
        " ".join(outcome.out.split()),
    )
    assert folded is not None, outcome.out
    plain = ViTForImageClassification(ViTConfig.from_pretrained(base, intermediate_size=32 + 4, num_labels=3))
    assert int(folded[1].replace(",", "")) == sum(tensor.numel() for tensor in plain.state_dict().values())
    assert folded[2] == folded[3]
    assert float(folded[4]) < 1e-5
    page = Path("demo-run/vision/report.html").read_text()
    for run in runs:
        assert f'href="{run}/report.html"' in page
    (Path("demo-run/vision") / "lora-seed1" / "result.json").unlink()
    before = Path("demo-run/vision/full-seed0/result.json").stat().st_mtime_ns
    assert epitaxy(*words).code == 0
    assert Path("demo-run/vision/full-seed0/result.json").stat().st_mtime_ns == before
    assert {path: path.read_bytes() for path in Path("demo-run/vision").rglob("*.safetensors")} == weights


@pytest.mark.slow
@pytest.mark.parametrize("system", ["vision", "audio"])
def test_demo_on_the_shipped_model_and_data(epitaxy: Epitaxy, tmp_path: Path, system: str) -> None:
    """Every method, one seed: far better than guessing, and within the sizes that the table shows."""
    outcome = epitaxy("demo", system, "--seeds", "1", "--out", tmp_path / "demo")
    assert outcome.code == 0, outcome.err
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "demo").glob("*/result.json"))]
    assert len(results) == len(demo.DEMOS[system].recipes)
    for result in results:
        assert result["test"]["accuracy"] > 4 / len(result["data"]["classes"]), result["name"]
        assert result["name"] == "full-seed0" or result["trained_parameters"] < 0.05 * result["base"]["parameters"]
