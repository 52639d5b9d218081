"""The count of how experts are used, against the routing weights themselves."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import epitaxy
from epitaxy import DenseMoA, LoRA, SoftMoA
from epitaxy.methods.dense_moa import DenseMixture
from epitaxy.methods.expert_use import expert_use
from epitaxy.methods.mixture import mixtures_of, token_mask
from epitaxy.methods.soft_moa import SoftMixture
from tests.contract.families import FAMILIES


def attached(method: Any) -> tuple[nn.Module, epitaxy.Adapter]:
    torch.manual_seed(0)
    model = FAMILIES["vit"].model()
    adapter = epitaxy.attach(model, method)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, adapter


def run(model: nn.Module, batch: int = 3, seed: int = 0) -> None:
    pixels = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model(pixel_values=pixels)


def entropy(shares: torch.Tensor) -> torch.Tensor:
    return -(shares * shares.log()).sum(-1)


def first_inputs(model: nn.Module, adapter: epitaxy.Adapter, calls: int) -> torch.Tensor:
    """What the first mixture reads in the next ``calls`` passes of ``run``."""
    seen: list[torch.Tensor] = []
    _, mixture = mixtures_of(adapter)[0]
    handle = mixture.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for seed in range(calls):
        run(model, seed=seed)
    handle.remove()
    return torch.cat(seen)


def test_dense_numbers() -> None:
    model, adapter = attached(DenseMoA(experts=3, bottleneck=2))
    key, mixture = mixtures_of(adapter)[0]
    assert isinstance(mixture, DenseMixture)
    x = first_inputs(model, adapter, 2)
    with expert_use(adapter) as counted:
        for seed in range(2):
            run(model, seed=seed)
    found = counted()
    assert list(found) == ["dense_moa.attention.0", "dense_moa.attention.1"]
    shares = torch.softmax(nn.functional.linear(x, mixture.router, mixture.router_bias), -1).flatten(0, 1).detach()
    place = found[key]
    assert place["tokens"] == len(shares)
    assert place["experts"] == 3
    assert place["weight"] == pytest.approx(shares.mean(0).tolist(), abs=1e-5)
    assert place["first"] == pytest.approx([float((shares.argmax(1) == n).float().mean()) for n in range(3)], abs=1e-5)
    assert place["entropy"] == pytest.approx(float(entropy(shares).mean()) / math.log(3), abs=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_soft_numbers() -> None:
    model, adapter = attached(SoftMoA(experts=3, slots=2, bottleneck=2))
    key, mixture = mixtures_of(adapter)[0]
    assert isinstance(mixture, SoftMixture)
    x = first_inputs(model, adapter, 1)
    with expert_use(adapter) as counted:
        run(model)
    dispatch, combine = mixture.weights(mixture.logits(x)[0].detach())
    shares = combine.view(*x.shape[:2], 3, 2).sum(3).flatten(0, 1)
    place = counted()[key]
    assert place["weight"] == pytest.approx(shares.mean(0).tolist(), abs=1e-5)
    assert place["entropy"] == pytest.approx(float(entropy(shares).mean()) / math.log(3), abs=1e-5)
    spread = entropy(dispatch.transpose(1, 2)).view(3, 3, 2).mean((0, 2)) / math.log(x.shape[1])
    assert place["dispatch_entropy"] == pytest.approx(spread.tolist(), abs=1e-5)


def test_dead_experts_are_named() -> None:
    model, adapter = attached(DenseMoA(experts=4, bottleneck=2, layers=(0,)))
    _, mixture = mixtures_of(adapter)[0]
    assert isinstance(mixture, DenseMixture)
    mixture.router.data.zero_()
    mixture.router_bias.data.copy_(torch.tensor([0.0, -9.0, 0.0, -9.0]))
    with expert_use(adapter) as counted:
        run(model)
    (place,) = counted().values()
    assert place["dead"] == [1, 3]
    assert place["entropy"] == pytest.approx(0.5, abs=0.01)  # two of four alike


def test_masked_tokens_are_not_counted() -> None:
    model, adapter = attached(SoftMoA(experts=2, bottleneck=2, layers=(0,)))
    key, mixture = mixtures_of(adapter)[0]
    assert isinstance(mixture, SoftMixture)
    x = first_inputs(model, adapter, 1)
    mask = torch.arange(x.shape[1]).repeat(3, 1) < torch.tensor([[5], [3], [1]])
    with token_mask(adapter, mask), expert_use(adapter) as counted:
        run(model)
    place = counted()[key]
    _, combine = mixture.weights(mixture.logits(x)[0].detach())
    assert place["tokens"] == 9
    assert place["weight"] == pytest.approx(combine[mask].mean(0).tolist(), abs=1e-5)
    assert all(0 <= value <= 1 for value in place["dispatch_entropy"])


def test_nothing_is_counted_or_kept_outside() -> None:
    model, adapter = attached(DenseMoA(experts=2, bottleneck=2))
    with expert_use(adapter) as counted:
        run(model)
        inside = counted()
    run(model)
    assert counted() == inside
    assert all(module.tally is None for _, module in mixtures_of(adapter))
    with expert_use(adapter) as again:
        assert again() == {}
    with pytest.raises(RuntimeError), expert_use(adapter):
        raise RuntimeError
    assert all(module.tally is None for _, module in mixtures_of(adapter))


def test_counting_changes_no_output_and_holds_no_graph() -> None:
    model, adapter = attached(SoftMoA(experts=2, bottleneck=2))
    pixels = torch.randn(2, 3, 16, 16)
    plain = model(pixel_values=pixels).logits
    with expert_use(adapter):
        assert torch.equal(model(pixel_values=pixels).logits, plain)
        for _, module in mixtures_of(adapter):
            assert module.tally is not None
            assert not any(getattr(value, "requires_grad", False) for value in vars(module.tally).values())


def test_adapters_without_mixtures_have_no_use() -> None:
    model, adapter = attached(LoRA(rank=2))
    with expert_use(adapter) as counted:
        run(model)
    assert counted() == {}


@pytest.mark.slow
def test_a_compiled_model_counts_too() -> None:
    """The count is switched on after the first compiled call, and off again."""
    model, adapter = attached(SoftMoA(experts=2, bottleneck=2))
    with expert_use(adapter) as counted:
        run(model)
        run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(compiled)
    with expert_use(adapter) as again:
        run(compiled)
        run(compiled)
    run(compiled)
    for key, place in counted().items():
        assert again()[key]["tokens"] == place["tokens"]
        assert again()[key]["weight"] == pytest.approx(place["weight"], abs=1e-5)
    torch._dynamo.reset()
