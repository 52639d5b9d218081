"""The comparisons of ``benchmarks/`` on tiny models: they run, compare like with like, and store what they show."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import __main__ as everything
from benchmarks import (
    adapter_training,
    audio_front_end,
    fold,
    inactive,
    lora_vs_peft,
    many_adapters,
    moa,
    mosa_training,
)
from benchmarks.bases import SHAPES

import epitaxy
from epitaxy.bench.measure import peak_of
from epitaxy.methods.draws import at_step

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def results(module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    threads = str(torch.get_num_threads())  # main() sets them for the whole process
    command = ["x", "--quick", "--rounds", "1", "--threads", threads, "--clock", "wall", "--out", str(folder), *options]
    monkeypatch.setattr(sys, "argv", command)
    module.main()
    stored: dict[str, Any] = json.loads((folder / f"{module.__name__.rpartition('.')[2]}.json").read_text())
    return stored


@pytest.mark.parametrize("name", SHAPES)
def test_both_sides_are_the_same_function_of_the_same_weights(name: str) -> None:
    shape = SHAPES[name](quick=True)
    models = lora_vs_peft.sides(shape, None, ("ours", "PEFT"))
    ours, peft = models["ours"].eval(), models["PEFT"].eval()
    trained = {
        key: [p for p in model.parameters() if p.requires_grad] for key, model in (("ours", ours), ("peft", peft))
    }
    assert [p.shape for p in trained["ours"]] == [p.shape for p in trained["peft"]]
    for mine, theirs in zip(trained["ours"], trained["peft"], strict=True):
        theirs.data = mine.data
    inputs = shape.inputs()
    torch.testing.assert_close(ours(**inputs).logits, peft(**inputs).logits)
    ours(**inputs).loss.backward()
    peft(**inputs).loss.backward()
    for mine, theirs in zip(trained["ours"], trained["peft"], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_lora_against_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = results(lora_vs_peft, tmp_path, monkeypatch, "--eager-only")
    time_table, memory_table = stored["tables"]
    assert [(row["job"], row["mode"]) for row in time_table["rows"]].count(("training step", "eager")) == 2
    assert all(row["ours / PEFT"]["median"] > 0 for row in time_table["rows"])
    exact = [row for row in memory_table["rows"] if row["what"] == "kept for backward"]
    assert [row["ours / PEFT"] <= 1 for row in exact] == [True, True]  # bytes, not seconds: the same on any machine


def test_many_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = results(many_adapters, tmp_path, monkeypatch)
    routing, holding = stored["tables"]
    assert {row["way"] for row in routing["rows"]} > {"route", "PEFT adapter_names", "4 calls of one row"}
    difference = float(routing["title"].rpartition(" ")[2].rstrip(")"))
    assert 0 <= difference < 1e-4
    assert [row["held"] for row in holding["rows"]] == [1, 3, 9, 1, 3, 9]


def test_cpu_time_is_for_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        results(inactive, tmp_path, monkeypatch, "--threads", "2", "--clock", "cpu")
    assert not any(tmp_path.iterdir())


def test_inactive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = results(inactive, tmp_path, monkeypatch)
    assert len(stored["tables"][0]["rows"]) == 6
    assert {"inactive / bare", "control / bare"} <= stored["tables"][0]["rows"][0].keys()


def test_mixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = results(moa, tmp_path, monkeypatch)["tables"][0]["rows"]
    assert [(row["mixture"], row["experts"]) for row in rows[::3]] == [
        (kind, count) for kind in ("Dense-MoA", "Soft-MoA") for count in (7, 14)
    ]
    kept = {(row["experts"], row["way"]): row["kept / ours"] for row in rows if row["mixture"] == "Dense-MoA"}
    assert kept[7, "stacked outputs"] > 2  # bytes: the same on any machine


@pytest.mark.parametrize("kind", ["Dense-MoA", "Soft-MoA"])
def test_every_way_of_a_mixture_is_the_same_function(kind: str) -> None:
    modules = moa.sides(kind, 3, 16)
    u = torch.randn(2, 5, 16)
    outputs, gradients = {}, {}
    for name, module in modules.items():
        x = u.clone().requires_grad_()
        outputs[name] = module(x)
        outputs[name].square().sum().backward()
        gradients[name] = x.grad
    assert len(outputs) == 3
    for name in outputs:
        torch.testing.assert_close(outputs[name], outputs["ours"])
        torch.testing.assert_close(gradients[name], gradients["ours"])


def test_the_page_shows_every_stored_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = results(inactive, tmp_path, monkeypatch)
    text = everything.page(tmp_path)
    assert stored["tables"][0]["table"] in text
    assert "torch" in text


def test_attaching_the_thousandth_walks_only_the_base() -> None:
    """What keeps the cost of one more adapter flat: no step visits the modules of those already there."""
    from epitaxy.core.anatomy import base_modules

    model = SHAPES["lm"](quick=True).model()
    before = base_modules(model)
    assert before == dict(model.named_modules())
    for number in range(20):
        epitaxy.attach(model, many_adapters.METHOD, f"a{number}")
    assert base_modules(model) == before
    assert list(base_modules(model)) == [path for path, _ in model.named_modules() if "epitaxy" not in path.split(".")]


def test_audio_front_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = results(audio_front_end, tmp_path, monkeypatch)
    extractor, cache = stored["tables"]
    assert len(extractor["rows"]) == 2
    assert cache["rows"][0]["cached / computed"]["median"] < 0.8


def test_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (table,) = results(fold, tmp_path, monkeypatch)["tables"]
    assert [row["adapter"] for row in table["rows"]] == list(fold.METHODS)
    assert all(float(row["largest difference"]) < 1e-5 for row in table["rows"])
    models = fold.sides(SHAPES["vit"](quick=True).model(), fold.METHODS["parallel, GELU"])
    sizes = {name: sum(value.numel() for value in model.parameters()) for name, model in models.items()}
    assert sizes["bare"] == sizes["control"]
    assert sizes["folded"] <= sizes["adapted"]


def test_adapter_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_training, "peak_of", lambda command: {"peak": 100.0 + len(command[3])})
    training, peak = results(adapter_training, tmp_path, monkeypatch)["tables"]
    for found in (training, peak):
        assert [row["method"] for row in found["rows"]] == list(adapter_training.CASES)
    assert training["rows"][0]["bound / step"]["median"] == 1.0
    bound, full = len(adapter_training.BOUND), len(adapter_training.FULL)
    least = len(adapter_training.FORWARD)
    assert peak["rows"][0]["/ full fine-tuning"]["median"] == pytest.approx((bound - least) / (full - least))


def test_a_process_of_its_own_tells_its_peak() -> None:
    forward, full = (
        peak_of(["-m", "benchmarks.adapter_training", "--quick", "--peak", name])["peak"]
        for name in (adapter_training.FORWARD, adapter_training.FULL)
    )
    assert 5e7 < forward < full * 1.2


@pytest.mark.parametrize("name", ["BitFit", "BitFit by hand, in the base"])
def test_bitfit_by_hand_trains_what_ours_does(name: str) -> None:
    """One step with AdamW at rest: the gradients of the biases, in the base or as differences to them."""
    model, inputs = adapter_training.base(quick=True), torch.randn(2, 64, 128)
    step = adapter_training.prepared(name, model, inputs)
    seen: dict[str, torch.Tensor] = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            place = re.sub(r"\.epitaxy\.default\.\w+", "", path)
            parameter.register_hook(lambda gradient, place=place: seen.__setitem__(place, gradient))
    step()
    literal = adapter_training.base(quick=True).train()
    literal(inputs).logits.sum().backward()
    expected = {
        path: parameter.grad
        for path, parameter in literal.named_parameters()
        if path.endswith(".bias") and not path.startswith("classifier.dense.")
    }
    assert seen.keys() == expected.keys()
    for path, gradient in expected.items():
        torch.testing.assert_close(seen[path], gradient)


def test_the_bound_takes_the_gradient_to_the_first_block_and_of_no_weight() -> None:
    model, inputs = adapter_training.base(quick=True), torch.randn(2, 64, 128)
    seen: list[torch.Tensor] = []
    first = model.get_submodule("audio_spectrogram_transformer.layers.0")
    first.register_full_backward_hook(lambda _module, gradient, _output: seen.append(gradient[0]))
    adapter_training.bound(model, inputs)()
    assert seen[0].abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mosa_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    branch, step, held = results(mosa_training, tmp_path, monkeypatch)["tables"]
    names = list(mosa_training.METHODS)
    assert [row["branch"] for row in branch["rows"]] == names
    work = {row["branch"]: row["FLOP / bottleneck"] for row in branch["rows"]}
    assert work[mosa_training.COPIES] == work["MoSA, element"] == 1.0
    assert work["MoSA, out_slice"] <= 0.56
    assert work["MoSA, rank_slice"] <= 0.26
    assert [row["adapter"] for row in step["rows"]] == names * len(mosa_training.OBJECTIVES)
    state = {row["adapter"]: row["state / bottleneck"] for row in held["rows"]}
    assert state[mosa_training.COPIES] > 2
    assert all(state[name] <= 1.05 for name in names if name.startswith("MoSA"))


def test_copies_compute_what_the_single_tensor_computes() -> None:
    shape = SHAPES["vit"](quick=True, batch=2)
    base, batch = shape.model(), shape.inputs()
    scores = []
    for name in (mosa_training.COPIES, "MoSA, element"):
        model = mosa_training.adapted(base, name, dropout=0.0)
        step = mosa_training.training(model, batch, mosa_training.TwoPass(), mosa_training.optimiser(model))
        for _ in range(3):
            step()
        with at_step(model, 9), torch.no_grad():
            scores.append(model(batch["pixel_values"]).logits)
    torch.testing.assert_close(*scores)
    with torch.no_grad():
        assert not torch.allclose(scores[0], base.eval()(batch["pixel_values"]).logits, atol=1e-4)
