"""What the training loop does: learning, settings, the log, and what it leaves alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from epitaxy import BitFit, Head, LoRA, Prompt, attach, detach, load, save
from epitaxy.core.errors import EpitaxyError, UnsupportedError
from epitaxy.data.splits import Example
from epitaxy.train.loop import METRICS, TrainConfig, count_steps, read_metrics, train
from tests.train.small import (
    CONFIG,
    BrokenOffError,
    Scripted,
    Stopping,
    digest,
    small_run,
    whole,
)


def test_a_run_learns_and_leaves_the_base_alone(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "epitaxy" not in name.split(".")}
    before = task.evaluate(model, splits.test)
    config = TrainConfig(steps=60, batch=7, learning_rate=0.03, evaluate_every=10)
    result = train(model, adapter, task, splits.train, splits.validation, config, tmp_path / "out", progress=False)
    after = task.evaluate(model, splits.test)
    assert after.accuracy > before.accuracy + 0.3
    assert result.trained_parameters == adapter.size()
    assert result.steps == 60
    assert result.best_metric == max(line.get("validation_accuracy", 0) for line in result.history)
    for name, parameter in model.named_parameters():
        assert name not in base or torch.equal(parameter, base[name])
    assert not model.training
    save(model, tmp_path / "adapter")
    detach(model)
    load(model, tmp_path / "adapter")
    assert task.evaluate(model, splits.test) == after


def test_seeds_decide_everything(tmp_path: Path) -> None:
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        model, adapter, task, splits = small_run(tmp_path / "data")
        torch.manual_seed(90 + number)
        config, out = replace(CONFIG, seed=seed), tmp_path / str(number)
        train(model, adapter, task, splits.train, splits.validation, config, out, progress=False)
        digests.append(digest(adapter.tensors()))
    assert digests[0] == digests[1] != digests[2]


def test_the_best_state_is_kept(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")
    config = TrainConfig(steps=9, batch=6, learning_rate=0.3, schedule="constant", evaluate_every=3, clip=None)
    config = replace(config, base_mode="train")
    result = train(model, adapter, task, splits.train, splits.validation, config, tmp_path / "best", progress=False)
    scores = {line["step"]: line["validation_accuracy"] for line in result.history if "validation_accuracy" in line}
    assert result.best_step == min(step for step, value in scores.items() if value == max(scores.values()))
    assert scores[9] < max(scores.values()), "the run must get worse in the end for this test to mean anything"
    assert task.evaluate(model, splits.validation).accuracy == max(scores.values())
    model, adapter, task, splits = small_run(tmp_path / "data")
    config = replace(config, keep_best=False)
    train(model, adapter, task, splits.train, splits.validation, config, tmp_path / "last", progress=False)
    assert task.evaluate(model, splits.validation).accuracy == scores[9]


def test_patience_counts_evaluations_on_the_validation_data(tmp_path: Path) -> None:
    for metric in ("accuracy", "loss"):
        model, adapter, task, splits = small_run(tmp_path / "data")
        scripted = Scripted(task, [0.3, 0.5, 0.5, 0.4, 0.6, 0.1, 0.2, 0.3, 0.9])
        config = TrainConfig(steps=50, batch=4, evaluate_every=2, patience=3, metric=metric)
        result = train(
            model, adapter, scripted, splits.train, splits.validation, config, tmp_path / metric, progress=False
        )
        assert result.stopped_early
        assert result.steps == 16
        assert result.best_step == 10
        assert result.best_metric == (0.6 if metric == "accuracy" else 0.4)
        assert all(data is splits.validation for data in scripted.seen)


def test_a_metric_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")
    scripted = Scripted(task, [float("nan"), 0.2, float("nan"), 0.1])
    config = TrainConfig(steps=8, batch=4, evaluate_every=2, log_every=8)
    out = tmp_path / "out"
    result = train(model, adapter, scripted, splits.train, splits.validation, config, out, progress=False)
    assert (result.best_step, result.best_metric) == (4, 0.2)
    assert "NaN" not in (out / METRICS).read_text()
    assert result.history[0]["validation_accuracy"] is None


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    tensors = []
    for batch, accumulate in ((12, 1), (3, 4)):
        model, adapter, task, splits = small_run(tmp_path / "data", LoRA(rank=2) + Head(), dropout=0.0)
        config = TrainConfig(steps=4, batch=batch, accumulate=accumulate, clip=0.05, keep_best=False)
        train(model, adapter, task, splits.train, splits.validation, config, tmp_path / f"{batch}", progress=False)
        tensors.append(adapter.tensors())
    for key, value in tensors[0].items():
        assert torch.allclose(value, tensors[1][key], atol=2e-6), key


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    class Large:
        def __init__(self, task: Any) -> None:
            self.batch, self.evaluate, self.task, self.norms = task.batch, task.evaluate, task, []

        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            loss: Tensor = 1000 * self.task.loss(model, batch)
            return loss

    model, adapter, task, splits = small_run(tmp_path / "data")
    seen: list[float] = []

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in adapter.parameters() if p.grad is not None])))

    handle = register_optimizer_step_pre_hook(note)
    try:
        config = TrainConfig(steps=4, batch=4, clip=0.5, log_every=1)
        result = train(model, adapter, Large(task), splits.train, None, config, tmp_path / "out", progress=False)
    finally:
        handle.remove()
    assert len(seen) == 4
    assert all(norm <= 0.5 + 1e-4 for norm in seen)
    assert all(line["grad_norm"] > 5 for line in result.history)


def test_only_matrices_decay(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data", LoRA(rank=2) + BitFit() + Head())
    groups: list[Any] = []

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups[:] = optimizer.param_groups

    handle = register_optimizer_step_pre_hook(note)
    try:
        config = TrainConfig(steps=1, batch=4, weight_decay=0.1)
        train(model, adapter, task, splits.train, None, config, tmp_path / "out", progress=False)
    finally:
        handle.remove()
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decays) == len(list(adapter.parameters()))
    for key, parameter in adapter.named_parameters():
        assert decays[id(parameter)] == (0.1 if parameter.dim() > 1 else 0.0), key


def test_the_log_has_one_object_per_line(tmp_path: Path) -> None:
    _, result = whole(tmp_path, "out", replace(CONFIG, log_every=3))
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert lines == result.history == read_metrics(tmp_path / "out" / METRICS)
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12, 15, 16, 18]
    for line in lines:
        assert line["epoch"] == pytest.approx(line["step"] * 10 / 21, abs=1e-4)
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert line["examples_per_second"] > 0
        assert ("validation_accuracy" in line) == (line["step"] % 4 == 0 or line["step"] == 18)
    norms = [line["update_norms"] for line in lines if "update_norms" in line]
    assert norms[0].keys() == {key.rpartition(".")[0] for key, _ in small_run(tmp_path / "data")[1].named_parameters()}
    assert all(value > 0 for value in norms[-1].values())


def test_update_norms_are_root_mean_squares_of_the_change(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")
    start = {key: tensor.clone() for key, tensor in adapter.tensors().items()}
    config = TrainConfig(steps=5, batch=4, keep_best=False)
    result = train(model, adapter, task, splits.train, splits.validation, config, tmp_path / "out", progress=False)
    norms = result.history[-1]["update_norms"]
    change = torch.cat(
        [
            (tensor - start[key]).flatten()
            for key, tensor in adapter.tensors().items()
            if key.startswith("lora.attention.q.1.")
        ]
    )
    assert norms["lora.attention.q.1"] == pytest.approx(float(change.square().mean().sqrt()), rel=1e-5)


def test_learning_rates_in_the_log_follow_the_schedule(tmp_path: Path) -> None:
    config = TrainConfig(steps=10, batch=3, learning_rate=0.01, warmup=0.3, schedule="linear", log_every=1)
    _, result = whole(tmp_path, "out", config)
    rates = [line["lr"] for line in result.history]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, *(0.01 * (7 - n) / 7 for n in range(7))])


def test_an_objective_replaces_the_loss(tmp_path: Path) -> None:
    calls: list[float] = []

    def doubled(model: nn.Module, batch: dict[str, Tensor], task_loss: Any) -> Tensor:
        loss: Tensor = 2 * task_loss(model, batch)
        calls.append(float(loss.detach()))
        return loss

    model, adapter, task, splits = small_run(tmp_path / "data")
    config = TrainConfig(steps=3, batch=4, log_every=1)
    result = train(
        model, adapter, task, splits.train, None, config, tmp_path / "out", objective=doubled, progress=False
    )
    assert [line["loss"] for line in result.history] == pytest.approx(calls)
    assert len(calls) == 3


class WithObjective(LoRA):
    """A method that brings its own objective."""

    def objective(self, model: nn.Module, batch: dict[str, Tensor], task_loss: Any) -> Tensor:
        loss: Tensor = task_loss(model, batch) + 100
        return loss


def test_a_method_may_bring_its_objective(tmp_path: Path) -> None:
    method = WithObjective(rank=2)
    model, adapter, task, splits = small_run(tmp_path / "data", method + Head())
    config = TrainConfig(steps=2, batch=4, log_every=1)
    result = train(model, adapter, task, splits.train, None, config, tmp_path / "out", progress=False)
    assert all(line["loss"] > 100 for line in result.history)
    model, adapter, task, splits = small_run(tmp_path / "data", method + method)
    with pytest.raises(UnsupportedError, match="lora and lora each bring an objective"):
        train(model, adapter, task, splits.train, None, config, tmp_path / "two", progress=False)


def test_training_the_same_model_twice_in_other_precisions(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")
    before = set(model.__dict__)
    for number, precision in enumerate(("no", "bf16", "no")):
        config = TrainConfig(steps=2, batch=4, precision=precision)  # type: ignore[arg-type]
        train(model, adapter, task, splits.train, None, config, tmp_path / str(number), progress=False)
        assert set(model.__dict__) == before
        with torch.no_grad():
            assert task.logits(model, task.batch([splits.test[0]])).dtype == torch.float32


def test_frozen_batch_norms_keep_their_statistics(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")
    norm = nn.BatchNorm1d(16)
    frozen = norm.requires_grad_(False)
    model.get_submodule("vit.layers.0" if hasattr(model.vit, "layers") else "vit").add_module("extra", frozen)  # type: ignore[union-attr]
    mean = norm.running_mean.clone()  # type: ignore[union-attr]

    class Through:
        def __init__(self) -> None:
            self.batch, self.evaluate = task.batch, task.evaluate

        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            norm(torch.randn(8, 16) + 5)
            return task.loss(model, batch)

    config = TrainConfig(steps=3, batch=4)
    train(model, adapter, Through(), splits.train, None, config, tmp_path / "out", progress=False)
    assert torch.equal(norm.running_mean, mean)  # type: ignore[arg-type]


def test_without_validation_nothing_is_evaluated(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")
    config = TrainConfig(epochs=2, batch=4)
    result = train(model, adapter, task, splits.train, None, config, tmp_path / "out", progress=False)
    assert result.steps == 11
    assert result.best_step is None
    config = TrainConfig(epochs=2, batch=4, patience=2)
    with pytest.raises(EpitaxyError, match="stopping early needs validation data"):
        train(model, adapter, task, splits.train, None, config, tmp_path / "out2", progress=False)


def test_a_batch_may_be_larger_than_the_data(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")
    config = TrainConfig(epochs=4, batch=50)
    result = train(model, adapter, task, splits.train, splits.validation, config, tmp_path / "out", progress=False)
    assert result.steps == 2 == count_steps(config, 21)


def test_other_adapters_stay_as_they_are(tmp_path: Path) -> None:
    model, first, task, splits = small_run(tmp_path / "data")
    second = attach(model, Prompt(tokens=2) + Head(), name="second")
    before = digest(first.tensors())
    train(model, second, task, splits.train, None, TrainConfig(steps=3, batch=4), tmp_path / "out", progress=False)
    assert digest(first.tensors()) == before


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = whole(tmp_path, "out", replace(CONFIG, trackers=("tensorboard",)))
    folder = next((tmp_path / "out" / "trackers").rglob("events.out.tfevents.*")).parent
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [line["step"] for line in result.history]
    assert [event.value for event in events.Scalars("validation_accuracy")] == pytest.approx(
        [line["validation_accuracy"] for line in result.history if "validation_accuracy" in line]
    )


def test_progress_is_plain_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")
    with pytest.raises(BrokenOffError):
        train(model, adapter, Stopping(task, 20), splits.train, splits.validation, CONFIG, tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["4/18", "8/18"]
    assert all(" accuracy " in line and "steps/s" in line and "left" in line for line in lines)
    model, adapter, task, splits = small_run(tmp_path / "data")
    train(model, adapter, task, splits.train, splits.validation, CONFIG, tmp_path / "out")
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0] == "going on at step 8 of 18"
    assert captured.out == ""


def test_examples_may_come_from_any_sequence(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data")
    listed: list[Example] = list(splits.train)
    config = TrainConfig(steps=3, batch=4)
    result = train(model, adapter, task, listed, None, config, tmp_path / "out", progress=False)
    assert result.steps == 3
