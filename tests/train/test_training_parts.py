"""MoSA through the training loop: what rests, against literal copies, against a plain bottleneck, torn and taken up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTModel

import epitaxy
from epitaxy import Bottleneck, Head, LoRA
from epitaxy.core.errors import EpitaxyError
from epitaxy.methods.draws import at_step
from epitaxy.methods.mosa import MoSA
from epitaxy.methods.mosa_lora import MoSALoRA
from epitaxy.methods.mosa_module import SparseMLP
from epitaxy.methods.partition import split_parameters
from epitaxy.tasks.classification import Classification
from epitaxy.tasks.two_pass import TwoPass
from epitaxy.train.config import TrainConfig
from epitaxy.train.lazy_adam import LazyAdamW
from epitaxy.train.loop import train
from epitaxy.train.optimizers import optimizer_of
from epitaxy.train.session import Session
from epitaxy.train.trainable import trainable_of
from tests.train.copies import Copies, copied
from tests.train.small import CLASSES, CONFIG, BrokenOffError, digest, small_model, small_run

KINDS: dict[str, Any] = {
    "element": MoSA(bottleneck=6, parts=3, norm="layer", reads="stream", scale=1.0),
    "both": MoSA(bottleneck=6, parts=3, split="both", bias="parts", scale=1.0),
    "out_slice": MoSA(bottleneck=6, parts=3, partition="out_slice", scale=1.0),
    "rank_slice": MoSA(bottleneck=7, parts=3, partition="rank_slice", scale=1.0),
    "by row": MoSA(bottleneck=6, parts=3, draw="row", scale=1.0),
    "coefficients": MoSA(bottleneck=6, parts=3, coefficients=True, scale=1.0),
    "lora": MoSALoRA(rank=6, parts=3, partition="rank_slice", coefficients=True),
}


def caught(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """The sessions that ``train`` makes."""
    found: list[Session] = []
    made = Session.__init__

    def noted(self: Session, *given: Any) -> None:
        made(self, *given)
        found.append(self)

    monkeypatch.setattr(Session, "__init__", noted)
    return found


def run(root: Path, method: Any, config: TrainConfig, objective: Any = None, task_of: Any = None) -> tuple[Any, Any]:
    model, adapter, task, splits = small_run(root / "data", method)
    task = task_of(task) if task_of else task
    result = train(
        model, adapter, task, splits.train, splits.validation, config, root / "out", objective, progress=False
    )
    return adapter, result


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_moves_what_was_drawn_and_what_is_shared(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the elements that rest keep a gradient of exactly 0."""
    sessions = caught(monkeypatch)
    gradients: dict[str, Tensor] = {}
    drawn: dict[str, Tensor] = {}
    step = LazyAdamW.step

    def noted(self: LazyAdamW, closure: Any = None) -> Any:
        for name, parameter, _, used in self._parts():
            gradients[name], drawn[name] = parameter.grad.clone(), used.clone()
        return step(self, closure)

    monkeypatch.setattr(LazyAdamW, "step", noted)
    model, adapter, task, splits = small_run(tmp_path / "data", KINDS[kind] + Head())
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            if "up" in key:  # where `up` is zero, `down` has no gradient
                parameter.add_(torch.randn_like(parameter))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = 1 if kind == "by row" else 5
    config = TrainConfig(steps=1, batch=batch, learning_rate=0.01, weight_decay=0.2, keep_best=False)
    train(model, adapter, task, splits.train, splits.validation, config, tmp_path / "out", progress=False)
    assert isinstance(sessions[0].optimizer.optimizer, LazyAdamW)
    split = {name: owners for name, _, owners, _ in split_parameters(model)}
    assert split
    assert split.keys() == gradients.keys()
    for name, parameter in model.named_parameters():
        if name not in split:
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
            continue
        assert int(drawn[name].sum()) == 1
        rests = split[name] != int(drawn[name].int().argmax())
        assert bool(rests.any()), name
        assert torch.equal(parameter[rests], before[name][rests]), name
        assert gradients[name][rests].abs().max() == 0, name
        assert bool((parameter[~rests] != before[name][~rests]).any()), name
    for name, _, _, used in split_parameters(model):
        assert not used.any(), name


def test_only_parts_and_published_recipes_get_another_optimiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = caught(monkeypatch)
    kinds = []
    for number, (method, change) in enumerate(
        [
            (LoRA(rank=2), {}),
            (MoSA(bottleneck=4, parts=1), {}),
            (MoSA(bottleneck=4, parts=2), {"idle": "momentum", "betas": (0.7, 0.8), "epsilon": 1e-5}),
            (LoRA(rank=2), {"optimiser": "hf_adamw", "decay": "weights", "weight_decay": 0.3}),
        ]
    ):
        run(tmp_path / str(number), method + Head(), TrainConfig(steps=1, batch=4, **change))
        optimizer = sessions[-1].optimizer.optimizer
        kinds.append((type(optimizer), getattr(optimizer, "idle", None), getattr(optimizer, "published", None)))
    plain = (torch.optim.AdamW, None, None)
    assert kinds == [plain, plain, (LazyAdamW, "momentum", False), (LazyAdamW, "lazy", True)]
    assert {(group["betas"], group["eps"]) for group in sessions[2].optimizer.param_groups} == {((0.7, 0.8), 1e-5)}
    assert {group["weight_decay"] for group in sessions[3].optimizer.param_groups} == {0.3, 0.0}


@pytest.mark.parametrize("setting", [{"idle": "sleepy"}, {"optimiser": "adam"}, {"decay": "weight"}], ids=str)
def test_settings_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(EpitaxyError, match=rf"train.{next(iter(setting))} is one of "):
        TrainConfig(**setting)


@pytest.mark.parametrize(
    ("decay", "decaying"), [("matrices", {"up.weight"}), ("weights", {"up.weight", "norm.weight"})]
)
def test_what_decays(decay: Any, decaying: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = caught(monkeypatch)
    adapter, _ = run(tmp_path, KINDS["element"], TrainConfig(steps=1, batch=4, decay=decay, weight_decay=0.3))
    groups = sessions[0].optimizer.param_groups
    names = {p: name for name, p in adapter.named_parameters()}
    found = {names[p].split("module.")[1] for group in groups if group["weight_decay"] for p in group["params"]}
    assert found == decaying | {"down.weight"}


@pytest.mark.parametrize("split", ["up", "down", "both"])
@pytest.mark.parametrize("objective", [None, TwoPass(), TwoPass(form="joint", add=0.5)], ids=str)
def test_training_goes_where_literal_copies_go(split: Any, objective: TwoPass | None) -> None:
    """MoSA in one tensor under the lazy optimiser, and N full copies with masked gradients under torch's AdamW."""
    method = MoSA(bottleneck=6, parts=3, split=split, norm="layer", reads="stream", scale=1.0, dropout=0.0)
    models = []
    for _ in range(2):
        opened = small_model(dropout=0.0)
        torch.manual_seed(1)
        epitaxy.attach(opened.model, method)
        models.append(opened.model.double().train())
    ours, theirs = models
    sparse = [module for module in ours.modules() if isinstance(module, SparseMLP)]
    copies = copied(theirs)
    task = Classification(opened, CLASSES)
    settings: dict[str, Any] = {
        "lr": 0.02,
        "weight_decay": 0.1 if split == "up" else 0.0,
    }  # copies of `down` decay whole
    optimizers = (
        LazyAdamW([p for p in ours.parameters() if p.requires_grad], partial(split_parameters, ours), **settings),
        torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **settings),
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        for micro in range(2):
            batch = {
                "pixel_values": torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.double),
                "labels": torch.randint(3, (4,), generator=generator),
            }
            for model in models:
                if objective is not None:
                    objective.backward(model, batch, task, step, micro)
                else:
                    with at_step(model, step, micro):
                        task.loss(model, batch).backward()
        for module in theirs.modules():
            if isinstance(module, Copies):
                module.mask()
        for model, optimizer in zip(models, optimizers, strict=True):
            assert torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.01) > 0.01
            optimizer.step()
            optimizer.zero_grad()
    assert len(copies) == len(sparse) == 2
    for mine, other in zip(sparse, copies, strict=True):
        assert mine.norm is not None
        assert other.norm is not None
        pairs = list(zip(mine.norm.parameters(), other.norm.parameters(), strict=True))
        for linear, parts, copy in (
            (mine.down, mine.down_parts, other.down),
            (mine.up, mine.up_parts, other.up),
        ):
            if parts is None:
                pairs += list(zip(linear.parameters(), copy.parameters(), strict=True))
                continue
            pairs += [(linear.weight[parts.owners == i], w[parts.owners == i]) for i, w in enumerate(copy.weights)]
            pairs.append((linear.bias, copy.biases[0]))
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert float(mine.up.weight.detach().abs().min()) > 0


def test_one_part_trains_as_a_plain_bottleneck_to_the_bit(tmp_path: Path) -> None:
    method = MoSA(bottleneck=6, parts=1, norm="layer", reads="stream", split="both")
    config = replace(CONFIG, weight_decay=0.3)
    found = []
    for number, tested in enumerate((method, method.plain)):
        adapter, result = run(tmp_path / str(number), tested + Head(), config)
        tensors = {key.partition(".")[2]: tensor for key, tensor in adapter.tensors().items()}
        found.append((digest(tensors), [line["loss"] for line in result.history]))
    assert found[0] == found[1]
    assert isinstance(method.plain, Bottleneck)


@pytest.mark.parametrize("partition", ["element", "out_slice", "rank_slice"])
def test_state_and_file_are_hardly_larger_than_a_bottlenecks(partition: Any, tmp_path: Path) -> None:
    method = MoSA.adaptformer(partition=partition)
    states, files = [], []
    for number, tested in enumerate((method, method.plain)):
        model = ViTModel(
            ViTConfig(hidden_size=768, num_hidden_layers=1, intermediate_size=32, image_size=32, patch_size=16)
        )
        adapter = epitaxy.attach(model, tested)
        model.train()
        optimizer = optimizer_of(model, trainable_of(model, adapter), TrainConfig())
        model(torch.randn(2, 3, 32, 32)).last_hidden_state.square().sum().backward()
        optimizer.step()
        states.append(sum(t.numel() * t.element_size() for held in optimizer.state.values() for t in held.values()))
        epitaxy.save(model, tmp_path / str(number))
        files.append((tmp_path / str(number) / "adapter.safetensors").stat().st_size)
    assert states[1] > 8 * 2 * 64 * 768
    assert states[0] <= 1.05 * states[1]
    assert files[0] <= 1.05 * files[1]


def test_a_step_without_a_finite_loss_leaves_no_draws_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other step draws one part of each projection, so their counts add up to these steps."""

    class Sometimes(Calls):
        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return super().loss(model, batch) * (float("nan") if self.calls % 3 == 1 else 1.0)

    sessions = caught(monkeypatch)
    config = TrainConfig(steps=9, batch=4, keep_best=False, evaluate_every=9)
    adapter, result = run(tmp_path, KINDS["element"] + Head(), config, task_of=lambda task: Sometimes(task, 0))
    assert result.skipped_steps == 3
    state = sessions[0].optimizer.optimizer.state
    counts = [state[p]["step"] for name, p in adapter.named_parameters() if name.endswith("up.weight")]
    assert [int(count.sum()) for count in counts] == [6, 6]


class Calls:
    """A task that breaks off at its n-th pass (0: never), and otherwise is the task it wraps."""

    def __init__(self, task: Any, at: int) -> None:
        self.task, self.at, self.calls = task, at, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise BrokenOffError

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self._count()
        loss: Tensor = self.task.loss(model, batch)
        return loss

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self._count()
        logits: Tensor = self.task.logits(model, batch)
        return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", [None, TwoPass(), TwoPass(form="joint", every=2)], ids=str)
def test_a_resumed_run_has_the_same_bits(kind: str, objective: TwoPass | None, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=9, evaluate_every=2, checkpoint_every=3)
    if kind == "both":
        config = replace(config, idle="momentum")
    if kind == "out_slice":
        config = replace(config, optimiser="hf_adamw")
    passes = 3 if objective is not None and objective.form == "decoupled" else 1
    digests = []
    for out, stops in (("whole", ()), ("torn", (13 * passes, 5 * passes))):  # in the middle of a step
        for stop in (*stops, None):
            model, adapter, task, splits = small_run(tmp_path / "data", KINDS[kind] + Head())
            torch.randn(7 + len(digests))
            tested = Calls(task, stop or 0)
            begun = (model, adapter, tested, splits.train, splits.validation, config, tmp_path / out, objective)
            if stop is None:
                result = train(*begun, progress=False)
                digests.append(digest(adapter.tensors()))
            else:
                with pytest.raises(BrokenOffError):
                    train(*begun, progress=False)
    assert result.resumed_at == 6
    assert digests[0] == digests[1]


def test_a_trainer_of_transformers_takes_the_optimiser(tmp_path: Path) -> None:
    opened = small_model(dropout=0.0)
    epitaxy.attach(opened.model, KINDS["both"] + Head())
    start = {name: p.detach().clone() for name, p in opened.model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    data = [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": n % 3} for n in range(12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    split = partial(split_parameters, opened.model)
    trainer = Trainer(
        opened.model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(LazyAdamW, {"split": split, "lr": 0.01})
    )
    trainer.train()
    for name, parameter, owners, used in split():
        counts = trainer.optimizer.optimizer.state[parameter]["step"]
        assert int(counts.sum()) == 2, name
        rests = (counts == 0)[owners.long()]
        assert bool(rests.any())
        assert torch.equal(parameter[rests], start[name][rests])
        assert not used.any()
