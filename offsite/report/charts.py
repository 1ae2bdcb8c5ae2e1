"""Charts of the pages: dots on a logarithmic axis, loss curves, marks on a plane; and the ticks of any axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offsite.report.drawing import WIDTH, Circle, Drawing, Line, Point, Polyline, Shape, Text

_ROW = 34
_LABELS = 168
_RIGHT = 84


@dataclass(frozen=True)
class Dot:
    """One row of the dot chart: its values by seed, and the CSS class that colours it."""

    label: str
    values: tuple[float, ...]
    shown: str
    css: str


@dataclass(frozen=True)
class Curve:
    """One line of a chart: (step, value) in order, and the CSS class that draws it."""

    name: str
    points: tuple[Point, ...]
    css: str


def dots(rows: Sequence[Dot], *, title: str, reference: float | None = None) -> Drawing:
    """Return a chart with one row per figure, every seed a dot, their mean a larger one, on a logarithmic axis.

    Args:
        reference: where to draw a dashed line, the figure that others are compared with.
    """
    numbers = [value for row in rows for value in row.values]
    low, high = min(numbers) / 1.12, max(numbers) * 1.12
    height = _ROW * len(rows) + 34

    def x(value: float) -> float:
        share = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return _LABELS + share * (WIDTH - _LABELS - _RIGHT)

    bottom = height - 26
    drawn: list[Shape] = []
    for tick, shown in log_ticks(low, high):
        drawn.append(Line.down(x(tick), 4, bottom, "grid"))
        drawn.append(Text(shown, x(tick), bottom + 18, "axis", "middle"))
    if reference is not None:
        drawn.append(Line.down(x(reference), 4, bottom, "reference"))
    for number, row in enumerate(rows):
        drawn += _dot_row(row, x, _ROW * number + 20, reference)
    return Drawing(title, height, tuple(drawn))


def curves(lines: Sequence[Curve], *, title: str, height: int = 230) -> Drawing:
    """Return a line chart over steps, with a linear axis from just below the lowest value."""
    points = [point for line in lines for point in line.points]
    last = max(step for step, _ in points)
    first = min(step for step, _ in points)
    values = [value for _, value in points]
    pad = (max(values) - min(values)) * 0.08 or 0.1
    low, high = min(values) - pad, max(values) + pad
    left, right, top, bottom = 52, WIDTH - 16, 10, height - 30

    def x(step: float) -> float:
        return left + (step - first) / max(last - first, 1) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    drawn: list[Shape] = []
    for tick in ticks(low, high, 5):
        drawn.append(Line.across(left, right, y(tick), "grid"))
        drawn.append(Text(f"{tick:.4g}", left - 8, y(tick) + 4, "axis", "end"))
    for tick in filter(float.is_integer, map(float, ticks(first, last, 6))):  # there is no step 1.5
        drawn.append(Text(f"{tick:,.0f}", x(tick), bottom + 20, "axis", "middle"))
    drawn.append(Text("step", left - 8, bottom + 20, "axis", "end"))
    for line in lines:
        placed = tuple((x(step), y(value)) for step, value in line.points)
        drawn.append(Polyline(placed, line.css))
        if len(placed) <= 40:
            drawn += [Circle(*point, 2.4, f"{line.css} mark") for point in placed]
    return Drawing(title, height, tuple(drawn))


@dataclass(frozen=True)
class Mark:
    """One mark on a plane: where it stands, what is written beside it, its CSS class and radius in pixels.

    The label stands above it to the right, or below it to the left.
    """

    at: Point
    label: str
    css: str
    radius: float = 5
    is_below: bool = False


def plane(
    marks: Sequence[Mark],
    lines: Sequence[tuple[Point, Point, str]],
    *,
    title: str,
    axes: tuple[str, str],
    height: int = 340,
) -> Drawing:
    """Return marks and straight lines on two linear axes; at the right edge labels stand below and to the left.

    Args:
        lines: from point to point, with the CSS class of each; what lies outside of the axes is not cut.
        axes: what the level and the upright axis are of.
    """
    points = [mark.at for mark in marks] + [point for one, other, _ in lines for point in (one, other)]
    (x_low, x_high), (y_low, y_high) = (_padded([point[axis] for point in points]) for axis in (0, 1))
    left, right, top, bottom = 52, WIDTH - 16, 24, height - 44

    def x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - top)

    drawn: list[Shape] = [Text(axes[1], left - 8, top - 10, "axis"), Text(axes[0], right, bottom + 38, "axis", "end")]
    for tick in ticks(y_low, y_high, 5):
        drawn.append(Line.across(left, right, y(tick), "grid"))
        drawn.append(Text(f"{tick:.3g}", left - 8, y(tick) + 4, "axis", "end"))
    for tick in ticks(x_low, x_high, 6):
        drawn.append(Line.down(x(tick), top, bottom, "grid"))
        drawn.append(Text(f"{tick:.3g}", x(tick), bottom + 20, "axis", "middle"))
    for one, other, css in lines:
        drawn.append(Polyline(((x(one[0]), y(one[1])), (x(other[0]), y(other[1]))), css))
    drawn += [Circle(x(mark.at[0]), y(mark.at[1]), mark.radius, mark.css) for mark in marks]
    for mark in marks:  # labels over all marks
        place = x(mark.at[0])
        is_below = mark.is_below or place > right - 110
        if mark.label and is_below:
            drawn.append(Text(mark.label, place - 9, y(mark.at[1]) + 19, "label", "end"))
        elif mark.label:
            drawn.append(Text(mark.label, place + 10, y(mark.at[1]) - 8, "label"))
    return Drawing(title, height, tuple(drawn))


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Return bounds a little outside of the values."""
    pad = (max(values) - min(values)) * 0.08 or abs(values[0]) * 0.1 or 0.1
    return min(values) - pad, max(values) + pad


def smooth(points: Sequence[Point], *, share: float = 0.05) -> tuple[Point, ...]:
    """Return a centred moving average over `share` of the points, at least one; ends use what there is."""
    half = int(len(points) * share / 2)
    found = []
    for number, (step, _) in enumerate(points):
        window = points[max(0, number - half) : number + half + 1]
        found.append((step, math.fsum(value for _, value in window) / len(window)))
    return tuple(found)


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return round numbers within [low, high], about `wanted` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / wanted
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return round numbers within [low, high] that are far enough apart on a logarithmic axis, with their text."""
    found: list[float] = []
    for factors in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(found) >= 4:
            break
    apart = math.log(high / low) / 11
    kept: list[float] = []
    for value in found:
        if not kept or math.log(value / kept[-1]) >= apart:
            kept.append(value)
    return [(value, f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}") for value in kept]


def _dot_row(row: Dot, x: Callable[[float], float], y: float, reference: float | None) -> list[Shape]:
    """The row's label, a thin line from the reference to the mean, a dot per seed, the mean and its text."""
    mean = x(math.fsum(row.values) / len(row.values))
    drawn: list[Shape] = [Text(row.label, _LABELS - 14, y + 4, "label", "end")]
    if reference is not None:
        drawn.append(Line.across(x(reference), mean, y, f"stem {row.css}"))
    if len(row.values) > 1:
        drawn += [Circle(x(value), y, 3, f"seed {row.css}") for value in row.values]
    drawn.append(Circle(mean, y, 6, f"dot {row.css}"))
    drawn.append(Text(row.shown, WIDTH - 4, y + 4, "value", "end"))
    return drawn
