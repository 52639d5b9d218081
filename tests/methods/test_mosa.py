"""MoSA: parts against N copies written out, owners, what a step changes, cost; each test names its imitation."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import epitaxy
from epitaxy import Bottleneck, EpitaxyError, Head, MoSA
from epitaxy.methods.draws import at_step
from epitaxy.methods.partition import split_parameters
from tests.methods.drawing import drawn, modules_of, moved, step_that_draws
from tests.methods.mosa import on, partitions, pictures, split_of, tokens, vit
from tests.train.copies import Copies


@pytest.mark.parametrize("bias", ["shared", "parts"])
@pytest.mark.parametrize("split", ["up", "down", "both"])
@pytest.mark.parametrize("partition", ["element", "row", "column"])
def test_training_is_that_of_n_copies(partition: Any, split: Any, bias: Any) -> None:
    """Five steps of SGD: outputs, and at the end every copy, its bias and their mean.  Kills masks on the weight."""
    model = vit(layers=1).double()
    epitaxy.attach(model, MoSA(bottleneck=6, parts=3, split=split, partition=partition, bias=bias, dropout=0.0))
    (module,) = modules_of(model.train())
    module.double()
    layers: list[nn.Module] = []
    for layer, parts in ((module.down, module.down_parts), (module.up, module.up_parts)):
        plain = nn.Linear(layer.in_features, layer.out_features).double()
        with torch.no_grad():
            plain.weight.copy_(layer.weight)
            plain.bias.zero_()
        layers.append(plain if parts is None else Copies(plain, parts.owners, 3, biases=bias == "parts"))
    split_in = [(layer, parts) for layer, parts in zip(layers, (module.down_parts, module.up_parts), strict=True)]
    down, up = layers
    reference = nn.ModuleList(layers)
    optimisers = [torch.optim.SGD(side.parameters(), lr=0.5) for side in (module, reference)]
    for step in range(5):
        x = torch.randn(4, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        with at_step(model, step):
            for copies, parts in split_in:
                if isinstance(copies, Copies) and parts is not None:
                    (copies.drawn,) = drawn(parts)
            outputs = [module(x), up(F.gelu(down(x)))]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
        for output, optimiser in zip(outputs, optimisers, strict=True):
            optimiser.zero_grad()
            (output - x).square().sum().backward()
            for copies in layers:
                if isinstance(copies, Copies):
                    copies.mask()
            optimiser.step()
    for layer, (copies, parts) in zip((module.down, module.up), split_in, strict=True):
        if isinstance(copies, Copies):
            assert parts is not None
            start = torch.zeros_like(layer.weight) if parts.initial is None else parts.initial
            for part, weight in enumerate(copies.weights):
                expected = torch.where(parts.owners == part, layer.weight, start)
                torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)
                if bias == "parts":
                    torch.testing.assert_close(copies.biases[part], layer.bias[part], rtol=1e-12, atol=1e-12)
    module.eval()
    down, up = (copies.merged() if isinstance(copies, Copies) else copies for copies in layers)
    torch.testing.assert_close(module(x), up(F.gelu(down(x))), rtol=1e-12, atol=1e-12)


@partitions
def test_one_part_is_the_plain_adapter(partition: Any, tmp_path: Path) -> None:
    """Names, start and a whole training run, bit for bit."""
    states = []
    for method in (Bottleneck(bottleneck=8, activation="gelu", scale=0.1, dropout=0.1), MoSA(bottleneck=8, parts=1)):
        if isinstance(method, MoSA):
            method = MoSA(bottleneck=8, parts=1, partition=partition, bias="parts")
        model = vit(labels=3)
        torch.manual_seed(5)
        adapter = epitaxy.attach(model, method + Head(labels=3), name="a")
        optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
        model.train()
        for _ in range(4):
            optimiser.zero_grad()
            model(pictures()).logits.square().sum().backward()
            optimiser.step()
        states.append({key.replace("mosa.", "bottleneck."): value for key, value in adapter.tensors().items()})
        states.append({"logits": model.eval()(pictures()).logits})
        assert list(split_parameters(adapter)) == []
    assert states[0].keys() == states[2].keys()
    assert all(torch.equal(states[0][key], states[2][key]) for key in states[0])
    assert torch.equal(states[1]["logits"], states[3]["logits"])


def test_owners_and_starts_come_back_without_being_stored(tmp_path: Path) -> None:
    """After load, deepcopy and another process' random state.  Kills masks that live beside the state."""
    model = vit()
    adapter, modules = on(model, split="both", seed=7)
    assert not any("owners" in key or "initial" in key for key in (*adapter.tensors(), *model.state_dict()))
    saved = epitaxy.save(model, tmp_path / "a")
    torch.manual_seed(123)
    fresh = vit()
    torch.rand(17)
    epitaxy.load(fresh, saved)
    for twin in (modules_of(fresh), modules_of(copy.deepcopy(model))):
        for one, other in zip(modules, twin, strict=True):
            for mine, theirs in zip(split_of(one), split_of(other), strict=True):
                assert torch.equal(mine.owners, theirs.owners)
                assert (mine.initial is None) == (theirs.initial is None)
                assert mine.initial is None or torch.equal(mine.initial, theirs.initial)  # type: ignore[arg-type]
    maps = [parts.owners.flatten() for module in modules for parts in split_of(module)]
    for one, other in itertools.combinations(maps, 2):
        assert not torch.equal(one, other), "layers and projections share their owners"
    assert not torch.equal(maps[0], split_of(on(vit(), split="both", seed=8)[1][0])[0].owners.flatten())


@partitions
def test_an_optimiser_sees_owners_of_every_split_parameter(partition: Any) -> None:
    model = vit()
    adapter, modules = on(model, partition=partition, parts=3)
    found = list(split_parameters(adapter))
    parameters = dict(adapter.named_parameters())
    per_site = 3 if partition == "rank_slice" else 1
    assert len(found) == len(modules) * per_site
    for name, parameter, owners, used in found:
        assert parameters[name] is parameter
        assert owners.dtype == torch.uint8
        assert owners.shape == parameter.shape
        assert used.dtype == torch.bool
        assert not bool(used.any())
        counts = owners.flatten().long().bincount(minlength=3)
        assert len(counts) == 3
        assert int(counts.max() - counts.min()) <= (1 if partition == "element" else owners.numel() // 8 + 1)
    assert {name for name, *_ in split_parameters(model)} == {
        name for name, value in model.named_parameters() if any(value is entry[1] for entry in found)
    }
    with at_step(model, step_that_draws({split_of(modules[0])[0]: 2})):
        model(pictures()).last_hidden_state.sum().backward()
    assert found[0][3].tolist() == [False, False, True]
    for _, parameter, owners, used in found:
        assert parameter.grad is not None
        assert not bool(parameter.grad[~used[owners.long()]].any())
        assert bool(parameter.grad[used[owners.long()]].any())


def test_more_parts_than_there_is_to_own() -> None:
    for fields, size in (
        ({"partition": "rank_slice", "parts": 9}, 8),
        ({"partition": "out_slice", "parts": 25}, 24),
        ({"partition": "row", "parts": 9}, 8),
        ({"partition": "column", "parts": 25}, 24),
        ({"bottleneck": 1, "parts": 25}, 24),
    ):
        model = vit()
        with pytest.raises(
            EpitaxyError, match=rf"'layers.0.mlp'.*parts: expected 1 to {size} parts of {size} elements"
        ):
            epitaxy.attach(model, MoSA(**{"bottleneck": 8, **fields}))
        assert epitaxy.adapters(model) == {}


@pytest.mark.parametrize("split", ["up", "down", "both"])
def test_a_step_changes_the_parts_it_drew_and_all_that_is_shared(split: Any) -> None:
    """Kills dense training of the picked part."""
    model = vit(labels=3)
    adapter = epitaxy.attach(model, MoSA(bottleneck=8, split=split, norm="layer") + Head(labels=3), name="a")
    for module in modules_of(model):
        moved(module)
    model.train()
    before = {name: value.detach().clone() for name, value in adapter.named_parameters()}
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1.0)
    wanted = {parts: number for module in modules_of(model) for number, parts in enumerate(split_of(module), 1)}
    with at_step(model, step_that_draws(wanted)):
        model(pictures()).logits.square().sum().backward()
    optimiser.step()
    cut = {name: owners for name, _, owners, _ in split_parameters(adapter)}
    for name, parameter in adapter.named_parameters():
        changed = parameter.detach() != before[name]
        if name not in cut:
            assert bool(changed.any()), name
            continue
        number = 1 if len(wanted) == 2 or "down" in name else 2
        idle = cut[name] != number
        assert parameter.grad is not None
        assert not bool(parameter.grad[idle].any())
        assert not bool(changed[idle].any())
        assert float(changed[~idle].float().mean()) > 0.9


@pytest.mark.parametrize(("partition", "limit"), [("out_slice", 0.56), ("rank_slice", 0.26)])
@pytest.mark.parametrize("draw", ["batch", "row"])
def test_slices_cost_what_they_hold(partition: Any, limit: float, draw: Any) -> None:
    """Forward and backward of the branch, without a gradient for its input, against the dense one."""
    model = vit(layers=1)
    cost = {}
    for name, fields in (("dense", {"parts": 1}), (partition, {"partition": partition, "draw": draw})):
        _, (module,) = on(model, bottleneck=16, **fields)
        with FlopCounterMode(display=False) as counter:
            module(tokens()).sum().backward()
        cost[name] = counter.get_total_flops()
        epitaxy.detach(model)
    assert 0 < cost[partition] <= limit * cost["dense"]


@partitions
def test_the_file_is_no_larger_than_a_plain_adapters(partition: Any, tmp_path: Path) -> None:
    sizes = []
    for method in (Bottleneck(bottleneck=16), MoSA(bottleneck=16, split="up", partition=partition)):
        model = vit()
        epitaxy.attach(model, method, name="a")
        saved = epitaxy.save(model, tmp_path / method.method_name)  # type: ignore[attr-defined]
        sizes.append((saved / "adapter.safetensors").stat().st_size)
        epitaxy.detach(model)
    assert sizes[1] <= 1.05 * sizes[0]
