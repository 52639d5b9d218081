"""Axes and charts: where values land."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from epitaxy.report import figures
from epitaxy.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Mark,
    Series,
    bar_chart,
    line_chart,
    linear_axis,
    log_axis,
    point_chart,
    row_chart,
    waveform,
)


@pytest.mark.parametrize("values", [[0.0, 1.0], [3.0, 3.0], [0.0, 0.0], [-5.0, 12345.0], [1e-7, 2e-7], [0.912, 0.934]])
def test_linear_axis_holds_its_values(values: list[float]) -> None:
    axis = linear_axis(values)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 9
    assert axis.place(axis.low) == 0
    assert axis.place(axis.high) == pytest.approx(1)
    steps = [after - before for before, after in pairwise(axis.ticks)]
    assert all(step == pytest.approx(steps[0]) for step in steps)


def test_log_axis() -> None:
    axis = log_axis([300.0, 2_000_000.0])
    assert (axis.low, axis.high) == (100.0, 1e7)
    assert axis.place(1000.0) == pytest.approx(0.2)
    assert log_axis([100.0]).place(100.0) == 0


def test_line_chart_places_points() -> None:
    chart = line_chart([Series("a", [(0, 0.0), (10, 1.0)])], "Title", "x", "y")
    path = re.search(r'class="line hue-0" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', chart)
    assert path is not None
    x0, y0, x1, y1 = map(float, path.groups())
    assert (x0, x1) == (LEFT, WIDTH - RIGHT)
    assert (y0, y1) == (260 - BOTTOM, TOP)


def test_values_that_are_no_numbers_are_left_out() -> None:
    chart = line_chart([Series("a", [(0, math.nan), (1, 1.0), (2, math.inf)]), Series("b", [])], "Title", "x", "y")
    assert "nan" not in chart
    assert "inf" not in chart
    assert chart.count("<circle") == 1


def test_bar_heights_share_the_scale() -> None:
    chart = bar_chart(["0", "1"], [1.0, 0.5], "Title", "layer", "norm", top=2.0)
    heights = [float(height) for height in re.findall(r'<rect[^>]* height="([\d.]+)"', chart)]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert heights[0] == pytest.approx((170 - TOP - BOTTOM) / 2, abs=0.2)


def test_names_of_points_do_not_cover_each_other() -> None:
    marks = [Mark(f"method {number}", 1000.0 + number, 0.9 + number * 1e-4) for number in range(6)]
    chart = point_chart(marks, "Title", "parameters", "accuracy")
    levels = sorted(float(y) for y in re.findall(r'class="name" x="[\d.]+" y="([\d.]+)"', chart))
    assert len(levels) == 6
    assert all(after - before > 11 for before, after in pairwise(levels))


def test_names_are_escaped() -> None:
    for chart in (
        line_chart([Series("<a>", [(0, 1), (1, 2)]), Series("<b>", [(0, 1), (1, 2)])], "<t>", "<x>", "<y>"),
        bar_chart(["<a>"], [1.0], "<t>", "<x>", "<y>", 1.0),
        point_chart([Mark("<a>", 10.0, 0.5)], "<t>", "<x>", "<y>"),
        row_chart(["<a>"], [1.0], "<t>", 1.0),
        waveform([0.1], '"<t>"'),
    ):
        assert not re.search(r"<(a|b|t|x|y)>", chart)


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (158_328, "158 kB"), (10_895_264, "10.9 MB"), (None, "\u2013")],
)
def test_sizes(value: float | None, text: str) -> None:
    assert figures.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (61, "1 min 01 s"), (7260, "2 h 01 min")]
)
def test_times(value: float, text: str) -> None:
    assert figures.seconds(value) == text


@pytest.mark.parametrize("values", [[2.12, 2.25], [0.0, 0.0008], [12345.0, 12346.0], [0.0, 5.0], [1e-7, 3e-7]])
def test_labels_tell_ticks_apart(values: list[float]) -> None:
    axis = linear_axis(values)
    labels = [axis.label(tick) for tick in axis.ticks]
    assert len(set(labels)) == len(labels)
    assert [float(label) for label in labels] == pytest.approx(list(axis.ticks))


def test_labels_of_small_learning_rates_leave_room_for_the_name_of_the_axis() -> None:
    axis = linear_axis([1e-4, 4e-4], ticks=6)
    assert [axis.label(tick) for tick in axis.ticks][:3] == ["1e-4", "1.5e-4", "2e-4"]
    assert linear_axis([0.0, 1e-4]).label(0.0) == "0"
