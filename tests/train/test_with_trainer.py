"""Our objective and clocks inside ``transformers.Trainer``, against literal loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from epitaxy import Head, LoRA, TwoPass, adapters, attach
from epitaxy.core.errors import UnsupportedError
from epitaxy.methods.draws import at_step
from epitaxy.train.modes import training_modes
from epitaxy.train.with_trainer import WithObjective
from tests.tasks.drawing import DrawnMethod, drawn_in
from tests.train.small import small_model

ROWS = 12


def examples(rows: int = ROWS) -> list[dict[str, Any]]:
    """Pictures of noise."""
    generator = torch.Generator().manual_seed(2)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": n % 3} for n in range(rows)]


def adapted() -> nn.Module:
    """A small transformer with a method that draws."""
    model = small_model(dropout=0.3).model
    torch.manual_seed(1)
    attach(model, DrawnMethod() + Head())
    return model


def sentences() -> list[dict[str, Any]]:
    """The same sentence, of which fewer and fewer tokens count."""
    return [
        {"input_ids": list(range(1, 9)), "labels": [-100] * (n % 4) + list(range(1 + n % 4, 9))} for n in range(ROWS)
    ]


def language(method: Any) -> nn.Module:
    """A small causal language model with an adapter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, pad_token_id=0, **sizes))
    torch.manual_seed(1)
    attach(model, method)
    return model


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Three examples a batch, two batches a step, no shuffling."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1e9,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**{**settings, **changes})


def trainer(model: nn.Module, given: TwoPass | None, folder: Path, data: Any = None, **changes: Any) -> Any:
    """A Trainer of the user's, in three lines."""

    class Mine(WithObjective, Trainer):
        objective = given

    return Mine(model=model, args=arguments(folder, **changes), train_dataset=data or examples())


OBJECTIVES = [TwoPass(), TwoPass(form="joint", add=0.4), TwoPass(share=0.67, consistency="mse"), TwoPass(every=2), None]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_training_is_that_of_a_plain_loop(objective: TwoPass | None, tmp_path: Path) -> None:
    model = adapted()
    run = trainer(model, objective, tmp_path, label_smoothing_factor=0.1)
    run.train()
    logged = [line["loss"] for line in run.state.log_history if "loss" in line]

    other, losses = adapted(), []
    own = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=0.01, weight_decay=0.0)
    data, place = examples(), 0
    with training_modes(other, list(adapters(other).values())):
        for step in range(4):
            total = 0.0
            for micro in range(2):
                rows = data[place : place + 3]
                place = (place + 3) % ROWS
                x, labels = (
                    torch.stack([row["pixel_values"] for row in rows]),
                    torch.tensor([row["labels"] for row in rows]),
                )
                loss = by_hand(objective, other, x, labels, step, micro) / 2
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    assert logged == pytest.approx(losses, rel=1e-3)
    for ours, theirs in zip((p for p in model.parameters() if p.requires_grad), own, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def by_hand(objective: TwoPass | None, model: nn.Module, x: Tensor, labels: Tensor, step: int, micro: int) -> Tensor:
    """The objective as one graph of sequential passes; the draws of both forms are the same."""
    with at_step(model, step, micro, 0):
        p = model(pixel_values=x).logits
    loss = F.cross_entropy(p, labels, label_smoothing=0.1)
    if objective is None or step % objective.every:
        return loss
    rows = max(1, round(objective.share * len(x)))
    with at_step(model, step, micro, 1):
        q = model(pixel_values=x[:rows]).logits
    p = p[:rows]
    if objective.consistency == "mse":
        tie = (p - q).square().sum() / rows
    else:
        a, b = p.log_softmax(-1), q.log_softmax(-1)
        tie = 0.5 * F.kl_div(a, b.detach(), reduction="batchmean", log_target=True)
        tie = tie + 0.5 * F.kl_div(b, a.detach(), reduction="batchmean", log_target=True)
    return loss + tie + objective.add * F.cross_entropy(q, labels[:rows], label_smoothing=0.1)


@pytest.mark.parametrize("objective", [TwoPass(), None], ids=str)
def test_a_run_taken_up_by_the_trainer_draws_as_the_whole_one(objective: Any, tmp_path: Path) -> None:
    """Clocks follow ``state.global_step``; the Trainer itself restores what else is random."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    model = language(DrawnMethod() + LoRA(rank=2, dropout=0.2) + Head())
    trainer(model, objective, tmp_path / "whole", sentences(), **settings).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    first = language(DrawnMethod() + LoRA(rank=2, dropout=0.2) + Head())
    run = trainer(first, objective, tmp_path / "torn", sentences(), **settings)
    run.add_callback(Stop())
    run.train()
    second = language(DrawnMethod() + LoRA(rank=2, dropout=0.2) + Head())
    trainer(second, objective, tmp_path / "torn", sentences(), **settings).train(
        str(tmp_path / "torn" / "checkpoint-2")
    )
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for ours, theirs in zip(second.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    steps = [seen[:2] for seen in drawn_in(second)[0].seen]
    assert sorted(set(steps)) == [(step, micro) for step in (2, 3) for micro in (0, 1)]


def test_tokens_count_as_the_trainer_counts_them(tmp_path: Path) -> None:
    """A causal model: shifted labels, ignored positions, sums over all accumulated batches."""
    grads = {}
    for name, objective in (("ours", TwoPass(weight=0.0)), ("theirs", None)):
        model = language(LoRA(rank=2) + Head())
        run = trainer(model, objective, tmp_path / name, sentences(), max_steps=1, optim="sgd", learning_rate=1.0)
        start = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
        run.train()
        grads[name] = {key: start[key] - p.detach() for key, p in model.named_parameters() if p.requires_grad}
        grads[name]["loss"] = torch.tensor(run.state.log_history[0]["loss"])
    assert any(float(change.abs().max()) > 1e-3 for key, change in grads["ours"].items() if key != "loss")
    for key, change in grads["theirs"].items():
        torch.testing.assert_close(grads["ours"][key], change, atol=1e-5, rtol=1e-3, msg=key)


def test_evaluation_and_modes_are_the_trainers(tmp_path: Path) -> None:
    model = adapted()
    run = trainer(model, TwoPass(), tmp_path, max_steps=1)
    run.train()
    assert all(module.training for module in model.modules())
    seen = len(drawn_in(model)[0].seen)
    loss = run.evaluate(examples(3))["eval_loss"]
    assert len(drawn_in(model)[0].seen) == seen
    with torch.no_grad():
        scores = model.eval()(pixel_values=torch.stack([row["pixel_values"] for row in examples(3)])).logits
    assert loss == pytest.approx(float(F.cross_entropy(scores, torch.tensor([0, 1, 2]))), rel=1e-4)


def test_what_the_objective_cannot_do_there(tmp_path: Path) -> None:
    run = trainer(adapted(), TwoPass(), tmp_path)
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()
    with pytest.raises(UnsupportedError, match="compute_loss_func sees one pass only"):
        run.train()
    rows = [{"pixel_values": row["pixel_values"], "labels": [0.0, 1.0, 0.0]} for row in examples()]
    with pytest.raises(UnsupportedError, match=r"compared for one class each, the labels are torch.float32 of shape"):
        trainer(adapted(), TwoPass(), tmp_path, rows).train()
