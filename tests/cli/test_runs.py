"""From a recipe to a trained, measured, merged and exported adapter, on a tiny base and real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from epitaxy.train.session import Session
from tests.cli.conftest import COLOURS, SIZES, Epitaxy, only_line


def _result(run: Path) -> dict[str, Any]:
    result = json.loads((run / "result.json").read_text())
    assert isinstance(result, dict)
    return result


def test_run_directory_is_complete(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "adapter",
        "checkpoints",
        "predictions.json",
        "samples",
        "result.json",
        "report.html",
    }
    result = _result(finished)
    assert result["test"]["accuracy"] > 0.9  # three colours are easily told apart
    assert result["data"]["classes"] == sorted(COLOURS)
    assert result["data"]["counts"] == {"train": 24, "validation": 12, "test": 15}
    assert result["file_bytes"] == (finished / "adapter/adapter.safetensors").stat().st_size
    stored = load_file(finished / "adapter/adapter.safetensors")
    assert result["trained_parameters"] == sum(tensor.numel() for tensor in stored.values())
    predictions = json.loads((finished / "predictions.json").read_text())
    right = sum(said == true for said, true in zip(predictions["predictions"], predictions["targets"], strict=True))
    assert right / 15 == pytest.approx(result["test"]["accuracy"])
    assert len(predictions["samples"]) == 6
    assert json.loads((finished / "environment.json").read_text())["packages"]["torch"] == torch.__version__


def test_finished_run_is_not_repeated(epitaxy: Epitaxy, recipe: Path, finished: Path) -> None:
    before = (finished / "result.json").read_bytes()
    outcome = epitaxy("train", recipe, f"out={finished}")
    assert outcome.code == 0
    assert "finished already" in outcome.out
    assert (finished / "result.json").read_bytes() == before


def test_what_changes_no_result_may_change(epitaxy: Epitaxy, recipe: Path, finished: Path) -> None:
    outcome = epitaxy("train", recipe, f"out={finished}", "train.workers=1", "train.checkpoint_every=2")
    assert (outcome.code, outcome.err) == (0, "")
    assert "finished already" in outcome.out


def test_interrupted_run_resumes_to_the_same_weights(
    epitaxy: Epitaxy, recipe: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, step = tmp_path / "again", Session.step

    def interrupted(self: Session, batches: Any) -> Any:
        if self.standing.step == 11:
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(Session, "step", interrupted)
    outcome = epitaxy("train", recipe, f"out={out}")
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "interrupted"
    assert not (out / "result.json").exists()
    monkeypatch.undo()
    assert epitaxy("report", out).code == 0  # a page of what is known so far
    outcome = epitaxy("train", recipe, f"out={out}")
    assert outcome.code == 0
    assert "going on at step 9 of 24" in outcome.err
    whole, resumed = (load_file(run / "adapter/adapter.safetensors") for run in (finished, out))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert _result(out)["test"] == _result(finished)["test"]


def test_dry_run_and_plan(epitaxy: Epitaxy, recipe: Path, finished: Path, tmp_path: Path) -> None:
    outcome = epitaxy("train", recipe, "--dry-run", f"out={tmp_path / 'none'}")
    assert outcome.code == 0
    assert not (tmp_path / "none").exists()
    for expected in ("memory: about", "time: about", "an estimate from 3 steps", "merges: yes", "  peft: ", "rank: 2"):
        assert expected in outcome.out
    plan = json.loads(epitaxy("plan", recipe, "--json").out)
    result = _result(finished)
    assert plan["trained_parameters"] == result["trained_parameters"]
    assert plan["stored_parameters"] == result["stored_parameters"]
    assert plan["steps"] == result["steps"]
    assert abs(plan["file_bytes"] - result["file_bytes"]) < 1500  # the header of the real file tells what was scored
    assert plan["memory"]["activations"] > 0
    assert plan["time"]["training"] == pytest.approx(plan["time"]["step"] * plan["steps"])


def test_plan_says_what_cannot_be(epitaxy: Epitaxy, recipe: Path) -> None:
    plan = json.loads(epitaxy("plan", recipe, "method=[bottleneck, head]", "--json", "--no-probe").out)
    assert plan["merge"]["possible"] is False
    assert plan["merge"]["reason"]
    refused = {export["name"]: export for export in plan["exports"]}
    assert refused["epitaxy"]["possible"] is True
    assert refused["peft"]["possible"] is False
    assert "bottleneck" in refused["peft"]["reason"]
    assert plan["time"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.metric=acuracy", "did you mean 'accuracy'"),
        ("train.trackers=[tensorbord]", "did you mean 'tensorboard'"),
        pytest.param(
            "train.precision=fp16",
            "fp16 needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_plan_refuses_what_would_not_run(epitaxy: Epitaxy, recipe: Path, override: str, message: str) -> None:
    outcome = epitaxy("plan", recipe, override)
    assert outcome.code == 1
    assert message in outcome.err


def test_eval_many_adapters(
    epitaxy: Epitaxy, base: Path, data: Path, recipe: Path, finished: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert epitaxy("train", recipe, "method=[bitfit, head]", "train.epochs=1", f"out={other}").code == 0
    words = ["eval", base, "--adapters", finished, other / "adapter", finished, "--data", data]
    found = json.loads(epitaxy(*words, "--json", "--out", tmp_path / "table.json").out)
    assert found == json.loads((tmp_path / "table.json").read_text())
    first, second, third = found["results"]
    assert first["accuracy"] == third["accuracy"] == _result(finished)["test"]["accuracy"]
    assert first["loss"] == pytest.approx(_result(finished)["test"]["loss"])
    assert second["loss"] == pytest.approx(_result(other)["test"]["loss"])
    assert [row["method"] for row in found["results"]] == ["lora + head", "bitfit + head", "lora + head"]
    table = epitaxy(*words, "--split", "validation").out.splitlines()
    assert table[1].split()[:2] == ["adapter", "method"]
    assert len(table) == 5
    of_the_run = json.loads(epitaxy("eval", finished, "--json").out)["results"]
    assert of_the_run[0]["accuracy"] == first["accuracy"]
    of_the_recipe = json.loads(epitaxy("eval", recipe, f"out={finished}", "--json").out)["results"]
    assert of_the_recipe[0]["loss"] == pytest.approx(first["loss"])


def test_merge_gives_a_plain_model(epitaxy: Epitaxy, base: Path, data: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    outcome = epitaxy("merge", base, finished, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "relative drift" in outcome.out
    assert not any("epitaxy" in key for key in load_file(out / "model.safetensors"))
    rows = json.loads(epitaxy("eval", out, "--data", data, "--json").out)["results"]
    assert [row["adapter"] for row in rows] == [None]
    assert rows[0]["accuracy"] == _result(finished)["test"]["accuracy"]
    assert rows[0]["loss"] == pytest.approx(_result(finished)["test"]["loss"], abs=1e-5)


def test_merge_refuses_what_cannot_merge(epitaxy: Epitaxy, base: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "prompted"
    assert (
        epitaxy("train", recipe, "method=[{method: prompt, tokens: 2}, head]", "train.epochs=1", f"out={run}").code == 0
    )
    outcome = epitaxy("merge", base, run, "--out", tmp_path / "merged")
    assert outcome.code == 1
    assert not (tmp_path / "merged").exists()


def test_fold_gives_a_plain_model(epitaxy: Epitaxy, base: Path, data: Path, recipe: Path, tmp_path: Path) -> None:
    adaptformer = "{method: bottleneck, bottleneck: 3, norm: layer, reads: stream, scale: learned, activation: gelu}"
    method = f"method=[{adaptformer}, {{method: lora, rank: 2}}, head]"
    plan = epitaxy("plan", recipe, method, "--no-probe")
    assert "merges: no" in plan.out
    assert "folds: yes, into wider feed-forwards of the same class" in plan.out
    run, out, timm = tmp_path / "run", tmp_path / "folded", tmp_path / "timm"
    assert epitaxy("train", recipe, method, "train.epochs=2", f"out={run}").code == 0
    assert "folds: yes, where the feed-forwards have the activation gelu" in " ".join(
        epitaxy("inspect", run).out.replace("folds", "folds:").split()
    )
    outcome = epitaxy("merge", base, run, "--fold", "--out", out)
    assert outcome.code == 0, outcome.err
    assert "folded 'colours'" in outcome.out
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 35
    assert not any("epitaxy" in key for key in load_file(out / "model.safetensors"))
    rows = json.loads(epitaxy("eval", out, "--data", data, "--json").out)["results"]
    assert rows[0]["accuracy"] == _result(run)["test"]["accuracy"]
    assert rows[0]["loss"] == pytest.approx(_result(run)["test"]["loss"], abs=1e-5)
    assert epitaxy("merge", base, run, "--fold", "--timm", "--out", timm).code == 0
    assert {path.name for path in timm.iterdir()} == {"model.safetensors", "timm.json"}
    again = tmp_path / "again"
    assert epitaxy("train", recipe, f"base={out}", "train.epochs=1", f"out={again}").code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--timm"], "--timm writes a folded model"),
        (["--fold", "--tolerance", "1"], "--fold has its own limit"),
        (["--fold", "--parts"], "--parts saves an adapter and --fold a model"),
    ],
)
def test_fold_refuses_words_that_do_not_go_together(
    epitaxy: Epitaxy, base: Path, finished: Path, tmp_path: Path, words: list[str], says: str
) -> None:
    outcome = epitaxy("merge", base, finished, *words, "--out", tmp_path / "x")
    assert outcome.code == 1
    assert says in only_line(outcome.err)
    assert not (tmp_path / "x").exists()


def test_plan_and_merge_say_why_not(epitaxy: Epitaxy, base: Path, recipe: Path, tmp_path: Path) -> None:
    plan = json.loads(epitaxy("plan", recipe, "method=[bottleneck, head]", "--json", "--no-probe").out)
    assert plan["fold"]["possible"] is False
    assert "its activation is 'relu'" in plan["fold"]["reason"]
    assert json.loads(epitaxy("plan", recipe, "--json", "--no-probe").out)["fold"]["reason"] == "all of it merges"
    run = tmp_path / "run"
    method = "method=[{method: bottleneck, order: sequential}, head]"
    assert epitaxy("train", recipe, method, "train.epochs=1", f"out={run}").code == 0
    outcome = epitaxy("merge", base, run, "--fold", "--out", tmp_path / "folded")
    assert outcome.code == 1
    assert "only a parallel bottleneck without a residual" in only_line(outcome.err)
    assert "no, bottleneck: only a parallel adapter" in json.loads(epitaxy("inspect", run, "--json").out)["folds"]
    assert not (tmp_path / "folded").exists()


def test_parts_merge_into_a_plain_adapter(
    epitaxy: Epitaxy, base: Path, data: Path, recipe: Path, tmp_path: Path
) -> None:
    """Owners from data go through training and the file; what is merged opens as a bottleneck and scores the same."""
    run, out = tmp_path / "run", tmp_path / "plain"
    method = "method=[{method: mosa, bottleneck: 4, balance: saliency, draw: row}, head]"
    assert epitaxy("train", recipe, method, f"out={run}").code == 0
    outcome = epitaxy("merge", base, run, "--parts", "--out", out)
    assert outcome.code == 0, outcome.err
    assert "bottleneck + head" in outcome.out
    contents = json.loads(epitaxy("inspect", out, "--json").out)
    assert [part["method"] for part in contents["methods"]] == ["bottleneck", "head"]
    assert contents["provenance"]["classes"] == sorted(COLOURS)
    rows = json.loads(epitaxy("eval", base, "--adapters", out, "--data", data, "--json").out)["results"]
    assert rows[0]["loss"] == pytest.approx(_result(run)["test"]["loss"], abs=1e-6)
    assert rows[0]["accuracy"] == _result(run)["test"]["accuracy"]
    again = epitaxy("merge", base, out, "--parts", "--out", tmp_path / "twice")
    assert again.code == 1
    assert "has no parts to merge" in again.err
    assert not (tmp_path / "twice").exists()
    both = epitaxy("merge", base, run, "--parts", "--tolerance", "1", "--out", tmp_path / "twice")
    assert both.code == 1
    assert "--tolerance" in both.err


def test_a_lora_in_parts_is_exported_merged(
    epitaxy: Epitaxy, base: Path, data: Path, recipe: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "lora"
    method = "method=[{method: mosa_lora, rank: 2, parts: 2, split: both}, head]"
    assert epitaxy("train", recipe, method, f"out={run}").code == 0
    assert epitaxy("export", run, "--to", "peft", "--out", out).code == 0
    rows = json.loads(epitaxy("eval", base, "--adapters", out, "--data", data, "--json").out)["results"]
    assert rows[0]["loss"] == pytest.approx(_result(run)["test"]["loss"], abs=1e-6)


def test_export_and_back(epitaxy: Epitaxy, data: Path, base: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    outcome = epitaxy("export", finished, "--to", "peft", "--out", out)
    assert outcome.code == 0, outcome.err
    assert "exact, every value equal" in outcome.out
    assert "peft" in epitaxy("inspect", out).out
    rows = json.loads(epitaxy("eval", base, "--adapters", out, "--data", data, "--json").out)["results"]
    assert rows[0]["loss"] == pytest.approx(_result(finished)["test"]["loss"], abs=1e-6)


def test_inspect(epitaxy: Epitaxy, finished: Path) -> None:
    contents = json.loads(epitaxy("inspect", finished, "--json").out)
    assert contents["provenance"]["classes"] == sorted(COLOURS)
    assert contents["parameters"] == _result(finished)["stored_parameters"]
    text = epitaxy("inspect", finished, "--tensors").out
    for key, shape in contents["tensors"].items():
        assert f"{key} " in text
        assert " x ".join(map(str, shape)) in text
    assert "lora (" in text
    assert "rank=2" in text


def test_full_fine_tuning(epitaxy: Epitaxy, recipe: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "full"
    outcome = epitaxy("train", recipe, "method=full", "train.epochs=2", "train.learning_rate=1e-3", f"out={run}")
    assert outcome.code == 0, outcome.err
    result = _result(run)
    assert result["method"] == "full fine-tuning"
    assert result["trained_parameters"] == result["base"]["parameters"] == result["stored_parameters"]
    assert result["file_bytes"] == (run / "model/model.safetensors").stat().st_size
    rows = json.loads(epitaxy("eval", run, "--json").out)["results"]
    assert rows[0]["loss"] == pytest.approx(result["test"]["loss"], abs=1e-6)
    outcome = epitaxy("inspect", run)
    assert outcome.code == 1
    assert "full fine-tuning" in outcome.err


def test_report_of_a_real_run(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "<b>green" not in page
    assert "&lt;b&gt;green &amp; &#34;gold&#34;" in page
    assert "lora.attention.q" in page
    assert sum(SIZES.values()) * 3 == 51  # what the counts below are made of
    assert "24 training, 12 validation, 15 test" in page


def test_a_mixture_reports_how_it_uses_its_experts(epitaxy: Epitaxy, recipe: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "mixture.yaml", tmp_path / "run"
    mixture = "{method: soft_moa, experts: 3, slots: 2, bottleneck: 2}"
    file.write_text(recipe.read_text().replace("{method: lora, rank: 2}", mixture))
    assert epitaxy("train", file, f"out={out}", "train.epochs=1").code == 0
    result = _result(out)
    assert result["method"] == "soft_moa (experts 3, slots 2, bottleneck 2) + head"
    assert list(result["expert_use"]) == ["soft_moa.attention.0", "soft_moa.attention.1"]
    for place in result["expert_use"].values():
        assert sum(place["weight"]) == pytest.approx(1, abs=1e-5)
        assert place["tokens"] == 12 * 5  # validation pictures, each of four patches and a class token
    assert "Expert use" in (out / "report.html").read_text()
