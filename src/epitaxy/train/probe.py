"""A few real training steps, measured: how long one takes, and what it keeps for the backward pass."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.tasks.objective import Turn, backward
from epitaxy.tasks.two_pass import TwoPass
from epitaxy.train.accelerating import check_precision
from epitaxy.train.config import TrainConfig
from epitaxy.train.modes import training_modes
from epitaxy.train.prepare import Prepared

STEPS = 4  # the first one, which also pays for allocation, is not counted
EVALUATED = 32  # examples


@dataclass(frozen=True)
class Measured:
    """Mean seconds of one optimiser step, seconds of evaluating one example, and bytes kept for backward.

    ``activations`` counts one forward pass of ``batch`` examples, weights not included.
    """

    step: float
    evaluation: float
    activations: int
    steps: int = STEPS - 1


def probe(ready: Prepared, config: TrainConfig, objective: TwoPass | None = None) -> Measured:
    """Measure on the device that training would use; learning rate zero, so the weights stay what they are."""
    model = ready.opened.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_precision(config.precision, device.type)
    model.to(device)
    adapters = [] if ready.adapter is None else [ready.adapter]
    with training_modes(model, adapters, config.base_mode):
        step, activations = _steps(ready, config, device, None)
        if objective is not None:
            paired, _ = _steps(ready, config, device, objective)
            step += (paired - step) / objective.every
    model.eval()
    seen = ready.splits.validation if len(ready.splits.validation) else ready.splits.test
    examples = [seen[place] for place in range(min(EVALUATED, len(seen)))]
    began = time.perf_counter()
    with torch.no_grad():
        batch = {key: value.to(device) for key, value in ready.task.batch(examples).items()}
        ready.task.logits(model, batch)
    evaluation = (time.perf_counter() - began) / len(examples)
    return Measured(step * config.accumulate, evaluation, activations)


def _steps(ready: Prepared, config: TrainConfig, device: torch.device, objective: TwoPass | None) -> tuple[float, int]:
    """Median seconds of steps on one batch each, and the bytes that the first one keeps for backward."""
    model, data = ready.opened.model, ready.splits.train
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    times, activations = [], 0
    for number in range(STEPS):
        examples = [data[(number * config.batch + place) % len(data)] for place in range(min(config.batch, len(data)))]
        began = time.perf_counter()
        batch = {key: value.to(device) for key, value in ready.task.batch(examples).items()}
        kept = SavedBytes(model) if number == 0 else nullcontext()
        with kept, _autocast(config.precision, device):
            if objective is None:
                ready.task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            else:
                backward(objective.parts(model, batch, ready.task, Turn()))
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if isinstance(kept, SavedBytes):
            activations = kept.total
    return statistics.median(times[1:]), activations


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, kinds[precision]) if precision in kinds else nullcontext()


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward pass of what runs inside the block.

    Weights are not counted; a storage that is kept twice is counted once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        self._hooks.__exit__(*problem)
