"""(a) Forward pass and training step of a LoRA, ours against PEFT's: same base weights, sites (q, v) and rank.

    python -m benchmarks.lora_vs_peft [--quick] [--rounds 30] [--threads 1] [--clock cpu]

Both sides are called the same way, on the bare transformers model that carries the adapter; PEFT's outer wrapper,
which costs a little more, is left out.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import epitaxy
from benchmarks.bases import SHAPES, Shape
from benchmarks.output import Report, arguments, parsed, progress
from epitaxy.bench.measure import (
    Clock,
    Quartiles,
    forget_peak,
    interleave,
    kept_for_backward,
    memory,
    peak_of,
    quartiles,
    ratios,
)
from epitaxy.bench.tables import seconds, size, table

RANK = 8
SIDES = ("ours", "PEFT", "bare base")


def ours(base: nn.Module) -> nn.Module:
    """Our LoRA on queries and values."""
    epitaxy.attach(base, epitaxy.LoRA(("attention.q", "attention.v"), rank=RANK))
    return base


def pefts(base: nn.Module, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> nn.Module:
    """PEFT's LoRA at the same places."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(targets)))
    model: nn.Module = wrapped.get_base_model()
    return model


def bare(base: nn.Module) -> nn.Module:
    """The frozen base alone, for scale: its training step is a forward pass."""
    return base.requires_grad_(False)


PLACE: dict[str, Callable[[nn.Module], nn.Module]] = {"ours": ours, "PEFT": pefts, "bare base": bare}


def sides(shape: Shape, depth: int | None, names: tuple[str, ...] = SIDES) -> dict[str, nn.Module]:
    """One model per side.  All share the same base tensors in memory, so that no side has the luckier addresses."""
    models: dict[str, nn.Module] = {}
    first = shape.model(depth)
    for name in names:
        model = shape.model(depth)
        for parameter, source in zip(model.parameters(), first.parameters(), strict=True):
            parameter.data = source.data
        models[name] = PLACE[name](model).train()
    for parameter in [p for model in models.values() for p in model.parameters() if p.requires_grad]:
        nn.init.normal_(parameter.data, std=0.02)
    return models


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """An inference call."""

    def run() -> None:
        with torch.inference_mode():
            model(**inputs)

    return run


def training_step(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """Forward, backward, and a step of AdamW on what is trainable."""
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)

    def run() -> None:
        model(**inputs).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return run


def times(shape: Shape, rounds: int, compiled: bool, depth: int | None, clock: Clock) -> list[dict[str, Any]]:
    """Rows of the time table for one shape."""
    inputs = shape.inputs()
    models = sides(shape, depth)
    rows = []
    for job, make, names in (("forward", forward, SIDES), ("training step", training_step, SIDES[:2])):
        cases = {}
        for name in names:
            torch.compiler.reset()
            model = models[name].train(job != "forward")
            cases[name] = make(torch.compile(model) if compiled else model, inputs)  # type: ignore[arg-type]
        spent = interleave(cases, rounds, warmup=3, clock=clock)
        row = {
            "model": shape.name + (f", {depth} blocks" if depth else ""),
            "mode": "compiled" if compiled else "eager",
            "job": job,
            **{name: quartiles(values) for name, values in spent.items()},
            "ours / PEFT": ratios(spent["ours"], spent["PEFT"]),
        }
        if "bare base" in spent:
            row["ours / bare"] = ratios(spent["ours"], spent["bare base"])
        rows.append(row)
    return rows


class Layer(nn.Module):
    """One linear map, as wide as those of the whole models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q_proj(x)
        return y


def one_layer(quick: bool, rows: int, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Rows of the table for one adapted linear map alone, where the difference is not lost in the rest of a model."""
    width = 64 if quick else 768
    first = Layer(width)
    models: dict[str, nn.Module] = {name: copy.deepcopy(first) for name in SIDES}
    epitaxy.attach(models["ours"], epitaxy.LoRA("q_proj", rank=RANK))
    models["PEFT"], models["bare base"] = pefts(models["PEFT"], ("q_proj",)), bare(models["bare base"])
    for model in models.values():
        host: Any = model.q_proj
        getattr(host, "base_layer", host).weight.data = first.q_proj.weight.data
    x, gradient = torch.randn(2, rows // 2, width, requires_grad=True), torch.randn(2, rows // 2, width)

    def forward_pass(model: nn.Module) -> Callable[[], Any]:
        def call() -> None:
            with torch.inference_mode():
                model(x)

        return call

    def both_passes(model: nn.Module) -> Callable[[], Any]:
        def call() -> None:
            model(x).backward(gradient)
            x.grad = None
            for parameter in model.parameters():
                parameter.grad = None

        return call

    found = []
    for job, make in (("forward", forward_pass), ("forward and backward", both_passes)):
        spent = interleave({name: make(model) for name, model in models.items()}, rounds, warmup=5, clock=clock)
        found.append(
            {
                "model": f"one layer, {rows} x {width}",
                "mode": "eager",
                "job": job,
                **{name: quartiles(values) for name, values in spent.items()},
                "ours / PEFT": ratios(spent["ours"], spent["PEFT"]),
                "ours / bare": ratios(spent["ours"], spent["bare base"]),
            }
        )
    return found


def kept(shape: Shape) -> dict[str, Any]:
    """Row of the memory table: bytes autograd keeps for the backward pass, eager."""
    inputs = shape.inputs()
    row: dict[str, Any] = {"model": shape.name}
    for name, model in sides(shape, None, SIDES[:2]).items():
        row[name] = kept_for_backward(lambda model=model: model(**inputs).loss, model)  # type: ignore[misc]
    return {**row, "ours / PEFT": row["ours"] / row["PEFT"]}


def peak(arguments: argparse.Namespace) -> None:
    """Run in a process of its own: print the peak of resident memory over three training steps."""
    import peft  # noqa: F401  (on both sides: its modules are no memory of the training)

    shape = SHAPES[arguments.shape](arguments.quick)
    model = PLACE[arguments.peak](shape.model()).train()
    step = training_step(model, shape.inputs())
    before = memory("VmRSS")
    forget_peak()
    for _ in range(3):
        step()
    print("before", before)
    print("peak", memory("VmHWM"))


def peaks(name: str, quick: bool, repeats: int) -> dict[str, Any]:
    """Row of the memory table: peak of the whole process while training, over several fresh processes."""
    found: dict[str, list[float]] = {side: [] for side in SIDES[:2]}
    for _ in range(repeats):
        for side, values in found.items():
            flags = ["--shape", name, *(["--quick"] if quick else [])]
            values.append(peak_of(["-m", "benchmarks.lora_vs_peft", "--peak", side, *flags])["peak"])
    row: dict[str, Any] = {"model": SHAPES[name](quick).name}
    row.update({side: quartiles(values) for side, values in found.items()})
    return {**row, "ours / PEFT": ratios(found["ours"], found["PEFT"])}


def run(report: Report, options: argparse.Namespace) -> None:
    """Measure everything of this comparison and put it into ``report``."""
    rounds, quick, clock = options.rounds or (3 if options.quick else 30), options.quick, options.timer
    time_rows: list[dict[str, Any]] = []
    memory_rows: list[dict[str, Any]] = []
    for rows in (16, 512):
        progress(f"one layer, {rows} rows")
        time_rows += one_layer(quick, rows, 5 if quick else 10 * rounds, clock)
    for name, make in SHAPES.items():
        shape = make(quick)
        progress(f"{shape.name}, eager")
        time_rows += times(shape, rounds, False, None, clock)
        if not options.eager_only:
            progress(f"{shape.name}, compiled")
            time_rows += times(shape, rounds, True, options.compiled_depth, clock)
        progress(f"{shape.name}, memory")
        memory_rows.append({"what": "kept for backward", **kept(shape)})
        if sys.platform == "linux":
            memory_rows.append({"what": "peak of the process", **peaks(name, quick, 1 if quick else 3)})
    for row in time_rows:
        row.update({side: seconds(row[side]) for side in SIDES if side in row})
    for row in memory_rows:
        for side in SIDES[:2]:
            value = row[side]
            row[side] = size(value.median if isinstance(value, Quartiles) else value)
    columns = ["model", "mode", "job", *SIDES, "ours / PEFT", "ours / bare"]
    report.add("time", f"LoRA of rank {RANK} on queries and values: time", time_rows, table(time_rows, columns))
    report.add("memory", f"LoRA of rank {RANK} on queries and values: memory", memory_rows, table(memory_rows))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--eager-only", action="store_true", help="leave torch.compile out")
    parser.add_argument("--compiled-depth", type=int, default=None, help="blocks of the compiled models")
    parser.add_argument("--peak", choices=list(PLACE), help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parsed(parser)
    if options.peak:
        peak(options)
        return
    report = Report("lora_vs_peft", options)
    run(report, options)
    report.finish()


if __name__ == "__main__":
    main()
