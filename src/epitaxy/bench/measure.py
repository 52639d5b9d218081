"""Interleaved, paired timing, and the memory a training step keeps.

On a shared machine single timings say little.  Here every round runs each case once, in an order that changes from
round to round, and cases are compared within their round: what disturbs one round disturbs all its cases.
"""

from __future__ import annotations

import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Clock = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """One thing to time: ``run`` is timed; ``prepare`` and ``restore`` around it are not."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = field(default=lambda: None)
    restore: Callable[[], Any] = field(default=lambda: None)


@dataclass(frozen=True)
class Quartiles:
    """First quartile, median and third quartile."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles of at least one value, by linear interpolation."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(low, median, high)


def interleave(
    cases: Mapping[str, Callable[[], Any] | Case],
    rounds: int,
    warmup: int = 2,
    repeat: int = 1,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of every case, round by round.

    A round times each case once (``repeat`` calls together), in an order drawn anew; ``warmup`` untimed rounds come
    first.  The garbage collector rests while a case is timed.  ``clock`` may be ``time.process_time``, which does not
    run while other processes hold the core; it is fair between cases only with one thread on a CPU.
    """
    entries = {name: case if isinstance(case, Case) else Case(case) for name, case in cases.items()}
    order, chance = list(entries), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for number in range(warmup + rounds):
        chance.shuffle(order)
        for name in order:
            spent = _time(entries[name], repeat, clock)
            if number >= warmup:
                seconds[name].append(spent / repeat)
    return seconds


def _time(case: Case, repeat: int, clock: Clock) -> float:
    case.prepare()
    gc.collect(0)
    gc.disable()
    try:
        synchronise()
        start = clock()
        for _ in range(repeat):
            case.run()
        synchronise()
        return clock() - start
    finally:
        gc.enable()
        case.restore()


def synchronise() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios of two cases, taken round by round."""
    return quartiles([over / under for over, under in zip(numerator, denominator, strict=True)])


def kept_for_backward(step: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, the model's own tensors left out.

    Exact and repeatable, unlike the memory of a process; it does not see what is freed within a single operation.
    """
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel() > 0
    }
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address would be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def most_kept(step: Callable[[], Any], model: nn.Module) -> int:
    """The most bytes that autograd keeps at one time during ``step``, which may hold several backward passes.

    Counted as by ``kept_for_backward``; what a backward pass lets go of no longer counts.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}
    now = most = 0

    def release(place: int, nbytes: int) -> None:
        nonlocal now
        held[place] -= 1
        now -= 0 if held[place] else nbytes

    def pack(tensor: Tensor) -> _Kept:
        nonlocal now, most
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        place, nbytes = storage.data_ptr(), storage.nbytes()
        if place not in own:
            held[place] = held.get(place, 0) + 1
            now += nbytes if held[place] == 1 else 0
            most = max(most, now)
            weakref.finalize(kept, release, place, nbytes)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        step()
    return most


class _Kept:
    """Stands for a tensor that autograd keeps; goes when autograd lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def peak_of(code: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run a Python module in a process of its own; returns what it prints as ``key value`` lines.

    For memory: only a fresh process has a peak of its own.
    """
    result = subprocess.run(
        [sys.executable, *code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(code)} failed with {result.returncode}:\n{result.stderr[-2000:]}")
    pairs = (line.split() for line in result.stdout.splitlines())
    return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2}


def forget_peak() -> None:
    """Start the peak of ``peak_memory`` anew (Linux)."""
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")


def memory(name: str = "VmHWM") -> int:
    """Resident bytes of this process: ``VmHWM`` the peak, ``VmRSS`` now (Linux)."""
    with open("/proc/self/status") as stream:
        line = next(line for line in stream if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """Where a measurement was taken, in general words: cores, threads, versions."""
    from importlib.metadata import version

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {
        "cores": cores,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
        "python": platform.python_version(),
    }
    facts.update({name: version(name) for name in ("torch", "transformers", "peft", "epitaxy")})
    return facts
