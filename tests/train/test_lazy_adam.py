"""Parts that rest: against N literal copies, against AdamW, under scalers and accumulation, and across a save."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from epitaxy.core.errors import EpitaxyError, StateError
from epitaxy.methods.partition import split_parameters
from epitaxy.train.lazy_adam import LazyAdamW
from tests.train.copies import Copies, InParts, SplitBranch, two_pass_loss

WIDTH, LOW, CLASSES, PARTS = 12, 6, 5, 3
Pair = tuple[SplitBranch, SplitBranch]


def pair(split: str, biases: bool = False, parts: int = PARTS) -> Pair:
    """The same branch as one tensor with owners and as copies, in float64."""
    torch.manual_seed(3)
    norm, head = nn.LayerNorm(WIDTH).double(), nn.Linear(WIDTH, CLASSES).double()
    maps = {"down": nn.Linear(WIDTH, LOW).double(), "up": nn.Linear(LOW, WIDTH).double()}
    nn.init.zeros_(maps["up"].weight)
    built: list[SplitBranch] = []
    owners = {
        name: (torch.randperm(linear.weight.numel()) % parts).view_as(linear.weight) for name, linear in maps.items()
    }
    for form in (InParts, Copies):
        pieces = {
            name: form(linear, owners[name], parts, biases) if split in (name, "both") else copy.deepcopy(linear)
            for name, linear in maps.items()
        }
        built.append(SplitBranch(copy.deepcopy(norm), pieces["down"], pieces["up"], copy.deepcopy(head)))
    return built[0], built[1]


def batches(steps: int, accumulate: int = 1) -> Iterator[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        yield [
            (
                torch.randn(4, 3, WIDTH, generator=generator, dtype=torch.double),
                torch.randint(CLASSES, (4,), generator=generator),
            )
            for _ in range(accumulate)
        ]


def copies_of(model: SplitBranch) -> list[Copies]:
    return [module for module in (model.down, model.up) if isinstance(module, Copies)]


def differences(ours: SplitBranch, theirs: SplitBranch) -> float:
    """The largest difference between what every part owns, and between everything that is shared."""
    found = []
    for mine, other in ((ours.down, theirs.down), (ours.up, theirs.up)):
        if not isinstance(other, Copies):
            found += [(mine.weight, other.weight), (mine.bias, other.bias)]
            continue
        assert isinstance(mine, InParts)
        found += [(mine.weight[other.owners == i], w[other.owners == i]) for i, w in enumerate(other.weights)]
        found += [(mine.bias[i] if mine.biases else mine.bias, bias) for i, bias in enumerate(other.biases)]
    for mine, other in ((ours.norm, theirs.norm), (ours.head, theirs.head)):
        found += list(zip(mine.parameters(), other.parameters(), strict=True))
    return max(float((a - b).detach().abs().max()) for a, b in found)


def lazy(model: SplitBranch, **settings: Any) -> LazyAdamW:
    return LazyAdamW(model.parameters(), partial(split_parameters, model), **settings)


@pytest.mark.parametrize("split", ["up", "down", "both"])
@pytest.mark.parametrize("biases", [False, True], ids=["shared bias", "bias of each part"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_one_tensor_goes_where_the_copies_go(
    split: str, biases: bool, decay: float, accumulate: int, clip: float | None
) -> None:
    """AdamW of torch on N full copies, whose idle ones have no gradient; only what a copy owns decays."""
    ours, theirs = pair(split, biases)
    settings = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
    ordinary = lazy(ours, weight_decay=decay, **settings)
    owned = [(weight, module.owners == i) for module in copies_of(theirs) for i, weight in enumerate(module.weights)]
    free = {weight for weight, _ in owned}
    reference = torch.optim.AdamW(
        [
            {"params": list(free), "weight_decay": 0.0},
            {"params": [p for p in theirs.parameters() if p not in free], "weight_decay": decay},
        ],
        **settings,
    )
    draws = itertools.cycle([(0, 1), (2, 2), (1, 0), (0, 0), (0, 2)])
    for batch in batches(12, accumulate):
        for x, y in batch:
            parts = next(draws)
            (two_pass_loss(ours, x, y, parts) / accumulate).backward()
            (two_pass_loss(theirs, x, y, parts) / accumulate).backward()
        for module in copies_of(theirs):
            module.mask()
        if clip is not None:
            norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), clip) for model in (ours, theirs)]
            assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-12)
            assert norms[0] > clip
        with torch.no_grad():
            for weight, mine in owned:
                if weight.grad is not None:
                    weight[mine] *= 1 - settings["lr"] * decay
        ordinary.step()
        reference.step()
        ordinary.zero_grad()
        reference.zero_grad()
        assert differences(ours, theirs) < 1e-12
    assert all(float(p.detach().abs().max()) > 1e-3 for p in ours.parameters())


def test_parts_keep_their_own_count_of_steps() -> None:
    ours, _ = pair("up")
    optimizer = lazy(ours)
    for (batch,), part in zip(batches(5), [0, 1, 0, 0, 1], strict=True):
        ours.draw(part)
        F.cross_entropy(ours(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[ours.up.weight]["step"].tolist() == [3, 2, 0]
    assert int(optimizer.state[ours.head.weight]["step"]) == 5


@pytest.mark.parametrize("split", ["up", "down", "both"])
def test_a_step_leaves_other_parts_alone_to_the_bit(split: str) -> None:
    ours, _ = pair(split)
    optimizer = lazy(ours, lr=0.1, weight_decay=0.5)
    for batch in batches(3):
        for part in range(PARTS):  # every part gets moments that would carry it on
            ours.draw(part)
            F.cross_entropy(ours(batch[0][0]), batch[0][1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    ours.draw(1)
    ((x, y),) = next(batches(1))
    F.cross_entropy(ours(x), y).backward()
    for _, parameter, owners, used in split_parameters(ours):
        assert used.tolist() == [False, True, False]
        assert parameter.grad is not None
        assert parameter.grad[owners != 1].abs().max() == 0
        assert parameter.grad[owners == 1].abs().min() > 0
    optimizer.step()
    parted = {name: owners for name, _, owners, _ in split_parameters(ours)}
    for number, (name, parameter) in enumerate(ours.named_parameters()):
        if name not in parted:
            assert not torch.equal(parameter, before[name]), name
            continue
        rests = parted[name] != 1
        assert torch.equal(parameter[rests], before[name][rests])
        assert bool((parameter[~rests] != before[name][~rests]).all())
        for key in ("exp_avg", "exp_avg_sq"):
            held = optimizer.state[parameter][key]
            assert torch.equal(held[rests], moments[number][key][rests])
            assert not torch.equal(held[~rests], moments[number][key][~rests])
    assert not any(bool(used.any()) for _, _, _, used in split_parameters(ours))


@pytest.mark.parametrize("idle", ["lazy", "momentum"])
def test_ordinary_parameters_and_one_part_step_as_adamw_to_the_bit(idle: Any) -> None:
    ours, _ = pair("both", parts=1)
    ours = ours.float()
    twin = copy.deepcopy(ours)
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.7, 0.9)}
    mine, other = lazy(ours, idle=idle, **settings), torch.optim.AdamW(twin.parameters(), **settings)
    for ((x, y),) in batches(20):
        for model, optimizer in ((ours, mine), (twin, other)):
            F.cross_entropy(model(x.float()), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), (_, b) in zip(ours.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_momentum_carries_on_what_was_drawn_once() -> None:
    """As AdamW of torch does where idle copies have a gradient of zero instead of none."""
    ours, theirs = pair("up")
    optimizer = lazy(ours, idle="momentum", lr=0.05, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.1)
    for ((x, y),), part in zip(batches(6), [2, 0, 0, 2, 0, 0], strict=True):
        for model in (ours, theirs):
            model.draw(part)
            F.cross_entropy(model(x), y).backward()
        copies_of(theirs)[0].mask()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad(set_to_none=False)
        assert differences(ours, theirs) < 1e-12
    assert optimizer.state[ours.up.weight]["step"].tolist() == [5, 0, 6]


@pytest.mark.parametrize("zero_first", [False, True], ids=["zeroed after the step", "zeroed before the backward pass"])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_step_left_out_by_a_scaler_leaves_no_draw_behind(zero_first: bool, unscaled: bool) -> None:
    ours, _ = pair("both")
    twin = copy.deepcopy(ours)
    optimizer, plain = lazy(ours, lr=0.05), lazy(twin, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number, ((x, y),) in enumerate(batches(6)):
        overflow = number in (0, 3)
        ours.draw(number % PARTS)
        loss = F.cross_entropy(ours(x), y) * (float("inf") if overflow else 1.0)
        if zero_first:
            optimizer.zero_grad()
        scaler.scale(loss).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if not zero_first:
            optimizer.zero_grad()
        if not overflow:
            twin.draw(number % PARTS)
            F.cross_entropy(twin(x), y).backward()
            plain.step()
            plain.zero_grad()
        for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-14)
    assert scaler.get_scale() == 2.0**8
    assert optimizer.state[ours.up.weight]["step"].tolist() == [0, 2, 2]


def test_accelerates_wrapper_leaves_no_draw_behind_either() -> None:
    accelerator = Accelerator(cpu=True)
    ours, _ = pair("up")
    optimizer = lazy(ours, lr=0.05)
    wrapped = AcceleratedOptimizer(optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    before = [p.detach().clone() for p in ours.parameters()]
    for part, factor in ((0, float("inf")), (1, 1.0)):
        ((x, y),) = next(batches(1))
        ours.draw(part)
        wrapped.scaler.scale(F.cross_entropy(ours(x), y) * factor).backward()
        wrapped.step()
        wrapped.zero_grad()
        if part == 0:
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))
    assert optimizer.state[ours.up.weight]["step"].tolist() == [0, 1, 0]
    accelerator.end_training()


def test_forgetting_draws_of_a_step_left_out_by_the_loop() -> None:
    ours, _ = pair("up")
    optimizer = lazy(ours)
    ours.draw(2)
    ours(next(batches(1))[0][0])
    optimizer.forget()
    assert not ours.up.used.any()


def test_settings_and_hooks_are_those_of_an_optimiser() -> None:
    ours, _ = pair("up")
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # puts torch's hooks around the step of every AdamW
    optimizer = lazy(ours)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    ((x, y),) = next(batches(1))

    def closure() -> Tensor:
        loss = F.cross_entropy(ours(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert seen == ["before", "after"]
    with pytest.raises(EpitaxyError, match="idle is lazy or momentum, got 'sleepy'"):
        lazy(ours, idle="sleepy")


@pytest.mark.parametrize("published", [False, True])
def test_states_go_through_a_save_to_the_bit(published: bool) -> None:
    def train(model: SplitBranch, optimizer: LazyAdamW, steps: list[int]) -> None:
        for number, ((x, y),) in enumerate(batches(10)):
            if number in steps:
                model.draw(number * 2 % PARTS if number < 6 else number % 2)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()

    whole, _ = pair("both", biases=True)
    torn = copy.deepcopy(whole)
    train(whole, lazy(whole, published=published), list(range(10)))
    first = lazy(torn, published=published)
    train(torn, first, list(range(5)))
    again = copy.deepcopy(torn)
    second = lazy(again, published=published)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(again, second, list(range(5, 10)))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_parts_is_refused_and_changes_nothing() -> None:
    ours, _ = pair("up")
    other, _ = pair("up", parts=2)
    first, second = lazy(ours), lazy(other)
    for model, optimizer in ((ours, first), (other, second)):
        ((x, y),) = next(batches(1))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(StateError, match=r"up.weight: the optimiser's state counts steps of shape \(3,\), .* 2 parts"):
        second.load_state_dict(first.state_dict())
    assert str(second.state_dict()) == str(before)


def test_state_is_that_of_adamw_but_for_the_counts() -> None:
    def size(optimizer: torch.optim.Optimizer) -> int:
        return sum(t.numel() * t.element_size() for held in optimizer.state.values() for t in held.values())

    linear = nn.Linear(16, 768)
    split = InParts(linear, torch.arange(768 * 16).view(768, 16) % 4, 4)
    optimizers = [torch.optim.AdamW(linear.parameters()), LazyAdamW(split.parameters(), split_parameters(split))]
    for module, optimizer in zip((linear, split), optimizers, strict=True):
        module(torch.randn(2, 16)).square().sum().backward()
        optimizer.step()
    assert size(optimizers[1]) <= 1.05 * size(optimizers[0])


def test_draws_noted_on_another_device_are_told() -> None:
    ours, _ = pair("up")
    stale = [(name, parameter, owners, used.to("meta")) for name, parameter, owners, used in split_parameters(ours)]
    with pytest.raises(StateError, match=r"up.weight: the parameter is on cpu, its draws were noted on meta"):
        LazyAdamW(ours.parameters(), stale)
    wrong = [(name, parameter, owners[1:], used) for name, parameter, owners, used in split_parameters(ours)]
    with pytest.raises(StateError, match=r"up.weight: owners have shape \(11, 6\), not \(12, 6\)"):
        LazyAdamW(ours.parameters(), wrong)


def test_no_step_asks_a_device_for_a_number() -> None:
    """Tensors on the meta device have no values: whatever looked at one would raise."""
    for published in (False, True):
        ours, _ = pair("both", biases=True)
        ours = ours.to("meta")
        optimizer = lazy(ours, published=published)
        for _ in range(2):
            for parameter in ours.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        assert optimizer.state[ours.up.weight]["step"].device.type == "meta"


def test_bfloat16_parameters_rest_to_the_bit_and_count_beyond_its_precision() -> None:
    ours, _ = pair("up")
    ours = ours.to(torch.bfloat16)
    optimizer = lazy(ours, lr=1e-3)
    before = ours.up.weight.detach().clone()
    ours.up.weight.grad = torch.full_like(before, 0.1)
    for _ in range(300):
        ours.up.used[0] = True
        optimizer.step()
    saved = lazy(ours)
    saved.load_state_dict(optimizer.state_dict())
    assert saved.state[ours.up.weight]["step"].tolist() == [300, 0, 0]
    rests = ours.up.owners != 0
    assert torch.equal(ours.up.weight[rests], before[rests])
    assert bool((ours.up.weight[~rests] < before[~rests] - 0.1).all())
