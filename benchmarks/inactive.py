"""(c) What an attached but inactive adapter costs: nothing that can be measured.

    python -m benchmarks.inactive [--quick] [--rounds 60] [--threads 1] [--clock cpu]

The same model object is timed bare and with an inactive adapter attached, so that both find the same weights at the
same addresses.  A second bare case, the control, shows how far two timings of one and the same thing lie apart.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import epitaxy
from benchmarks.bases import SHAPES
from benchmarks.output import Report, arguments, parsed, progress
from epitaxy.bench.measure import Case, Clock, interleave, quartiles, ratios
from epitaxy.bench.tables import seconds, table

METHODS: dict[str, Any] = {
    "LoRA": epitaxy.LoRA(("attention.q", "attention.v"), rank=8),
    "bottleneck": epitaxy.Bottleneck(bottleneck=64),
}


def overhead(shape: Any, label: str, method: Any, rounds: int, repeat: int, clock: Clock) -> dict[str, Any]:
    """Row of the table: one method on one model."""
    model = shape.model().eval()
    inputs = shape.inputs()

    def forward() -> None:
        with torch.inference_mode():
            model(**inputs)

    def attach() -> None:
        epitaxy.attach(model, method)
        epitaxy.activate(model, None)
        forward()

    cases = {  # every case is preceded by an untimed pass, so that none starts with colder caches
        "bare": Case(forward, forward),
        "control": Case(forward, forward),
        "inactive": Case(forward, attach, lambda: epitaxy.detach(model)),
    }
    spent = interleave(cases, rounds, warmup=3, repeat=repeat, clock=clock)
    return {
        "model": shape.name,
        "attached": label,
        "bare": seconds(quartiles(spent["bare"])),
        "inactive": seconds(quartiles(spent["inactive"])),
        "inactive / bare": ratios(spent["inactive"], spent["bare"]),
        "control / bare": ratios(spent["control"], spent["bare"]),
    }


def run(report: Report, options: argparse.Namespace) -> None:
    """Measure everything of this comparison and put it into ``report``."""
    rounds = options.rounds or (3 if options.quick else 60)
    shapes = [
        SHAPES["vit"](options.quick, batch=1),
        SHAPES["lm"](options.quick, batch=1, length=64),
        SHAPES["lm"](options.quick, batch=1, length=1),
    ]
    rows = []
    for shape, tokens in zip(shapes, ("197 tokens", "64 tokens", "1 token"), strict=True):
        for label, method in METHODS.items():
            progress(f"inactive {label}, {shape.name}, {tokens}")
            row = overhead(shape, label, method, rounds, 4 if tokens == "1 token" else 1, options.timer)
            rows.append({**row, "model": f"{shape.name}, {tokens}"})
    report.add("inactive", "An attached, inactive adapter against the bare base", rows, table(rows))


def main() -> None:
    options = parsed(arguments(__doc__))
    report = Report("inactive", options)
    run(report, options)
    report.finish()


if __name__ == "__main__":
    main()
