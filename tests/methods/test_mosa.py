"""MoSA: parts against N copies written out, draws, merging, cost; each test names the imitation it is there for."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import epitaxy
from epitaxy import Bottleneck, EpitaxyError, Head, MoSA, MoSALoRA
from epitaxy.core.host import hosted
from epitaxy.methods.draws import Clock, at_step, clocks
from epitaxy.methods.mosa_module import SparseMLP
from epitaxy.methods.partition import split_parameters
from epitaxy.methods.parts import Parts
from epitaxy.methods.saliency import balance, saliency
from tests.contract.tampering import header
from tests.methods.copies import CopiedAdapter, Copies
from tests.methods.drawing import clock_of, drawn, modules_of, moved, step_that_draws

PARTITIONS: Any = ["element", "row", "column", "out_slice", "rank_slice"]
partitions = pytest.mark.parametrize("partition", PARTITIONS)


def vit(labels: int | None = None, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **({} if labels is None else {"num_labels": labels}),
    )
    kind: Any = transformers.ViTModel if labels is None else transformers.ViTForImageClassification
    model: nn.Module = kind(config)
    return model.eval()


def pictures(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens(batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 5, 24, generator=torch.Generator().manual_seed(2), dtype=dtype)


def on(model: nn.Module, **fields: Any) -> tuple[epitaxy.Adapter, list[SparseMLP]]:
    """MoSA on a model in training mode, with every parameter away from its start."""
    adapter = epitaxy.attach(model, MoSA(**{"bottleneck": 8, "dropout": 0.0, **fields}), name="a")
    for module in modules_of(model):
        moved(module)
    model.train()
    return adapter, modules_of(model)


def network(**fields: Any) -> SparseMLP:
    """One network of MoSA, in training mode, away from its start."""
    return on(vit(layers=1), **fields)[1][0]


def split_of(module: SparseMLP) -> list[Parts]:
    return [parts for parts in (module.down_parts, module.up_parts) if parts is not None]


# --- against N copies


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
        layers.append(plain if parts is None else Copies(plain, [parts.owners == part for part in range(3)]))
    reference = CopiedAdapter(*layers)
    if bias == "shared":
        for copies in layers:
            if isinstance(copies, Copies):
                for single in copies.copies:
                    single.bias = copies.copies[0].bias
    optimisers = [torch.optim.SGD(side.parameters(), lr=0.5) for side in (module, reference)]
    for step in range(5):
        x = torch.randn(4, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        with at_step(model, step):
            numbers = [None if parts is None else drawn(parts)[0] for parts in (module.down_parts, module.up_parts)]
            reference.draw(*numbers)
            outputs = [module(x), reference(x)]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
        for output, optimiser in zip(outputs, optimisers, strict=True):
            optimiser.zero_grad()
            (output - x).square().sum().backward()
            optimiser.step()
    for layer, parts, copies in zip(
        (module.down, module.up), (module.down_parts, module.up_parts), layers, strict=True
    ):
        if isinstance(copies, Copies):
            assert parts is not None
            start = torch.zeros_like(layer.weight) if parts.initial is None else parts.initial
            for part, single in enumerate(copies.copies):
                expected = torch.where(parts.owners == part, layer.weight, start)
                torch.testing.assert_close(single.weight, expected, rtol=1e-12, atol=1e-12)
                if bias == "parts":
                    torch.testing.assert_close(single.bias, layer.bias[part], rtol=1e-12, atol=1e-12)
    module.eval(), reference.eval()
    torch.testing.assert_close(module(x), reference(x), rtol=1e-12, atol=1e-12)


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


# --- owners


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


# --- what a step changes


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


# --- draws


@partitions
def test_as_many_outputs_as_parts_in_training_and_one_in_evaluation(partition: Any) -> None:
    model = vit(layers=1)
    on(model, partition=partition)
    x = pictures()
    outputs = [model(x).last_hidden_state for _ in range(40)]
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 4
    model.eval()
    merged = [model(x).last_hidden_state for _ in range(3)]
    assert len({tuple(output.flatten().tolist()) for output in merged}) == 1


def test_draws_are_uniform_and_independent() -> None:
    """10,000 passes: parts, projections, layers, passes and rows."""
    model = vit()
    _, modules = on(model, split="both")
    clock, count = clock_of(model), 10_000
    clock.set(0, passes=count)
    numbers = {
        (layer, side): clock.choose(4, parts.place)
        for layer, module in enumerate(modules)
        for side, parts in zip(("down", "up"), split_of(module), strict=True)
    }
    clock.release()
    for drawn_numbers in numbers.values():
        assert chi_square(drawn_numbers, 4) < 16.3  # 3 degrees of freedom, one in a thousand
    for one, other in itertools.combinations(numbers.values(), 2):
        assert chi_square(one * 4 + other, 16) < 37.7  # 15 degrees of freedom
    steps = []
    for step in range(2000):
        clock.set(step, passes=2)
        steps.append(clock.choose(4, split_of(modules[0])[0].place))
    first, second = torch.stack(steps).unbind(1)
    assert chi_square(first * 4 + second, 16) < 37.7, "the passes of a step depend on each other"
    assert chi_square(first[:-1] * 4 + first[1:], 16) < 37.7, "steps depend on each other"
    clock.set(3, passes=2)
    rows = clock.choose(4, split_of(modules[0])[0].place, rows=20_000)
    assert chi_square(rows[:10_000] * 4 + rows[10_000:], 16) < 37.7, "rows do not draw for themselves"
    clock.release()


def chi_square(numbers: Tensor, kinds: int) -> float:
    expected = len(numbers) / kinds
    return float(((numbers.bincount(minlength=kinds) - expected) ** 2 / expected).sum())


@partitions
@pytest.mark.parametrize("parts", [4, 5])
def test_two_passes_in_one_batch_are_two_passes(partition: Any, parts: int) -> None:
    model = vit()
    _, modules = on(model, partition=partition, parts=parts)
    x = pictures()
    step = next(s for s in range(99) if distinct(model, modules, s))
    with at_step(model, step, passes=2):
        together = model(torch.cat([x, x])).last_hidden_state
    alone = []
    for number in range(2):
        with at_step(model, step, number=number):
            alone.append(model(x).last_hidden_state)
    torch.testing.assert_close(together, torch.cat(alone))
    assert float((alone[0] - alone[1]).detach().abs().max()) > 1e-4


def distinct(model: nn.Module, modules: list[SparseMLP], step: int) -> bool:
    with at_step(model, step, passes=2):
        return all(len(set(drawn(parts))) == 2 for module in modules for parts in split_of(module))


@partitions
@pytest.mark.parametrize("parts", [3, 4])
@pytest.mark.parametrize("coefficients", [False, True])
def test_each_row_draws_its_own_part(partition: Any, parts: int, coefficients: bool) -> None:
    """Every row is what a pass gives in which the whole batch draws that part; its gradients add up over rows."""
    module = network(partition=partition, parts=parts, draw="row", coefficients=coefficients)
    (cut,) = split_of(module)
    x = tokens(6)
    with at_step(module, 4):
        numbers = cut.clock.choose(parts, cut.place, rows=6)
        rows = module(x)
        (rows * x).sum().backward()
    assert len(set(numbers.tolist())) > 1
    found = {
        name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None
    }
    module.zero_grad()
    object.__setattr__(cut.rule, "draw", "batch")
    for row, number in enumerate(numbers.tolist()):
        with at_step(module, step_that_draws({cut: number})):
            single = module(x[row : row + 1])
            (single * x[row : row + 1]).sum().backward()
        torch.testing.assert_close(rows[row : row + 1], single)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_a_batch_that_is_no_whole_number_of_passes() -> None:
    model = vit()
    on(model)
    with at_step(model, 0, passes=3), pytest.raises(EpitaxyError, match="batch of 4 rows cannot hold 3 passes"):
        model(pictures(4))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_computed_again_finds_its_draw(reentrant: bool) -> None:
    """With the clock that counts by itself, over several steps."""
    gradients_found: list[list[Tensor]] = []
    for checkpointing in (False, True):
        model = vit(labels=3)
        adapter, _ = on(model, split="both", draw="row")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})  # type: ignore[operator]
        found = []
        for _ in range(3):
            model(pictures().requires_grad_()).logits.square().sum().backward()
            found += [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]
            model.zero_grad()
        gradients_found.append(found)
    assert len(gradients_found[0]) == len(gradients_found[1]) > 0
    for one, other in zip(*gradients_found, strict=True):
        torch.testing.assert_close(one, other)


@partitions
def test_no_graph_for_each_draw(partition: Any) -> None:
    """Compiled as a whole, with a clock that moves; one graph for all draws."""
    model = vit(layers=1)
    on(model, partition=partition, parts=5, drop_path=0.3, noise=0.0)
    x = pictures()
    expected = [model(x).last_hidden_state for _ in range(8)]
    clock_of(model).now.copy_(torch.tensor([-1, 0, 0]))
    torch._dynamo.reset()
    graphs = [0]

    def counting(graph: Any, inputs: Any) -> Any:
        graphs[0] += 1
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    found = [compiled(x).last_hidden_state]
    first = graphs[0]
    found += [compiled(x).last_hidden_state for _ in range(7)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert len({tuple(output.flatten().tolist()) for output in expected}) > 2
    assert graphs[0] == first
    torch._dynamo.reset()


# --- merging


@partitions
def test_the_mean_of_all_parts_is_what_evaluation_computes(partition: Any) -> None:
    """With split `up`; and parts sum to the undivided adapter without its bias.  Kills merging by a plain sum."""
    module = network(partition=partition, bottleneck=10)
    x, outputs = tokens(), []
    (parts,) = split_of(module)
    for number in range(4):
        with at_step(module, step_that_draws({parts: number})):
            outputs.append(module(x))
    module.eval()
    torch.testing.assert_close(torch.stack(outputs).mean(0), module(x), atol=1e-6, rtol=1e-5)
    dense = F.linear(F.gelu(F.linear(x, module.down.weight, module.down.bias)), module.up.weight)
    torch.testing.assert_close(sum(output - module.up.bias for output in outputs), dense, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("split", ["down", "both"])
def test_with_a_split_down_the_mean_of_outputs_is_another(split: Any) -> None:
    module = network(split=split)
    x, outputs = tokens(), []
    for numbers in itertools.product(range(4), repeat=len(split_of(module))):
        with at_step(module, step_that_draws(dict(zip(split_of(module), numbers, strict=True)))):
            outputs.append(module(x))
    module.eval()
    assert float((torch.stack(outputs).mean(0) - module(x)).abs().max()) > 1e-4


def test_evaluation_is_never_of_an_earlier_state() -> None:
    """Kills a merged copy that is refreshed now and then."""
    module = network().eval()
    x = tokens()
    before = module(x)
    with torch.no_grad():
        module.up.weight.mul_(2)
    bias = module.up.bias
    torch.testing.assert_close(module(x) - bias, 2 * (before - bias))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"split": "both", "bias": "parts"},
        {"partition": "out_slice", "coefficients": True, "norm": "layer", "scale": "learned"},
        {"partition": "rank_slice", "parts": 8, "active": "bernoulli", "coefficients": True},
        {"merge": "union", "reads": "stream", "norm": "layer"},
        {"order": "sequential", "drop_path": 0.2, "noise": 0.3},
    ],
)
def test_parts_merge_into_a_plain_adapter(fields: dict[str, Any], tmp_path: Path) -> None:
    """Same outputs, same size and cost as a bottleneck, which a fresh model loads; no trace of parts is left."""
    model = vit(labels=3)
    method = MoSA(**{"bottleneck": 8, **fields})
    adapter = epitaxy.attach(model, method + Head(labels=3), name="a")
    adapter.provenance["classes"] = ["x", "y", "z"]
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = model(pictures()).logits
    merged = epitaxy.merge_parts(model)
    assert float((model(pictures()).logits - expected).abs().max()) <= 1e-6
    assert [part["method"] for part in merged.config] == ["bottleneck", "head"]
    assert merged.name == "a"
    assert epitaxy.adapters(model) == {"a": merged}
    assert merged.provenance == {"classes": ["x", "y", "z"]}
    assert modules_of(model) == []
    assert clocks(model) == []
    plain = vit(labels=3)
    assert epitaxy.attach(plain, method.plain + Head(labels=3), name="a").size() == merged.size()
    epitaxy.detach(plain)
    epitaxy.load(plain, epitaxy.save(model, tmp_path / "merged"))
    assert torch.equal(plain(pictures()).logits, model(pictures()).logits)
    assert flops(plain) == flops(model)
    training = vit(labels=3)
    epitaxy.attach(training, method + Head(labels=3), name="a")
    assert flops(training) == flops(plain), "evaluation costs more than a plain adapter"


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pictures())
    return int(counter.get_total_flops())


def test_merging_parts_keeps_what_is_active_and_refuses_what_has_none() -> None:
    model = vit()
    epitaxy.attach(model, Bottleneck(bottleneck=4), name="plain")
    on(model)[0].trainable = False
    epitaxy.activate(model, ["plain", "a"])
    merged = epitaxy.merge_parts(model, "a")
    assert not merged.trainable
    assert list(epitaxy.adapters(model)) == ["plain", "a"]
    record = hosted(model)
    assert record is not None
    assert record.state.active == ("plain", "a")
    with pytest.raises(
        EpitaxyError, match="'plain' has no parts to merge: expected mosa or mosa_lora, found bottleneck"
    ):
        epitaxy.merge_parts(model, "plain")
    with pytest.raises(EpitaxyError, match="say which adapter"):
        epitaxy.merge_parts(model)


def test_a_lora_in_parts_merges_into_a_lora_and_into_weights(tmp_path: Path) -> None:
    model = vit()
    adapter = epitaxy.attach(model, MoSALoRA(rank=6, split="both", coefficients=True), name="a")
    moved(adapter_module := nn.ModuleList(edit for edit in adapter.edits))
    model.train()
    assert len({tuple(model(pictures()).last_hidden_state.flatten().tolist()) for _ in range(8)}) > 4
    assert adapter_module.training
    model.eval()
    expected = model(pictures()).last_hidden_state
    theirs = vit()
    epitaxy.load(theirs, epitaxy.save(model.train(), tmp_path / "peft", format="peft"))
    torch.testing.assert_close(theirs(pictures()).last_hidden_state, expected)
    report = epitaxy.merge(model.eval())
    assert report.drift < 1e-5
    torch.testing.assert_close(model(pictures()).last_hidden_state, expected, atol=2e-5, rtol=1e-4)
    epitaxy.unmerge(model)
    epitaxy.activate(model, "a")
    merged = epitaxy.merge_parts(model)
    assert merged.config[0]["method"] == "lora"
    torch.testing.assert_close(model(pictures()).last_hidden_state, expected)


def test_a_routed_batch_uses_a_lora_in_parts_as_it_is_merged() -> None:
    """Only `up` is split, so that `down` alone would pass for a plain LoRA."""
    model = vit()
    for name in ("a", "b"):
        moved(nn.ModuleList(epitaxy.attach(model, MoSALoRA(rank=4), name=name).edits), seed=ord(name))
    model.eval()
    alone = {}
    for name in ("a", "b"):
        epitaxy.activate(model, name)
        alone[name] = model(pictures()).last_hidden_state
    with epitaxy.route(model, ["a", "b", "a", "b"]):
        mixed = model(pictures()).last_hidden_state
    for row, name in enumerate("abab"):
        torch.testing.assert_close(mixed[row], alone[name][row])


# --- beyond the paper


@partitions
@pytest.mark.parametrize("coefficients", [False, True])
def test_several_active_parts_average_to_the_merged_adapter(partition: Any, coefficients: bool) -> None:
    """The mean of outputs over all subsets, weighted by their probabilities, is exactly what evaluation computes."""
    module = network(partition=partition, parts=3, active="bernoulli", keep=0.7, coefficients=coefficients)
    (parts,) = split_of(module)
    x, keep = tokens(), 0.7
    found: dict[tuple[bool, ...], Tensor] = {}
    for step in range(200):
        with at_step(module, step):
            active = tuple((parts.clock.uniform(parts.place, count=3)[0] < keep).tolist())
            found.setdefault(active, module(x))
    assert len(found) == 8
    weights = {active: keep ** sum(active) * (1 - keep) ** (3 - sum(active)) for active in found}
    mean = sum(weights[active] * output for active, output in found.items())
    module.eval()
    torch.testing.assert_close(mean, module(x), atol=2e-6, rtol=1e-5)
    none = found[(False, False, False)]
    torch.testing.assert_close(none, module.up.bias.expand_as(none))


@partitions
def test_coefficients_start_at_one_and_learn(partition: Any) -> None:
    plain, module = network(partition=partition), network(partition=partition, coefficients=True)
    x = tokens()
    assert module.up_parts is not None
    assert module.up_parts.coefficients is not None
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            module.get_parameter(name).copy_(parameter)
        module.up_parts.coefficients.fill_(1.0)
    with at_step(plain, 0), at_step(module, 0):
        torch.testing.assert_close(module(x), plain(x))
        (number,) = drawn(module.up_parts)
        module(x).square().sum().backward()
    gradient = module.up_parts.coefficients.grad
    assert gradient is not None
    assert [index for index, value in enumerate(gradient) if value != 0] == [number]
    with torch.no_grad():
        module.up_parts.coefficients.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    outputs = []
    for part in range(4):
        with at_step(module, step_that_draws({module.up_parts: part})):
            outputs.append(module(x))
    module.eval()
    torch.testing.assert_close(torch.stack(outputs).mean(0), module(x), atol=1e-6, rtol=1e-5)


def test_drop_path_leaves_the_same_rows_out_in_both_passes() -> None:
    module = network(drop_path=0.25, parts=1)
    x = tokens(4000)
    kept = module.eval()(x)
    module.train()
    with at_step(module, 3, passes=2):
        both = module(torch.cat([x, x]))
    dropped = (both == 0).flatten(1).all(1)
    assert torch.equal(dropped[:4000], dropped[4000:])
    assert 0.22 < float(dropped.float().mean()) < 0.28
    torch.testing.assert_close(both[:4000][~dropped[:4000]], (kept / 0.75)[~dropped[:4000]])
    with at_step(module, 4):
        assert not torch.equal((module(x) == 0).flatten(1).all(1), dropped[:4000])


def test_noise_multiplies_the_output_in_training_alone() -> None:
    module = network(noise=0.2, parts=1)
    x = tokens(400)
    clean = module.eval()(x)
    module.train()
    ratios = module(x) / clean - 1
    assert float(ratios.mean().abs()) < 0.005
    assert float(ratios.std()) == pytest.approx(0.2, rel=0.02)
    assert not torch.equal(module(x), module(x))


# --- cost


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


# --- fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parts": 0}, "parts must be from 1 to 256"),
        ({"parts": 257}, "parts must be from 1 to 256"),
        ({"split": "none"}, "split: expected one of"),
        ({"partition": "block"}, "partition: expected one of"),
        ({"partition": "rank_slice", "split": "both"}, "'rank_slice' needs split='up', found 'both'"),
        ({"partition": "out_slice", "split": "down"}, "'out_slice' needs split='up', found 'down'"),
        ({"keep": 0.0}, "keep must be above 0"),
        ({"merge": "union", "active": "bernoulli"}, "'union' needs active='one'"),
        ({"bias": "parts", "active": "bernoulli"}, "'parts' needs active='one'"),
        ({"balance": "saliency", "split": "both"}, "'saliency' needs partition='element' and split='up'"),
        ({"balance": "saliency", "partition": "row"}, "'saliency' needs partition='element' and split='up'"),
        ({"noise": -0.1}, "noise must be"),
        ({"noise": float("nan")}, "noise must be"),
        ({"drop_path": 1.0}, "drop_path must be"),
        ({"drop_path": 0.1, "order": "before"}, "drop_path needs an adapter that is added"),
        ({"drop_path": 0.1, "order": "sequential", "residual": False}, "drop_path needs an adapter that is added"),
        ({"order": "before", "reads": "stream"}, "reads: 'stream' needs"),
        ({"bottleneck": 0}, "bottleneck must be at least 1"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EpitaxyError, match=message) as caught:
        MoSA(**fields)
    assert "\n" not in str(caught.value)
    assert ". " not in str(caught.value)


@pytest.mark.parametrize(
    "method",
    [
        MoSA.adaptformer(8),
        MoSA.pfeiffer(8),
        MoSA.houlsby(8),
        MoSA.swin(8),
        MoSA.published(8),
        MoSA.published(8, 2, "both"),
    ],
)
def test_presets_start_at_the_base_and_learn(method: MoSA) -> None:
    model = vit()
    base = model(pictures()).last_hidden_state
    adapter = epitaxy.attach(model, method, name="a")
    model.train()
    assert torch.equal(model(pictures()).last_hidden_state, base)
    model(pictures()).last_hidden_state.pow(3).sum().backward()
    assert any(bool(p.grad.any()) for p in adapter.parameters() if p.grad is not None)
    assert len(clocks(model)) == 1


def test_two_adapters_have_clocks_of_their_own() -> None:
    model = vit()
    for name, seed in (("a", 0), ("b", 1)):
        epitaxy.attach(model, MoSA(bottleneck=8, seed=seed), name=name)
    model.train()
    found: dict[int, Clock] = {clock.seed: clock for clock in clocks(model)}
    assert sorted(found) == [0, 1]
    epitaxy.activate(model, "a")
    model(pictures())
    assert [int(found[seed].now[0]) for seed in (0, 1)] == [0, -1]
    epitaxy.activate(model, ["a", "b"])
    model(pictures())
    assert [int(found[seed].now[0]) for seed in (0, 1)] == [1, 0]


def iterate(batches: int) -> Iterator[Tensor]:
    for number in range(batches):
        yield torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number))


def test_owners_from_data_balance_what_a_loss_asks_for(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).logits.pow(3).sum()

    model = vit(labels=3)
    adapter = epitaxy.attach(model, MoSA(bottleneck=8, balance="saliency"), name="a")
    before = {name: value.clone() for name, value in adapter.tensors().items()}
    scores = saliency(model, adapter, iterate(2), loss)
    assert list(scores) == [name for name, *_ in split_parameters(adapter)]
    expected = {}
    for batch in iterate(2):
        loss(model, batch).backward()
        for name, parameter, *_ in split_parameters(adapter):
            assert parameter.grad is not None
            expected[name] = expected.get(name, 0) + parameter.grad.abs() / 2
            parameter.grad = None
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name])
    balance(model, adapter, iterate(2), loss)
    for name, _, owners, _ in split_parameters(adapter):
        totals = torch.stack([scores[name][owners == part].sum() for part in range(4)])
        assert float(totals.max() - totals.min()) <= float(scores[name].max())
        assert not torch.equal(owners, before[f"{name.removesuffix('.up.weight')}.up_parts.owners"])
    assert all(torch.equal(value, before[name]) for name, value in adapter.named_parameters())
    fresh = vit(labels=3)
    again = epitaxy.load(fresh, epitaxy.save(model, tmp_path / "a"))
    for mine, theirs in zip(split_parameters(adapter), split_parameters(again), strict=True):
        assert torch.equal(mine[2], theirs[2])
    moved(nn.ModuleList(adapter.edits))
    with pytest.raises(EpitaxyError, match="has trained already"):
        balance(model, adapter, iterate(2), loss)
    with pytest.raises(EpitaxyError, match="at least one batch"):
        saliency(model, adapter, [], loss)


def test_a_file_whose_owners_name_parts_that_there_are_not(tmp_path: Path) -> None:
    model = vit()
    epitaxy.attach(model, MoSA(bottleneck=8, balance="saliency"), name="a")
    file = epitaxy.save(model, tmp_path / "a") / "adapter.safetensors"
    tensors = load_file(file)
    next(value for key, value in tensors.items() if key.endswith("owners")).fill_(4)
    save_file(tensors, file, header(file))
    fresh = vit()
    with pytest.raises(EpitaxyError, match=r"its owners name part 4, expected below 4"):
        epitaxy.load(fresh, tmp_path / "a")
    assert epitaxy.adapters(fresh) == {}
