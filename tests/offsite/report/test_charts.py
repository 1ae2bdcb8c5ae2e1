"""Charts: round ticks, and every point where its number says."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite.report.charts import Curve, Dot, Mark, curves, dots, log_ticks, plane, smooth, ticks
from offsite.report.drawing import Circle, Polyline, Text
from offsite.report.engine import environment

POSITIVE = st.floats(1e-2, 1e6)


def svg(drawing):
    return environment().get_template("drawing.svg.jinja").module.svg(drawing)


@given(st.floats(-1e6, 1e6), POSITIVE)
def test_ticks_are_round_and_inside(low, span):
    found = ticks(low, low + span, 5)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in found)


def test_ticks_of_familiar_ranges():
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(2.1, 3.8, 4) == pytest.approx([2.5, 3.0, 3.5])
    assert ticks(1, 1, 5) == [1]


@given(POSITIVE, st.floats(1.02, 1e4))
def test_logarithmic_ticks_are_inside_and_apart(low, factor):
    found = [value for value, _ in log_ticks(low, low * factor)]
    assert all(low <= value <= low * factor for value in found)
    assert all(math.log(b / a) >= math.log(factor) / 11 for a, b in pairwise(found))


def test_logarithmic_ticks_of_a_wide_and_a_narrow_range():
    assert [shown for _, shown in log_ticks(7, 6000)] == [
        "10",
        "20",
        "50",
        "100",
        "200",
        "500",
        "1,000",
        "2,000",
        "5,000",
    ]
    assert [shown for _, shown in log_ticks(8.9, 19)] == ["9", "10", "12", "14", "16", "18"]


def test_dots_lie_on_a_logarithmic_axis_with_equal_ratios_equally_far():
    rows = [Dot(name, (value,), name, "owner") for name, value in (("a", 5.0), ("b", 10.0), ("c", 20.0))]
    drawn = svg(dots(rows, title="x", reference=10.0))
    centres = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    assert centres[1] - centres[0] == pytest.approx(centres[2] - centres[1], abs=0.2)
    assert f'x1="{centres[1]:g}" x2="{centres[1]:g}"' in drawn


def test_equal_figures_still_make_a_chart():
    drawn = svg(dots([Dot("a", (5.0, 5.0), "5", "owner")], title="x"))
    assert drawn.count("<circle") == 3


def test_a_curve_of_one_point_or_constant_value_is_drawn():
    for points in (((1.0, 2.0),), ((1.0, 2.0), (2.0, 2.0))):
        drawn = svg(curves([Curve("a", points, "raw")], title="x"))
        assert "nan" not in drawn
        assert "inf" not in drawn


@pytest.mark.parametrize(("first", "last"), [(1, 4), (0, 3), (1, 2), (1, 200)])
def test_steps_are_whole_and_said_once(first, last):
    points = tuple((float(step), 1.0 / (step + 1)) for step in range(first, last + 1))
    drawn = curves([Curve("a", points, "raw")], title="x").shapes
    said = [shape.text for shape in drawn if isinstance(shape, Text) and shape.anchor == "middle"]
    assert said == sorted(set(said), key=int)
    assert set(said) <= {str(step) for step in range(first, last + 1)}
    assert len(said) > 1


def test_smoothing_keeps_constants_and_length():
    points = tuple((float(n), 3.0) for n in range(100))
    assert smooth(points) == points
    assert smooth(points[:3]) == points[:3]
    noisy = tuple((float(n), float(n % 2)) for n in range(100))
    assert all(0.3 < value < 0.7 for _, value in smooth(noisy, share=0.2)[10:-10])


def test_marks_on_a_plane_stand_where_their_numbers_say():
    marks = [Mark((0.0, 1.0), "a", "dot owner"), Mark((2.0, 0.0), "b", "dot owner"), Mark((1.0, 0.5), "", "dot client")]
    drawing = plane(marks, [((0.0, 1.0), (2.0, 0.0), "raw")], title="marks", axes=("x", "y"))
    first, last, middle = [shape for shape in drawing.shapes if isinstance(shape, Circle)]
    assert (middle.x, middle.y) == pytest.approx(((first.x + last.x) / 2, (first.y + last.y) / 2))
    assert first.x < last.x
    assert first.y < last.y, "upright values grow upwards"
    (line,) = [shape for shape in drawing.shapes if isinstance(shape, Polyline)]
    assert line.points == ((first.x, first.y), (last.x, last.y))
    labels = {shape.text: shape for shape in drawing.shapes if isinstance(shape, Text) and shape.css == "label"}
    assert set(labels) == {"a", "b"}
    assert (labels["a"].anchor, labels["b"].anchor) == ("start", "end")
    assert "<circle" in svg(drawing)
