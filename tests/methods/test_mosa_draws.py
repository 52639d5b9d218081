"""The draws of MoSA: uniform, independent, by pass and by row, found again, in one graph."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epitaxy import EpitaxyError
from epitaxy.methods.draws import at_step
from epitaxy.methods.mosa_module import SparseMLP
from tests.methods.drawing import clock_of, drawn, step_that_draws
from tests.methods.mosa import network, on, partitions, pictures, split_of, tokens, vit


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
