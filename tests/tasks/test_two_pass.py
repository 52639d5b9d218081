"""Two passes against literal forms: values, gradients, draws, memory, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from epitaxy import Head, LoRA, TwoPass, attach
from epitaxy.bench.measure import most_kept
from epitaxy.core.errors import EpitaxyError, UnsupportedError
from epitaxy.methods.draws import at_step, clocks
from epitaxy.tasks import batch_rows
from epitaxy.tasks.consistency import distance, pull
from epitaxy.tasks.objective import Scores, Turn, backward
from tests.tasks.drawing import DrawnMethod, drawn_in

BATCH, CLASSES, LAYERS = 6, 3, 4


def vit(dropout: float = 0.1, layers: int = LAYERS, **sizes: int) -> ViTForImageClassification:
    """A small transformer in training mode, its own dropout on."""
    torch.manual_seed(0)
    config = ViTConfig(
        **{
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 16,
            "patch_size": 8,
            **sizes,
        },
        num_hidden_layers=layers,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config).train()


def adapted(method: Any = None, dropout: float = 0.1) -> ViTForImageClassification:
    """With an adapter whose every factor is away from its start."""
    model = vit(dropout)
    adapter = attach(model, method or DrawnMethod() + LoRA(rank=2, dropout=0.2) + Head())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch_of(rows: int = BATCH) -> dict[str, Tensor]:
    """Noise with labels."""
    torch.manual_seed(3)
    return {"pixel_values": torch.randn(rows, 3, 16, 16), "labels": torch.arange(rows) % CLASSES}


TASK = Scores(
    lambda model, batch: model(pixel_values=batch["pixel_values"]).logits,
    lambda logits, batch: F.cross_entropy(logits, batch["labels"]),
)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, taken away."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def literal(objective: TwoPass, p: Tensor, q: Tensor, hp: Any, hq: Any, labels: Tensor, step: int = 0) -> Tensor:
    """The formula as it is written, on the scores of two passes; ``p`` may have more rows than ``q``."""
    loss = F.cross_entropy(p, labels)
    if step % objective.every:
        return loss
    rows = len(q)
    a, b = p[:rows], q
    tie = torch.zeros(())
    if objective.consistency == "sym_kl":
        for own, other in ((a, b), (b, a)):
            target = other.detach().softmax(-1)
            tie = tie + 0.5 * (target * (target.log() - own.softmax(-1).log())).sum() / rows
    if objective.consistency == "mse":
        tie = (a - b).pow(2).sum() / rows
    deep = sum((((one[:rows] - two) ** 2).mean() for one, two in zip(hp, hq, strict=True)), torch.zeros(()))
    weight = objective.weight * (min(1.0, step / objective.warmup) if objective.warmup else 1.0)
    added = objective.add * F.cross_entropy(q, labels[:rows]) if objective.add else 0.0
    return loss + added + weight * (tie + objective.deep / LAYERS * deep)


def hidden(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Scores and the outputs of the lower half of the blocks, from transformers itself."""
    output = model(pixel_values=batch["pixel_values"], output_hidden_states=True)
    return output.logits, list(output.hidden_states[1 : LAYERS // 2 + 1])


FORMS = [
    TwoPass(),
    TwoPass(weight=0.7, add=0.3),
    TwoPass(consistency="mse", weight=0.4),
    TwoPass(consistency="none", add=1.0),
    TwoPass(deep=5.0),
    TwoPass(consistency="mse", deep=5.0, add=0.5, warmup=10),
    TwoPass(share=0.5, add=0.2),
    TwoPass(share=0.3, consistency="mse", deep=3.0),
    TwoPass(every=3),
]


@pytest.mark.parametrize("step", [6, 7])
@pytest.mark.parametrize("objective", FORMS, ids=str)
def test_the_decoupled_form_has_the_gradient_of_two_passes_in_one_graph(objective: TwoPass, step: int) -> None:
    model, batch = adapted(), batch_of()
    torch.manual_seed(11)
    found = objective.backward(model, batch, TASK, step=step, micro=2)
    after = torch.rand(3)
    ours = gradients(model)

    torch.manual_seed(11)
    paired = step % objective.every == 0
    rows = round(objective.share * BATCH)
    with at_step(model, step, 2, 0):
        p, hp = hidden(model, batch)
    q, hq = p, hp
    if paired:
        with at_step(model, step, 2, 1):
            q, hq = hidden(model, {key: value[:rows] for key, value in batch.items()})
    assert torch.equal(torch.rand(3), after), "random states go on as after two passes"
    loss = literal(objective, p, q, hp, hq, batch["labels"], step)
    loss.backward()
    theirs = gradients(model)
    assert not paired or not torch.allclose(p[:rows], q, atol=1e-2), "the passes must differ for this to mean anything"
    assert float(found) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert ours.keys() == theirs.keys()
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in ours.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("rows", [False, True], ids=["batch", "row"])
@pytest.mark.parametrize(
    "objective",
    [
        TwoPass(form="joint"),
        TwoPass(form="joint", consistency="mse", add=0.3, deep=4.0, weight=0.5),
        TwoPass(form="joint", every=3),
    ],
    ids=str,
)
def test_the_joint_form_is_the_formula_on_one_pass_of_the_doubled_batch(objective: TwoPass, rows: bool) -> None:
    model, batch = adapted(DrawnMethod(rows=rows) + LoRA(rank=2, dropout=0.2) + Head()), batch_of()
    for step in (3, 4):
        torch.manual_seed(11)
        found = objective.backward(model, batch, TASK, step=step)
        ours = gradients(model)
        torch.manual_seed(11)
        if objective.paired(step):
            with at_step(model, step, 0, 0, passes=2):
                both, layers = hidden(model, {"pixel_values": torch.cat([batch["pixel_values"]] * 2)})
            p, q = both[:BATCH], both[BATCH:]
            hp, hq = [layer[:BATCH] for layer in layers], [layer[BATCH:] for layer in layers]
        else:
            with at_step(model, step):
                p, hp = hidden(model, batch)
            q, hq = p, hp
        loss = literal(objective, p, q, hp, hq, batch["labels"], step)
        loss.backward()
        assert float(found) == pytest.approx(float(loss.detach()), rel=1e-5)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("rows", [False, True], ids=["batch", "row"])
def test_both_forms_make_the_same_draws(rows: bool) -> None:
    """Without dropout nothing but the clock tells the passes apart, so the two forms are one number."""
    model, batch, results = adapted(DrawnMethod(rows=rows) + Head(), dropout=0.0), batch_of(), []
    for form in ("decoupled", "joint"):
        values = [float(TwoPass(form=form, add=0.5).backward(model, batch, TASK, step=step)) for step in range(4)]  # type: ignore[arg-type]
        results.append((values, gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    first = drawn_in(model)[0]
    assert {step for step, *_ in first.seen} == set(range(4))
    assert all(clock.automatic for clock in clocks(model)), "the clocks are let go of afterwards"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", ["decoupled", "joint"])
def test_gradient_checkpointing_changes_nothing(form: Any, reentrant: bool) -> None:
    objective, batch = TwoPass(form=form, deep=2.0), batch_of()
    model = adapted()
    torch.manual_seed(11)
    expected = float(objective.backward(model, batch, TASK, step=3))
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = len(drawn_in(model)[0].seen)
    torch.manual_seed(11)
    assert float(objective.backward(model, batch, TASK, step=3)) == pytest.approx(expected, rel=1e-6)
    found = gradients(model)
    assert len(drawn_in(model)[0].seen) - calls == (5 if form == "decoupled" else 2), "blocks were computed again"
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def held_by(objective: TwoPass | None, model: nn.Module, batch: Any) -> int:
    """The most bytes held for backward passes in one step."""

    def step() -> None:
        if objective is None:
            TASK.criterion(TASK.logits(model, batch), batch).backward()
        else:
            objective.backward(model, batch, TASK)

    held = most_kept(step, model)
    model.zero_grad()
    return held


def test_the_decoupled_form_holds_the_activations_of_one_pass() -> None:
    model, batch = adapted(LoRA(rank=4, dropout=0.1) + Head()), batch_of(32)
    plain, decoupled, joint = (held_by(one, model, batch) for one in (None, TwoPass(), TwoPass(form="joint")))
    assert decoupled <= 0.6 * joint
    assert decoupled <= 1.05 * plain
    assert joint == pytest.approx(TwoPass(form="joint").memory * plain, rel=0.05)


def test_the_target_of_the_kl_gets_no_gradient() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    distance("sym_kl", p, q).backward()
    for own, other in ((p, q), (q, p)):
        expected = 0.5 * (own.softmax(-1) - other.softmax(-1)) / 5  # of KL(other || own) by hand, the target constant
        torch.testing.assert_close(own.grad, expected, atol=1e-12, rtol=1e-10)
    p.grad = None
    pull("sym_kl", p, q).backward()
    torch.testing.assert_close(p.grad, 0.5 * (p.softmax(-1) - q.softmax(-1)) / 5, atol=1e-12, rtol=1e-10)


def test_weight_zero_is_cross_entropy_alone() -> None:
    for form in ("decoupled", "joint"):
        model, batch = adapted(LoRA(rank=2) + Head(), dropout=0.0), batch_of()
        found = TwoPass(weight=0.0, form=form).backward(model, batch, TASK)  # type: ignore[arg-type]
        ours = gradients(model)
        loss = TASK.criterion(TASK.logits(model, batch), batch)
        loss.backward()
        assert float(found) == pytest.approx(float(loss), rel=1e-6)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-7, rtol=1e-5)


def test_a_model_without_chance_has_no_kl() -> None:
    model, batch = adapted(LoRA(rank=2) + Head(), dropout=0.0), batch_of()
    with_kl = float(TwoPass(weight=100.0).backward(model, batch, TASK))
    assert with_kl == pytest.approx(float(TASK.criterion(TASK.logits(model, batch), batch)), rel=1e-5)


def test_any_model_and_full_fine_tuning() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    other = copy.deepcopy(model)
    task = Scores(lambda model, batch: model(batch["x"]), lambda z, batch: F.cross_entropy(z, batch["y"]))
    batch = {"x": torch.randn(10, 8), "y": torch.arange(10) % 3, "names": [str(n) for n in range(10)]}
    torch.manual_seed(1)
    value = TwoPass().backward(model, batch, task)
    torch.manual_seed(1)
    p, q = other(batch["x"]), other(batch["x"])
    loss = literal(TwoPass(), p, q, [], [], batch["y"])  # type: ignore[arg-type]
    loss.backward()
    assert float(value) == pytest.approx(float(loss), rel=1e-6)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    with pytest.raises(UnsupportedError, match=r"objective.deep: Sequential has 0 blocks that are known; leave it 0"):
        TwoPass(deep=0.01).backward(model, batch, task)


@pytest.mark.parametrize("form", ["decoupled", "joint"])
def test_under_autocast_the_consistency_is_fp32(form: Any) -> None:
    model, batch = adapted(dropout=0.0), batch_of()
    seen: list[Tensor] = []

    def logits(model: nn.Module, batch: Any) -> Tensor:
        seen.append(model(pixel_values=batch["pixel_values"]).logits)
        return seen[-1]

    task = Scores(logits, lambda z, batch: F.cross_entropy(z.float(), batch["labels"]))
    with torch.autocast("cpu", torch.bfloat16):
        found = TwoPass(form=form).backward(model, batch, task, step=1)
    assert found.dtype == torch.float32
    assert seen[0].dtype == torch.bfloat16
    p, q = (seen[0], seen[1]) if form == "decoupled" else seen[0].chunk(2)
    expected = literal(TwoPass(), p.float(), q.float(), [], [], batch["labels"])
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


def test_warmup_grows_in_a_straight_line() -> None:
    objective = TwoPass(weight=2.0, warmup=4)
    assert [objective.weight_at(step) for step in (0, 1, 2, 4, 9)] == [0.0, 0.5, 1.0, 2.0, 2.0]
    assert TwoPass(weight=2.0).weight_at(0) == 2.0


def test_cost_and_memory() -> None:
    assert TwoPass().cost() == 2.5
    assert TwoPass().cost(frozen=False) == pytest.approx(7 / 3)
    assert TwoPass(form="joint").cost() == TwoPass(form="joint").cost(frozen=False) == 2
    assert TwoPass(every=2, share=0.5).cost() == pytest.approx(1.375)
    assert (TwoPass().memory, TwoPass(form="joint").memory) == (1, 2)


def test_the_measured_number_of_passes_is_the_cost() -> None:
    model, batch, calls = adapted(LoRA(rank=2) + Head()), batch_of(), []

    def logits(model: nn.Module, batch: Any) -> Tensor:
        calls.append((len(batch["pixel_values"]), torch.is_grad_enabled()))
        return model(pixel_values=batch["pixel_values"]).logits

    task = Scores(logits, TASK.criterion)
    for objective, expected in (
        (TwoPass(), [(6, True), (6, False), (6, True)]),
        (TwoPass(share=0.5), [(6, True), (3, False), (3, True)]),
        (TwoPass(share=0.01), [(6, True), (1, False), (1, True)]),
        (TwoPass(form="joint"), [(12, True)]),
        (TwoPass(every=2), [(6, True)]),
    ):
        calls.clear()
        objective.backward(model, batch, task, step=1)
        assert calls == expected
        work = sum(rows * (1 + grad) for rows, grad in calls) / (2 * 6)
        assert objective.every > 1 or objective.share < 0.1 or work == pytest.approx(objective.cost())


def test_parts_wait_for_their_backward_pass_inside_no_sync() -> None:
    model, batch, inside, seen = adapted(), batch_of(), [0], []

    class NoSync:
        def __enter__(self) -> None:
            inside[0] += 1

        def __exit__(self, *problem: object) -> None:
            inside[0] -= 1

    parts = TwoPass().parts(model, batch, TASK, Turn(0, 0, NoSync))
    total = backward(parts, lambda loss: (seen.append(inside[0]), loss.backward()))
    assert seen == [1, 0], "all but the last backward pass keep their gradients"
    assert total.requires_grad is False
    assert inside == [0]


def test_rows_of_a_batch() -> None:
    batch = {
        "inputs": torch.arange(12).reshape(6, 2),
        "labels": torch.tensor([0, 1, 2]),
        "windows": torch.tensor([1, 3, 2]),
        "shared": torch.zeros(1, 4),
        "scalar": torch.tensor(2.0),
        "names": ["a", "b", "c"],
    }
    first = batch_rows.first(batch, 2)
    assert {key: len(value) for key, value in first.items() if key != "scalar"} == {
        "inputs": 4,
        "labels": 2,
        "windows": 2,
        "shared": 1,
        "names": 2,
    }
    doubled = batch_rows.doubled(batch)
    assert torch.equal(doubled["inputs"], torch.cat([batch["inputs"]] * 2))  # type: ignore[arg-type, list-item]
    assert doubled["windows"].tolist() == [1, 3, 2, 1, 3, 2]
    assert doubled["names"] == ["a", "b", "c", "a", "b", "c"]
    assert doubled["shared"].shape == (1, 4)
    with pytest.raises(EpitaxyError, match="the batch holds no tensors, only text"):
        batch_rows.count({"text": "a"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"consistency": "kl"}, r"objective.consistency is one of sym_kl, mse, none, got 'kl'; did you mean 'sym_kl'"),
        ({"form": "decoupeld"}, r"objective.form is one of decoupled, joint, got .*; did you mean 'decoupled'"),
        ({"weight": -1.0}, r"objective.weight must not be negative and must be finite, got -1.0"),
        ({"deep": float("inf")}, r"objective.deep must not be negative and must be finite, got inf"),
        ({"every": 0}, r"objective.every must be at least 1, got 0"),
        ({"share": 0.0}, r"objective.share lies above 0 and is at most 1, got 0.0"),
        ({"share": 0.5, "form": "joint"}, r"objective.share 0.5 needs objective.form decoupled"),
        ({"consistency": "none"}, r"objective.consistency none leaves a second pass without use"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EpitaxyError, match=message):
        TwoPass(**settings)


def test_a_task_without_scores_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"need a task with logits\(model, batch\) .*, str has not both"):
        TwoPass().backward(adapted(), batch_of(), "task")  # type: ignore[arg-type]
