"""(f) What a folded adapter costs at inference: its share of the feed-forwards, nothing beside them.

    python -m benchmarks.fold [--quick] [--rounds 20] [--threads 1] [--clock cpu]

The bare base, the base with an AdaptFormer adapter of 64 units beside every feed-forward, and the folded model, whose
feed-forwards have 64 hidden units more.  A copy of the base, the control, shows how far two models of one shape lie
apart.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import nn

import epitaxy
from benchmarks.bases import SHAPES
from benchmarks.output import Report, arguments, parsed, progress
from epitaxy.bench.measure import Case, Clock, interleave, quartiles, ratios
from epitaxy.bench.tables import seconds, table

METHODS: dict[str, Any] = {
    "AdaptFormer, reads the stream, own norm": epitaxy.Bottleneck.adaptformer(64),
    "parallel, GELU": epitaxy.Bottleneck(bottleneck=64, activation="gelu"),
}


def sides(model: nn.Module, method: Any) -> dict[str, nn.Module]:
    """The models that are timed; the adapter is away from its start."""
    adapted = copy.deepcopy(model)
    adapter = epitaxy.attach(adapted, method)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return {"bare": model, "control": copy.deepcopy(model), "adapted": adapted, "folded": epitaxy.fold(adapted)}


@torch.inference_mode()
def difference(models: dict[str, nn.Module], inputs: dict[str, Any]) -> float:
    """Largest difference of logits between the adapted and the folded model."""
    return float((models["adapted"](**inputs).logits - models["folded"](**inputs).logits).abs().max())


def cost(shape: Any, label: str, method: Any, rounds: int, clock: Clock) -> dict[str, Any]:
    """Row of the table: one method."""
    models, inputs = sides(shape.model().eval(), method), shape.inputs()

    def forward(model: nn.Module) -> None:
        with torch.inference_mode():
            model(**inputs)

    cases = {name: Case(lambda model=model: forward(model)) for name, model in models.items()}
    spent = interleave(cases, rounds, warmup=2, clock=clock)
    return {
        "adapter": label,
        "bare": seconds(quartiles(spent["bare"])),
        "folded": seconds(quartiles(spent["folded"])),
        "folded / bare": ratios(spent["folded"], spent["bare"]),
        "adapted / bare": ratios(spent["adapted"], spent["bare"]),
        "folded / adapted": ratios(spent["folded"], spent["adapted"]),
        "control / bare": ratios(spent["control"], spent["bare"]),
        "largest difference": f"{difference(models, inputs):.1e}",
    }


def run(report: Report, options: argparse.Namespace) -> None:
    """Measure everything of this comparison and put it into ``report``."""
    rounds = options.rounds or (3 if options.quick else 20)
    shape = SHAPES["vit"](options.quick, batch=8)
    rows = []
    for label, method in METHODS.items():
        progress(f"fold {label}, {shape.name}")
        rows.append(cost(shape, label, method, rounds, options.timer))
    report.add("fold", f"Inference of a folded adapter, {shape.name}, 8 pictures, 64 units", rows, table(rows))


def main() -> None:
    options = parsed(arguments(__doc__))
    report = Report("fold", options)
    run(report, options)
    report.finish()


if __name__ == "__main__":
    main()
