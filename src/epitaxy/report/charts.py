"""Charts as inline SVG whose colours follow the page: lines, bars and labelled points.

Every chart carries a title and a description for those who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from epitaxy.report.figures import short

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 60, 18, 12, 40
HUES = 8  # classes hue-0 .. hue-7 in the style sheet


@dataclass(frozen=True)
class Series:
    """One line: its name and its points ``(x, y)``."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """One labelled point with a vertical spread and, behind it, the single values it stands for."""

    name: str
    x: float
    y: float
    spread: float = 0.0
    singles: Sequence[float] = field(default=())


@dataclass(frozen=True)
class Axis:
    """A range and its ticks; ``place`` maps a value to [0, 1]."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def place(self, value: float) -> float:
        """Position of ``value`` along the axis."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def label(self, tick: float) -> str:
        """A tick as text, with as many decimals as tell neighbours apart."""
        step = self.ticks[1] - self.ticks[0]
        if self.log or step >= 1e3:
            return short(tick)
        if step < 1e-4:
            digits, power = f"{tick:.3e}".split("e")
            return f"{float(digits):g}e{int(power)}" if tick else "0"
        return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def linear_axis(values: Sequence[float], include: float | None = None, ticks: int = 5) -> Axis:
    """An axis over ``values`` that begins and ends at round numbers."""
    low, high = min(values), max(values)
    if include is not None:
        low, high = min(low, include), max(high, include)
    if high - low < 1e-12:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    raw = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = [round(step * number, 12) for number in range(first, last + 1)]
    return Axis(marks[0], marks[-1], marks)


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis over positive ``values``, from power of ten to power of ten."""
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    return Axis(10.0**low, 10.0**high, [10.0**power for power in range(low, high + 1)], log=True)


def tick_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis from the least to the largest of positive ``values``, with a tick at each of them."""
    ticks = sorted(set(values))
    if len(ticks) == 1:
        ticks = [ticks[0] / 2, ticks[0], ticks[0] * 2]
    return Axis(ticks[0], ticks[-1], ticks, log=True)


def line_chart(series: Sequence[Series], title: str, x_label: str, y_label: str, log: bool = False) -> Markup:
    """One or several lines; a single point is drawn as a dot.  ``log``: x is logarithmic, its ticks are the values."""
    shown = [Series(line.name, [point for point in line.points if all(map(math.isfinite, point))]) for line in series]
    shown = [line for line in shown if line.points]
    if not shown:
        return Markup('<p class="note">{}: nothing was recorded.</p>').format(title)
    places_x = [x for line in shown for x, _ in line.points]
    x_axis = tick_axis(places_x) if log else linear_axis(places_x)
    y_axis = linear_axis([y for line in shown for _, y in line.points])
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    for number, line in enumerate(shown):
        places = [_place(x_axis, y_axis, x, y) for x, y in line.points]
        hue = f"hue-{number % HUES}"
        if len(places) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(Markup('<path class="line {}" d="{}"/>').format(hue, path))
        if len(places) <= 20:
            parts += [
                Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(hue, x, y) for x, y in places
            ]
    ends = ", ".join(f"{line.name} from {short(line.points[0][1])} to {short(line.points[-1][1])}" for line in shown)
    return _figure(parts, title, f"{y_label} against {x_label}: {ends}.", HEIGHT) + _legend(shown)


def bar_chart(
    names: Sequence[str], values: Sequence[float], title: str, x_label: str, y_label: str, top: float
) -> Markup:
    """Upright bars; ``top`` is the value of the full height, so that several charts can share a scale."""
    y_axis = linear_axis([0.0, top], include=0.0, ticks=3)
    height, inner = 170, WIDTH - LEFT - RIGHT
    slot = inner / max(1, len(names))
    parts = [_y_grid(y_axis, height)]
    every = max(1, math.ceil(len(names) / 14))
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        tall = y_axis.place(max(0.0, value)) * (height - TOP - BOTTOM)
        x, y = LEFT + slot * number + slot * 0.12, height - BOTTOM - tall
        parts.append(
            Markup(
                '<rect class="bar hue-0" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
            ).format(x, y, slot * 0.76, tall, f"{name}: {short(value)}")
        )
        if number % every == 0:
            parts.append(_text(x + slot * 0.38, height - BOTTOM + 14, name, "middle"))
    parts += [_x_label(x_label, height), _y_label(y_label, height)]
    largest = max(range(len(values)), key=lambda place: values[place]) if values else 0
    told = f"{len(names)} bars, the largest {short(values[largest])} at {names[largest]}." if values else "No bars."
    return _figure(parts, title, f"{y_label} by {x_label}: {told}", height)


def row_chart(names: Sequence[str], values: Sequence[float], title: str, top: float) -> Markup:
    """Lying bars under their names, for names too long to stand beside each other."""
    row, parts = 34, []
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        y = row * number
        parts.append(_text(0, y + 13, f"{name}: {short(value)}", "start", "name"))
        parts.append(
            Markup('<rect class="bar hue-0" x="0" y="{}" width="{:.1f}" height="10"/>').format(
                y + 19, WIDTH * max(0.0, value) / top
            )
        )
    told = ", ".join(f"{name} {short(value)}" for name, value in zip(names, values, strict=True))
    return _figure(parts, title, told + ".", row * len(names))


def point_chart(marks: Sequence[Mark], title: str, x_label: str, y_label: str) -> Markup:
    """Labelled points on a logarithmic x axis, with spread bars and faint single values."""
    height = 340
    marks = [mark for mark in marks if mark.x > 0]
    if not marks:
        return Markup('<p class="note">{}: nothing to show.</p>').format(title)
    x_axis = log_axis([mark.x for mark in marks])
    values = [value for mark in marks for value in (mark.y - mark.spread, mark.y + mark.spread, *mark.singles)]
    y_axis = linear_axis(values)
    parts = [_frame(x_axis, y_axis, x_label, y_label, height)]
    taken: list[tuple[float, float, float]] = []
    for number, mark in enumerate(marks):
        hue = f"hue-{number % HUES}"
        x, y = _place(x_axis, y_axis, mark.x, mark.y, height)
        for value in mark.singles:
            parts.append(
                Markup('<circle class="faint {}" cx="{:.1f}" cy="{:.1f}" r="2.2"/>').format(
                    hue, x, _place(x_axis, y_axis, mark.x, value, height)[1]
                )
            )
        ends = [_place(x_axis, y_axis, mark.x, mark.y + sign * mark.spread, height)[1] for sign in (-1, 1)]
        parts.append(Markup('<path class="line {}" d="M{:.1f} {:.1f}V{:.1f}"/>').format(hue, x, *ends))
        parts.append(Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="4.5"/>').format(hue, x, y))
        parts.append(_label(mark.name, x, y, taken, height))
    told = "; ".join(f"{mark.name}: {short(mark.y)} at {short(mark.x)}" for mark in marks)
    return _figure(parts, title, f"{y_label} against {x_label}. {told}.", height)


def waveform(envelope: Sequence[float], title: str) -> Markup:
    """A sound as mirrored bars; ``envelope`` holds absolute peaks."""
    height, top = 90, max([*envelope, 1e-6])
    slot = WIDTH / max(1, len(envelope))
    path = "".join(
        f"M{slot * (number + 0.5):.1f} {height / 2 - value / top * height * 0.45:.1f}v{value / top * height * 0.9:.1f}"
        for number, value in enumerate(envelope)
    )
    return _figure([Markup('<path class="line hue-0" d="{}"/>').format(path)], title, f"peak {top:.2g}", height)


def _place(x_axis: Axis, y_axis: Axis, x: float, y: float, height: int = HEIGHT) -> tuple[float, float]:
    return (
        LEFT + x_axis.place(x) * (WIDTH - LEFT - RIGHT),
        height - BOTTOM - y_axis.place(y) * (height - TOP - BOTTOM),
    )


def _label(name: str, x: float, y: float, taken: list[tuple[float, float, float]], height: int) -> Markup:
    """Put a name beside its point, on the side with room, moved up or down until it covers no other name."""
    wide = 6.2 * len(name)
    right = x + 9 + wide < WIDTH
    start = x + 9 if right else x - 9 - wide
    free: Callable[[float], bool] = lambda level: all(  # noqa: E731
        abs(level - other) > 12 or start > end or start + wide < begin for begin, end, other in taken
    )
    shifts = sorted((step * sign for step in range(0, height, 3) for sign in (1, -1)), key=abs)
    level = next((y + 4 + s for s in shifts if TOP + 8 < y + 4 + s < height - BOTTOM and free(y + 4 + s)), y + 4)
    taken.append((start, start + wide, level))
    return _text(x + 9 if right else x - 9, level, name, "start" if right else "end", "name")


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str, height: int = HEIGHT) -> Markup:
    parts = [_y_grid(y_axis, height)]
    for tick in x_axis.ticks:
        x = LEFT + x_axis.place(tick) * (WIDTH - LEFT - RIGHT)
        parts.append(_text(x, height - BOTTOM + 14, x_axis.label(tick), "middle"))
    return Markup("").join([*parts, _x_label(x_label, height), _y_label(y_label, height)])


def _y_grid(axis: Axis, height: int) -> Markup:
    parts = []
    for tick in axis.ticks:
        y = height - BOTTOM - axis.place(tick) * (height - TOP - BOTTOM)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
        parts.append(_text(LEFT - 6, y + 3.5, axis.label(tick), "end"))
    return Markup("").join(parts)


def _x_label(label: str, height: int) -> Markup:
    return _text((LEFT + WIDTH - RIGHT) / 2, height - 6, label, "middle", "axis")


def _y_label(label: str, height: int) -> Markup:
    middle = (TOP + height - BOTTOM) / 2
    return Markup(
        '<text class="axis" text-anchor="middle" transform="rotate(-90 12 {0:.1f})" x="12" y="{0:.1f}">{1}</text>'
    ).format(middle, label)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _legend(series: Sequence[Series]) -> Markup:
    if len(series) < 2:
        return Markup("")
    items = [
        Markup('<li><span class="key hue-{}"></span>{}</li>').format(number % HUES, line.name)
        for number, line in enumerate(series)
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def _figure(parts: Sequence[Markup], title: str, description: str, height: int) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(WIDTH, height, f"{title}. {description}", title, escape(description), Markup("").join(parts))
