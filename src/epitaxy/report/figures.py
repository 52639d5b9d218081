"""Numbers, sizes and times as text."""

from __future__ import annotations

NOTHING = "\N{EN DASH}"


def count(value: float | None) -> str:
    """``1,234,567``; a dash for nothing."""
    return NOTHING if value is None else f"{value:,.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as ``93.1 %``."""
    return NOTHING if value is None else f"{100 * value:.{digits}f} %"


def size(value: float | None) -> str:
    """Bytes as ``1.5 MB`` (powers of ten); below a kilobyte exact."""
    if value is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def seconds(value: float | None) -> str:
    """A time as ``0.8 s``, ``42 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    if value is None:
        return NOTHING
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def short(value: float) -> str:
    """An axis label: at most three significant digits, thousands and millions abbreviated."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
