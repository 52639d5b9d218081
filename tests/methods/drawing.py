"""Draws that tests ask for: steps at which the parts of an adapter come out as wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.methods.draws import Clock
from epitaxy.methods.mosa_module import SparseMLP
from epitaxy.methods.parts import Parts


def step_that_draws(wanted: Mapping[Parts, int]) -> int:
    """The first step at which every one of these parts draws its number."""
    clock = next(iter(wanted)).clock
    try:
        for step in range(5_000):
            clock.set(step)
            if all(int(clock.choose(parts.rule.parts, parts.place)) == number for parts, number in wanted.items()):
                return step
    finally:
        clock.release()
    raise AssertionError("no such step")


def drawn(parts: Parts) -> list[int]:
    """What is drawn at the clock's present step, for each pass."""
    return [int(number) for number in parts.clock.choose(parts.rule.parts, parts.place)]


def modules_of(model: nn.Module) -> list[SparseMLP]:
    """The networks in parts of a model, in network order."""
    return [module for module in model.modules() if isinstance(module, SparseMLP)]


def clock_of(model: nn.Module) -> Clock:
    """The one clock."""
    (clock,) = {module for module in model.modules() if isinstance(module, Clock)}
    return clock


def moved(module: nn.Module, seed: int = 0, by: float = 0.3) -> Any:
    """The module with every parameter moved away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients there are, by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
