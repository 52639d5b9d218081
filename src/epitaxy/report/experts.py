"""How a mixture of adapters uses its experts: a table for each kind of place, a row for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epitaxy.report.curves import place_and_layer
from epitaxy.report.figures import percent
from epitaxy.report.read import Run


@dataclass(frozen=True)
class Share:
    """Mean weight of one expert, and its part of the largest one, which sets the shade."""

    text: str
    shade: float
    told: str


@dataclass(frozen=True)
class LayerUse:
    """The experts of one layer."""

    layer: int
    shares: Sequence[Share]
    entropy: str
    reading: str | None
    dead: str


@dataclass(frozen=True)
class PlaceUse:
    """The layers of one kind of place."""

    name: str
    experts: int
    reads: bool
    layers: Sequence[LayerUse]


def expert_use_of(run: Run) -> list[PlaceUse]:
    """What the run measured on its validation data; empty for methods without experts."""
    groups: dict[str, dict[int, Mapping[str, Any]]] = {}
    for key, found in (run.result or {}).get("expert_use", {}).items():
        name, layer = place_and_layer(key)
        groups.setdefault(name, {})[layer] = found
    return [_place(name, layers) for name, layers in groups.items()]


def _place(name: str, layers: Mapping[int, Mapping[str, Any]]) -> PlaceUse:
    largest = max(weight for found in layers.values() for weight in found["weight"])
    rows = [_layer(layer, layers[layer], largest) for layer in sorted(layers)]
    experts = max(found["experts"] for found in layers.values())
    return PlaceUse(name, experts, any(row.reading is not None for row in rows), rows)


def _layer(layer: int, found: Mapping[str, Any], largest: float) -> LayerUse:
    shares = [
        Share(
            percent(weight, 0),
            weight / largest if largest else 0.0,
            f"layer {layer}, expert {number}: weight {percent(weight)}, first choice of {percent(first)} of the tokens",
        )
        for number, (weight, first) in enumerate(zip(found["weight"], found["first"], strict=True))
    ]
    reading = found.get("dispatch_entropy")
    mean = None if reading is None else f"{sum(reading) / len(reading):.2f}"
    return LayerUse(layer, shares, f"{found['entropy']:.2f}", mean, ", ".join(map(str, found["dead"])) or "none")
