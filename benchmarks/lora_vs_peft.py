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
