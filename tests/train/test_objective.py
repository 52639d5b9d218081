"""An objective in our training loop: clocks, resumption, recipes, plans, and what does not fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epitaxy import Bottleneck, Head, LoRA, TwoPass, attach
from epitaxy.core.errors import StateError, UnsupportedError
from epitaxy.methods.draws import at_step
from epitaxy.tasks.objective import Part, Turn
from epitaxy.train import recipe_files
from epitaxy.train.loop import TrainConfig, train
from epitaxy.train.modes import training_modes
from epitaxy.train.order import Order
from epitaxy.train.plan import plan
from epitaxy.train.recipe import RecipeError, from_dict
from epitaxy.train.run import run
from tests.tasks.drawing import DrawnMethod, drawn_in
from tests.train.small import (
    CONFIG,
    BrokenOffError,
    Stopping,
    break_off,
    digest,
    interrupted,
    small_data,
    small_model,
    small_run,
    whole,
    without_times,
)

DRAWN = DrawnMethod() + LoRA(rank=2, dropout=0.2) + Head()
OBJECTIVES: dict[str, TwoPass | None] = {
    "plain": None,
    "decoupled": TwoPass(),
    "joint": TwoPass(form="joint", add=0.5),
    "lazy": TwoPass(every=3, share=0.5, warmup=5, deep=0.01),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_resumed_run_has_the_same_bits(objective: TwoPass | None, tmp_path: Path) -> None:
    """Broken off within an epoch and within a step; clocks, dropout of adapter and base, and warm-up go on."""
    config = replace(CONFIG, checkpoint_every=1, base_mode="train")
    expected, first = whole(tmp_path, "whole", config, DRAWN, objective)
    found, second = interrupted(tmp_path, "torn", config, [14, 6, 9], DRAWN, objective)
    assert second.resumed_at is not None
    assert second.resumed_at > 5
    assert found == expected
    assert without_times(second.history) == without_times(first.history)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_training_pass_has_the_numbers_of_its_step(objective: TwoPass | None, tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data", DrawnMethod(layers=(0,)) + Head())
    config = TrainConfig(steps=4, batch=6, accumulate=2, evaluate_every=2)
    train(model, adapter, task, splits.train, splits.validation, config, tmp_path / "out", objective, progress=False)
    expected = []
    for step in range(4):
        for micro in range(2):
            if objective is None or not objective.paired(step):
                expected.append((step, micro, 0, 1))
            elif objective.form == "joint":
                expected.append((step, micro, 0, 2))
            else:
                expected += [(step, micro, number, 1) for number in (0, 1, 1)]
    (drawn,) = drawn_in(model)
    assert drawn.seen == expected
    assert drawn.clock.automatic


def test_the_loss_in_the_log_is_the_objective(tmp_path: Path) -> None:
    """One step at a learning rate of nothing, against the formula on the same batches."""
    objective = TwoPass(weight=3.0, add=0.5)
    config = TrainConfig(steps=1, batch=6, accumulate=2, learning_rate=1e-12)
    model, adapter, task, splits = small_run(tmp_path / "data", DrawnMethod(rows=True) + Head())
    result = train(model, adapter, task, splits.train, None, config, tmp_path / "out", objective, progress=False)
    total = 0.0
    with training_modes(model, [adapter]), torch.no_grad():
        for micro, rows in enumerate(Order(21, 6, 2, 0, 0, 1)):
            batch = task.batch([splits.train[row] for row in rows])
            scores = []
            for number in (0, 1):
                with at_step(model, 0, micro, number):
                    scores.append(task.logits(model, batch))
            p, q = (score.log_softmax(-1) for score in scores)
            kl = ((p.exp() - q.exp()) * (p - q)).sum() / 6 / 2
            total += float(task.criterion(p, batch) + 0.5 * task.criterion(q, batch) + 3.0 * kl) / 2
            assert kl > 1e-5
    assert result.history[0]["loss"] == pytest.approx(total, rel=1e-5)


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    digests = []
    for batch, accumulate in ((12, 1), (3, 4)):
        model, adapter, task, splits = small_run(tmp_path / "data", Bottleneck(bottleneck=4) + Head(), dropout=0.0)
        config = TrainConfig(steps=4, batch=batch, accumulate=accumulate, clip=0.05, keep_best=False)
        run = (splits.train, None, config, tmp_path / f"{batch}", TwoPass(add=1.0))
        train(model, adapter, task, *run, progress=False)
        digests.append(adapter.tensors())
    for key, tensor in digests[0].items():
        torch.testing.assert_close(digests[1][key], tensor, atol=1e-5, rtol=1e-4, msg=key)


def test_full_fine_tuning_and_bf16(tmp_path: Path) -> None:
    for form in ("decoupled", "joint"):
        _, _, task, splits = small_run(tmp_path / "data")
        model = small_model().model
        config = TrainConfig(steps=4, batch=6, precision="bf16", learning_rate=1e-3, log_every=1)
        before = digest(dict(model.state_dict()))
        run = (splits.train, None, config, tmp_path / form, TwoPass(form=form))  # type: ignore[arg-type]
        result = train(model, None, task, *run, progress=False)
        assert digest(dict(model.state_dict())) != before
        assert result.skipped_steps == 0
        assert all(line["loss"] > 0 for line in result.history)


def test_an_objective_of_ones_own_may_carry_back_what_it_likes(tmp_path: Path) -> None:
    turns: list[tuple[int, int]] = []

    class InTwo:
        def parts(self, model: nn.Module, batch: Any, task: Any, turn: Turn) -> Any:
            turns.append((turn.step, turn.micro))
            for last in (False, True):
                loss: Tensor = task.loss(model, batch)
                yield Part(0.5 * loss, last)

    config = replace(CONFIG, steps=3, keep_best=False)
    found = []
    for objective in (None, InTwo()):
        model, adapter, task, splits = small_run(tmp_path / "data", LoRA(rank=2) + Head(), dropout=0.0)
        out = tmp_path / str(len(found))
        result = train(model, adapter, task, splits.train, None, config, out, objective, progress=False)
        found.append((adapter.tensors(), result.history[-1]["loss"]))
    assert turns == [(step, micro) for step in range(3) for micro in range(2)]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for key, tensor in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], tensor, atol=1e-6, rtol=1e-5)


class Opinionated(LoRA):
    """A method that brings its own objective."""

    def objective(self, model: nn.Module, batch: Any, task_loss: Any) -> Tensor:
        loss: Tensor = task_loss(model, batch)
        return loss


def test_what_does_not_fit_together(tmp_path: Path) -> None:
    model, adapter, task, splits = small_run(tmp_path / "data", Opinionated(rank=2) + Head())
    run = (splits.train, None, TrainConfig(steps=1, batch=4), tmp_path / "out", TwoPass())
    with pytest.raises(UnsupportedError, match=r"brings an objective of its own, which 'two passes .*' would replace"):
        train(model, adapter, task, *run)
    model, adapter, task, splits = small_run(tmp_path / "data")

    class LossOnly:
        batch, loss, evaluate = task.batch, task.loss, task.evaluate

    with pytest.raises(UnsupportedError, match=r"two passes compare scores: .* LossOnly has not both"):
        train(model, adapter, LossOnly(), *run)


def test_a_checkpoint_of_another_objective_is_refused(tmp_path: Path) -> None:
    break_off(tmp_path, "out", CONFIG, 20, objective=TwoPass())
    model, adapter, task, splits = small_run(tmp_path / "data")
    for other in (TwoPass(weight=2.0), None):
        with pytest.raises(StateError, match="belongs to a run that differs in objective"):
            train(model, adapter, task, splits.train, splits.validation, CONFIG, tmp_path / "out", other)
    stopping = Stopping(task, 1)
    with pytest.raises(BrokenOffError):
        train(model, adapter, stopping, splits.train, splits.validation, CONFIG, tmp_path / "out", TwoPass())


def recipe_of(root: Path, objective: Any = None) -> dict[str, Any]:
    """A short run on the reference model."""
    small_data(root / "data")
    return {
        "base": "reference-vit",
        "method": [{"method": "lora", "rank": 2, "dropout": 0.1}, "head"],
        "data": str(root / "data"),
        "train": {"steps": 2, "batch": 4},
        "out": str(root / "run"),
        **({} if objective is None else {"objective": objective}),
    }


def test_the_section_of_a_recipe(tmp_path: Path) -> None:
    recipe = from_dict(recipe_of(tmp_path, "two_pass"), "here")
    assert recipe.objective == TwoPass()
    assert from_dict(recipe_of(tmp_path), "here").objective is None
    written = recipe.to_dict()["objective"]
    assert written == {
        "kind": "two_pass",
        "consistency": "sym_kl",
        "weight": 1.0,
        "add": 0.0,
        "form": "decoupled",
        "every": 1,
        "share": 1.0,
        "deep": 0.0,
        "warmup": 0,
    }
    assert from_dict(recipe.to_dict(), "there") == recipe
    changed = recipe_files.change(recipe, ["objective.weight=0.5", "objective.form=joint"])
    assert changed.objective == TwoPass(weight=0.5, form="joint")
    assert recipe_files.change(recipe, ["objective=null"]).objective is None
    file = tmp_path / "one.yaml"
    file.write_text("extends: two.yaml\nobjective: {weight: 0.25}\n")
    (tmp_path / "two.yaml").write_text(
        f"method: lora\ndata: {tmp_path / 'data'}\nobjective: {{kind: two_pass, share: 0.5}}\n"
    )
    assert recipe_files.load_recipe(file).objective == TwoPass(weight=0.25, share=0.5)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("two_passes", r"here: objective.kind: no objective is called 'two_passes'; did you mean 'two_pass'\?"),
        ({"weight": 1.0}, r"here: the key 'objective.kind' is missing; known: two_pass"),
        ({"kind": "two_pass", "wieght": 1}, r"here: 'objective.wieght' is no key of a recipe; did you mean 'weight'"),
        ({"kind": "two_pass", "share": 2}, r"here: objective.share lies above 0 and is at most 1, got 2"),
        ({"kind": "two_pass", "every": "x"}, r"here: objective.every: .*, found 'x'"),
        ({"kind": "two_pass", "weight": True}, r"here: objective.weight: expected a number or a name, found true"),
        ({"kind": "two_pass", "form": "jointly"}, r"here: objective.form.*, found 'jointly'|got 'jointly'"),
        (3, r"here: objective: .*found 3"),
    ],
    ids=str,
)
def test_bad_sections_are_named(objective: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        from_dict(recipe_of(tmp_path, objective), "here")


def test_a_run_and_its_plan(tmp_path: Path) -> None:
    recipe = from_dict(recipe_of(tmp_path, {"kind": "two_pass", "weight": 0.5}), "here")
    plain, two = plan(from_dict(recipe_of(tmp_path), "here")), plan(recipe)
    assert plain.objective is None
    assert two.objective is not None
    assert two.objective.title == "two passes (decoupled), symmetric KL, weight 0.5"
    assert (two.objective.work, two.objective.activations) == (2.5, 1.0)
    assert two.memory.activations == plain.memory.activations
    joint = plan(recipe_files.change(recipe, ["objective.form=joint"]))
    assert joint.memory.activations == 2 * (plain.memory.activations or 0)
    assert two.time is not None
    assert plain.time is not None
    assert two.time.step > 1.4 * plain.time.step
    result = run(recipe, progress=False)
    assert result["objective"] == two.objective.title
    assert result["skipped_steps"] == 0


def test_the_base_stands_in_evaluation_mode(tmp_path: Path) -> None:
    seen: dict[str, set[tuple[bool, ...]]] = {}
    for mode in ("eval", "train"):
        model, adapter, task, splits = small_run(tmp_path / "data", LoRA(rank=2, dropout=0.2) + Head())
        own = {module for piece in adapter.pieces for module in piece.module.modules()}
        found, modes = seen.setdefault(mode, set()), {module: module.training for module in model.modules()}

        class Looking(Stopping):
            def loss(self, model: nn.Module, batch: Any, own: Any = own, found: Any = found) -> Tensor:
                found.update((module in own, module.training) for module in model.modules())
                return super().loss(model, batch)

        config = TrainConfig(steps=2, batch=4, evaluate_every=1, base_mode=mode)  # type: ignore[arg-type]
        run = (splits.train, splits.validation, config, tmp_path / mode)
        train(model, adapter, Looking(task, 0), *run, progress=False)
        assert {module: module.training for module in model.modules()} == modes
    assert seen["eval"] == {(True, True), (False, False)}
    assert seen["train"] == {(True, True), (False, True)}


def test_the_mode_of_the_base_matters_only_where_the_base_has_dropout(tmp_path: Path) -> None:
    found: dict[float, list[str]] = {0.0: [], 0.3: []}
    for dropout, digests in found.items():
        for mode in ("eval", "train"):
            model, adapter, task, splits = small_run(tmp_path / "data", LoRA(rank=2, dropout=0.2) + Head(), dropout)
            config = TrainConfig(steps=3, batch=4, base_mode=mode)  # type: ignore[arg-type]
            run = (splits.train, splits.validation, config, tmp_path / f"{dropout}{mode}")
            train(model, adapter, task, *run, progress=False)
            digests.append(digest(adapter.tensors()))
    assert found[0.0][0] == found[0.0][1]
    assert found[0.3][0] != found[0.3][1]


@pytest.mark.parametrize("objective", [None, TwoPass()], ids=["plain", "two"])
def test_gradient_checkpointing_works_although_the_base_is_in_evaluation_mode(
    objective: TwoPass | None, tmp_path: Path
) -> None:
    digests = []
    for checkpointing in (False, True):
        opened = small_model(dropout=0.3)
        torch.manual_seed(1)
        adapter = attach(opened.model, DrawnMethod(layers=(0,)) + LoRA(rank=2, dropout=0.2) + Head())
        _, _, task, splits = small_run(tmp_path / "data")
        if checkpointing:
            opened.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        layer = opened.model.vit.layers[0] if hasattr(opened.model.vit, "layers") else opened.model.vit.encoder.layer[0]  # type: ignore
        before = layer.__dict__.get("_gradient_checkpointing_func")
        config = TrainConfig(steps=3, batch=4, learning_rate=0.01)
        out = tmp_path / str(checkpointing)
        train(opened.model, adapter, task, splits.train, None, config, out, objective, progress=False)
        assert layer.__dict__.get("_gradient_checkpointing_func") is before
        (drawn,) = drawn_in(opened.model)
        passes = 3 * (1 if objective is None else 3)
        again = 3 * (1 if objective is None else 2)
        assert len(drawn.seen) == passes + (again if checkpointing else 0), "blocks are computed again for backward"
        digests.append(adapter.tensors())
    for key, tensor in digests[0].items():
        torch.testing.assert_close(digests[1][key], tensor, atol=1e-6, rtol=1e-5, msg=key)
