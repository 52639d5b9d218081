"""Steps whose loss or gradient is not finite: skipped, counted, and too many of them stop the run."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epitaxy import Conformer, Head, LoRA, TwoPass
from epitaxy.core.errors import EpitaxyError
from epitaxy.report import build_report
from epitaxy.train import run as running
from epitaxy.train.checkpoint import FOLDER, PATTERN
from epitaxy.train.loop import METRICS, TrainConfig, train
from epitaxy.train.order import Order
from epitaxy.train.recipe import from_dict
from epitaxy.train.session import Session, Standing
from tests.train.small import CONFIG, BrokenOffError, Stopping, digest, small_data, small_run, without_times

Spoil = Callable[[Tensor], Tensor]
METHOD = LoRA(rank=2) + Head()


class InfiniteGradient(torch.autograd.Function):
    """A finite value with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


SPOILS: dict[str, Spoil] = {
    "loss nan": lambda loss: loss * float("nan"),
    "loss inf": lambda loss: loss + float("inf"),
    "gradient inf": InfiniteGradient.apply,
}


class Spoiled:
    """A task whose losses of the given numbers are spoiled; they count from 1."""

    def __init__(self, task: Any, numbers: Iterable[int], spoil: Spoil = SPOILS["loss nan"]) -> None:
        self.task, self.numbers, self.spoil, self.losses = task, set(numbers), spoil, 0
        self.batch, self.evaluate, self.logits = task.batch, task.evaluate, task.logits

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.criterion(self.logits(model, batch), batch)

    def criterion(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        self.losses += 1
        loss: Tensor = self.task.criterion(logits, batch)
        return self.spoil(loss) if self.losses in self.numbers else loss


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_skipped_step_is_as_if_it_had_not_been(spoil: Spoil, tmp_path: Path) -> None:
    config = TrainConfig(steps=6, batch=4, accumulate=2, learning_rate=0.02, schedule="constant", log_every=1, clip=0.5)
    model, adapter, task, splits = small_run(tmp_path / "data", METHOD)
    spoiled = Spoiled(task, [4, 9, 10], spoil)  # the second batch of step 2, and all of step 5
    result = train(model, adapter, spoiled, splits.train, None, config, tmp_path / "out", progress=False)

    other, own, task, splits = small_run(tmp_path / "data", METHOD)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.01 if p.dim() > 1 else 0.0} for p in own.parameters()], lr=0.02
    )
    batches = list(Order(len(splits.train), 4, 2, 0, 0, 6))
    own_modules = [piece.module for piece in own.pieces]
    for module in own_modules:
        module.train()
    for step in (0, 2, 3, 5):
        for rows in batches[2 * step : 2 * step + 2]:
            (task.loss(other, task.batch([splits.train[row] for row in rows])) / 2).backward()
        torch.nn.utils.clip_grad_norm_(list(own.parameters()), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for (key, ours), theirs in zip(adapter.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=key)
    assert result.skipped_steps == 2
    assert result.steps == 6
    assert [line["skipped_steps"] for line in result.history] == [0, 1, 1, 1, 2, 2]
    losses = [line["loss"] for line in result.history]
    assert [loss is None for loss in losses] == [False, True, False, False, True, False]
    assert result.history[1]["grad_norm"] is None or spoil is SPOILS["loss inf"]


def test_the_mean_loss_is_that_of_the_steps_taken(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, batch=4, schedule="constant", learning_rate=1e-9, log_every=4)
    model, adapter, task, splits = small_run(tmp_path / "data", METHOD)
    result = train(model, adapter, Spoiled(task, [2]), splits.train, None, config, tmp_path / "out", progress=False)
    batches = list(Order(len(splits.train), 4, 1, 0, 0, 4))
    with torch.no_grad():
        losses = [float(task.loss(model, task.batch([splits.train[row] for row in rows]))) for rows in batches]
    assert result.history[-1]["loss"] == pytest.approx((losses[0] + losses[2] + losses[3]) / 3, rel=1e-5)


@pytest.mark.parametrize("form", ["decoupled", "joint"])
def test_a_second_pass_that_fails_skips_the_step_too(form: Any, tmp_path: Path) -> None:
    objective, config = TwoPass(add=1.0, form=form), TrainConfig(steps=3, batch=4, log_every=1, learning_rate=0.01)
    model, adapter, task, splits = small_run(tmp_path / "data", LoRA(rank=2, dropout=0.2) + Head())
    before = digest(adapter.tensors())
    numbers = [2, 4, 6]  # CE(q), the second criterion of each step
    run = (model, adapter, Spoiled(task, numbers), splits.train, None, config, tmp_path / "out", objective)
    assert train(*run, progress=False).skipped_steps == 3
    assert digest(adapter.tensors()) == before


def test_too_many_in_a_row_stop_the_run_and_leave_the_last_checkpoint(tmp_path: Path) -> None:
    config = replace(CONFIG, accumulate=1, log_every=1, max_skipped=0)
    data = small_run(tmp_path / "data")[3]
    for allowed, message in ((0, r"step 7: the loss is not a finite number; "), (2, r"step 9: .*, 3 steps in a row; ")):
        model, adapter, task, _ = small_run(tmp_path / "data")
        out = tmp_path / f"out{allowed}"
        run = (data.train, data.validation, replace(config, max_skipped=allowed), out)
        with pytest.raises(EpitaxyError, match=message + r"lower train.learning_rate \(0.02\), lengthen"):
            train(model, adapter, Spoiled(task, range(7, 99)), *run, progress=False)
        steps = [path.name for path in (out / FOLDER).glob(PATTERN)]
        assert steps == [f"step-0000000{4 if allowed == 0 else 8}.safetensors"]
    model, adapter, task, _ = small_run(tmp_path / "data")
    result = train(model, adapter, task, data.train, data.validation, config, tmp_path / "out0", progress=False)
    assert result.resumed_at == 4, "max_skipped may change; here it is 0 both times"
    model, adapter, task, _ = small_run(tmp_path / "data")
    spoiled = Spoiled(task, [2, 3, 5, 6, 8, 9])
    config = replace(config, max_skipped=2)
    result = train(model, adapter, spoiled, data.train, data.validation, config, tmp_path / "apart", progress=False)
    assert result.skipped_steps == 6, "a step that is taken begins the count anew"


class SpoiledByData(Stopping):
    """Spoils the batches whose first example is of class 1, and breaks off at its n-th loss."""

    def criterion(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        loss = super().criterion(logits, batch)
        return loss * float("nan") if int(batch["labels"][0]) == 1 else loss

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.criterion(self.logits(model, batch), batch)


def test_a_resumed_run_knows_what_was_skipped(tmp_path: Path) -> None:
    found = []
    config = replace(CONFIG, accumulate=1, checkpoint_every=1)
    for out, stops in (("whole", [0]), ("torn", [5, 4, 6, 0])):
        for stop in stops:
            model, adapter, task, splits = small_run(tmp_path / "data")
            run = (model, adapter, SpoiledByData(task, stop), splits.train, splits.validation, config, tmp_path / out)
            if stop:
                with pytest.raises(BrokenOffError):
                    train(*run, progress=False)
            else:
                result = train(*run, progress=False)
        found.append((digest(adapter.tensors()), result.skipped_steps, without_times(result.history)))
    assert found[0] == found[1]
    assert 2 < found[0][1] < 16


def test_running_statistics_of_an_adapter_are_put_back(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data", Conformer(bottleneck=4) + Head())
    before = {key: tensor.clone() for key, tensor in adapter.tensors().items()}
    assert any("running_var" in key for key in before)

    class Poisoned(Spoiled):
        def logits_of_nan(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return task.logits(model, {**batch, "pixel_values": batch["pixel_values"] * float("nan")})

    spoiled = Poisoned(task, [])
    spoiled.logits = spoiled.logits_of_nan
    config = TrainConfig(steps=2, batch=4)
    result = train(model, adapter, spoiled, splits.train, None, config, tmp_path / "out", progress=False)
    assert result.skipped_steps == 2
    for key, tensor in adapter.tensors().items():
        assert torch.equal(tensor, before[key]), key


def test_result_and_report_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_data(tmp_path / "data")
    recipe = from_dict(
        {
            "base": "reference-vit",
            "method": ["lora", "head"],
            "data": str(tmp_path / "data"),
            "train": {"steps": 3, "batch": 4},
            "out": str(tmp_path / "run"),
        },
        "here",
    )
    prepare = running.prepare

    def spoiling(*args: Any) -> Any:
        ready = prepare(*args)
        criterion, calls = ready.task.criterion, []

        def criterion_spoiled(logits: Tensor, batch: Any) -> Tensor:
            calls.append(1)
            return criterion(logits, batch) * (float("nan") if len(calls) == 2 else 1.0)

        ready.task.criterion = criterion_spoiled
        return ready

    monkeypatch.setattr(running, "prepare", spoiling)
    result = running.run(recipe, progress=False)
    assert result["skipped_steps"] == 1
    assert json.loads((tmp_path / "run" / METRICS).read_text().splitlines()[-1])["skipped_steps"] == 1
    assert "1 skipped because loss or gradient was not finite" in build_report(tmp_path / "run").read_text()


class FakeAccelerator:
    """One process with a gradient scaler, as accelerate's under fp16."""

    def __init__(self, scale: float) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        self.device, self.num_processes = torch.device("cpu"), 1

    def prepare(self, optimizer: Any) -> Any:
        self.optimizer = optimizer
        scaler = self.scaler

        class Scaled:
            param_groups, zero_grad = optimizer.param_groups, optimizer.zero_grad

            def __init__(self) -> None:
                self.optimizer = optimizer

            def step(self) -> None:
                scaler.step(optimizer)
                scaler.update()

        scaled: Any = Scaled()
        scaled.optimizer = optimizer
        return scaled

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def no_sync(self, model: nn.Module) -> Any:
        raise AssertionError("one batch only")

    def clip_grad_norm_(self, parameters: Any, most: float) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(list(parameters), most)


def test_fp16_looks_for_its_scale_without_stopping_the_run() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    trainable = types.SimpleNamespace(
        parameters={"weight": nn.Parameter(torch.ones(2))}, buffers={}, copy=dict, groups=None
    )
    trainable.groups = lambda decay, everything: [{"params": list(trainable.parameters.values())}]
    accelerator = FakeAccelerator(2.0**24)  # the scaled loss overflows in fp16 until the scale is below 2^16
    task = types.SimpleNamespace(loss=lambda model, batch: (trainable.parameters["weight"].half() * weight).sum())
    config = TrainConfig(max_skipped=0, learning_rate=0.1, weight_decay=0.0)
    session = Session(accelerator, nn.Identity(), trainable, task, config, 100, None)  # type: ignore[arg-type]
    session.standing = Standing()
    start = trainable.parameters["weight"].detach().clone()
    for _ in range(12):
        session.step([{}])
    assert session.standing.skipped > 3
    assert session.standing.skipped_in_a_row == 0
    assert accelerator.scaler.get_scale() < 2.0**17
    assert not torch.equal(trainable.parameters["weight"], start), "training goes on at the scale that was found"
    task.loss = lambda model, batch: trainable.parameters["weight"].sum() * float("nan")
    with pytest.raises(EpitaxyError, match="the loss is not a finite number"):
        session.step([{}])
