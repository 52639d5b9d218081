"""What MoSA has beyond the paper, and which of its fields go together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epitaxy
from epitaxy import EpitaxyError, MoSA
from epitaxy.methods.draws import Clock, at_step, clocks
from epitaxy.methods.partition import split_parameters
from epitaxy.methods.saliency import balance, saliency
from tests.contract.tampering import header
from tests.methods.drawing import drawn, moved, step_that_draws
from tests.methods.mosa import network, partitions, pictures, split_of, tokens, vit


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
