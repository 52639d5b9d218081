"""``explain``: who is attached, who is active, who trains, how many parameters, where, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from epitaxy.core.host import hosted, unwrap


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter in an ``Explanation``."""

    name: str
    state: str
    parameters: int
    trained: int
    why: str
    places: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """The state of a model and its adapters; ``str()`` gives it as text."""

    base: str
    base_parameters: int
    base_trained: int
    base_why: str
    adapters: tuple[AdapterSummary, ...]

    def __str__(self) -> str:
        lines = [
            f"base {self.base}: {self.base_parameters:,} parameters, {self.base_trained:,} trained ({self.base_why})"
        ]
        for adapter in self.adapters:
            lines.append(
                f"adapter {adapter.name} [{adapter.state}]: {adapter.parameters:,} parameters, "
                f"{adapter.trained:,} trained ({adapter.why})"
            )
            lines.extend(f"  {place}" for place in adapter.places)
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Describe what is attached to ``model`` and what trains."""
    model = unwrap(model)
    record = hosted(model)
    base = [(name, p) for name, p in model.named_parameters() if "epitaxy" not in name.split(".")]
    total = sum(parameter.numel() for _, parameter in base)
    trained = sum(parameter.numel() for _, parameter in base if parameter.requires_grad)
    summaries = []
    for name, adapter in (record.adapters if record is not None else {}).items():
        assert record is not None
        learns = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        state = "merged" if name in record.state.merged else "active" if name in record.state.active else "inactive"
        why = "adapter.trainable is True" if adapter.trainable else "adapter.trainable is False"
        if learns not in (0, adapter.size()):
            why += ", but requires_grad was changed by hand for some parameters"
        if adapter.trainable and state != "active":
            why += f"; {state}, so it gets no gradient now"
        counts: Counter[tuple[str, str, str]] = Counter()
        for piece in adapter.pieces:
            if piece.key is not None:
                counts[piece.part, piece.role, type(piece.module).__name__] += 1
        places = tuple(f"{part}: {count} x {kind} at {role}" for (part, role, kind), count in counts.items())
        summaries.append(AdapterSummary(name, state, adapter.size(), learns, why, places))
    why = "frozen while adapters are attached" if record is not None else "no adapter attached: left as it is"
    if record is not None and trained:
        why = "requires_grad was set by hand on the frozen base"
    family = record.anatomy.family if record is not None else type(model).__name__
    return Explanation(f"{type(model).__name__} ({family})", total, trained, why, tuple(summaries))
