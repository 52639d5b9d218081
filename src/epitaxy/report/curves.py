"""What the log of a run looks like as charts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from epitaxy.report.charts import Series, bar_chart, line_chart, row_chart
from epitaxy.report.read import Run


def curves_of(run: Run) -> list[tuple[str, Markup]]:
    """(heading, chart) of training loss, validation metric, validation loss and learning rate against steps."""
    metric = validation_metric(run)
    wanted = {
        "Training loss": ("loss", "cross-entropy"),
        f"Validation {metric}": (f"validation_{metric}", metric),
        "Validation loss": ("validation_loss", "cross-entropy"),
        "Learning rate": ("lr", "learning rate"),
    }
    return [
        (heading, line_chart([Series(label, points(run, key))], heading, "step", label))
        for heading, (key, label) in wanted.items()
    ]


def validation_metric(run: Run) -> str:
    """The metric that chose the best state."""
    return str(run.recipe.get("train", {}).get("metric", "accuracy"))


def points(run: Run, key: str) -> list[tuple[float, float]]:
    """(step, value) of every line of the log that has ``key``."""
    return [
        (float(line["step"]), float(line[key]))
        for line in run.metrics
        if isinstance(line.get(key), (int, float)) and "step" in line
    ]


def update_charts(run: Run) -> list[tuple[str, Markup]]:
    """How far each layer had moved at the best step: a chart per kind of place, all on one scale."""
    groups: dict[str, dict[int, float]] = {}
    for key, norm in _norms(run).items():
        name, layer = place_and_layer(key)
        groups.setdefault(name, {})[layer] = norm
    top = max((norm for layers in groups.values() for norm in layers.values()), default=0.0) or 1.0
    y_label, charts = "change (RMS)", []
    for name, layers in groups.items():
        if len(layers) > 1:
            names, values = [str(layer) for layer in sorted(layers)], [layers[layer] for layer in sorted(layers)]
            charts.append((name, bar_chart(names, values, f"Change of {name}", "layer", y_label, top)))
    single = {name: next(iter(layers.values())) for name, layers in groups.items() if len(layers) == 1}
    if single:
        heading = "Places that are there once"
        charts.append((heading, row_chart(list(single), list(single.values()), heading, top)))
    return charts


def _norms(run: Run) -> Mapping[str, Any]:
    """The logged norms of the state that was kept, or the latest."""
    logged = [line for line in run.metrics if isinstance(line.get("update_norms"), Mapping)]
    best = (run.result or {}).get("validation", {}).get("step")
    chosen = [line for line in logged if line["step"] == best] or logged
    norms: Mapping[str, Any] = chosen[-1]["update_norms"] if chosen else {}
    return norms


def place_and_layer(key: str) -> tuple[str, int]:
    """``lora.attention.q.3`` as ``("lora.attention.q", 3)``; the first number in a path is the layer."""
    parts = key.split(".")
    place = next((number for number, part in enumerate(parts) if part.isdigit()), None)
    if place is None:
        return key, 0
    return ".".join(parts[:place] + parts[place + 1 :]), int(parts[place])
