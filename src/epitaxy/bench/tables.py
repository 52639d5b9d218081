"""Results of measurements as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epitaxy.bench.measure import Quartiles


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table; ``columns`` (default: those of the first row) gives order and choice."""
    if not rows:
        return ""
    names = list(columns or rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(cell(row.get(name, '')) for name in names)} |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """One value as text: quartiles as ``median [low, high]``, numbers to three digits."""
    if isinstance(value, Quartiles):
        return str(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def seconds(values: Quartiles) -> str:
    """A time with its quartiles, in the unit that suits it."""
    unit, factor = next((u, f) for u, f, least in UNITS if values.median >= least)
    return f"{values.median * factor:.3g} [{values.low * factor:.3g}, {values.high * factor:.3g}] {unit}"


UNITS = (("s", 1.0, 1.0), ("ms", 1e3, 1e-3), ("µs", 1e6, 0.0))


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
