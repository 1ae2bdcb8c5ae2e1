"""Two charts as inline SVG: figures as dots on a logarithmic axis, and loss curves. Colours come from the page's CSS.

Coordinates are CSS pixels of a drawing 720 wide that scales with the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offsite.report.markup import Markup, el, join

WIDTH = 720
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
    points: tuple[tuple[float, float], ...]
    css: str


def dots(rows: Sequence[Dot], *, title: str, reference: float | None = None) -> Markup:
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
    drawn = [_grid(x(tick), bottom, shown) for tick, shown in log_ticks(low, high)]
    if reference is not None:
        drawn.append(el("line", x1=px(x(reference)), x2=px(x(reference)), y1=4, y2=bottom, class_="reference"))
    for number, row in enumerate(rows):
        drawn.append(_dot_row(row, x, _ROW * number + 20, reference))
    return svg(drawn, height, title)


def curves(lines: Sequence[Curve], *, title: str, height: int = 230) -> Markup:
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

    drawn: list[Markup] = []
    for tick in ticks(low, high, 5):
        drawn.append(el("line", x1=left, x2=right, y1=px(y(tick)), y2=px(y(tick)), class_="grid"))
        drawn.append(el("text", f"{tick:.4g}", x=left - 8, y=px(y(tick) + 4), text_anchor="end", class_="axis"))
    for tick in ticks(first, last, 6):
        drawn.append(el("text", f"{tick:,.0f}", x=px(x(tick)), y=bottom + 20, text_anchor="middle", class_="axis"))
    drawn.append(el("text", "step", x=left - 8, y=bottom + 20, text_anchor="end", class_="axis"))
    for line in lines:
        shown = " ".join(f"{px(x(step))},{px(y(value))}" for step, value in line.points)
        drawn.append(el("polyline", points=shown, class_=line.css))
        if len(line.points) <= 40:
            drawn += [el("circle", cx=px(x(s)), cy=px(y(v)), r=2.4, class_=f"{line.css} mark") for s, v in line.points]
    return svg(drawn, height, title)


def smooth(points: Sequence[tuple[float, float]], *, share: float = 0.05) -> tuple[tuple[float, float], ...]:
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


def _grid(x: float, bottom: float, shown: str) -> Markup:
    return join(
        el("line", x1=px(x), x2=px(x), y1=4, y2=px(bottom), class_="grid"),
        el("text", shown, x=px(x), y=px(bottom + 18), text_anchor="middle", class_="axis"),
    )


def _dot_row(row: Dot, x: Callable[[float], float], y: float, reference: float | None) -> Markup:
    """The row's label, a thin line from the reference to the mean, a dot per seed, the mean and its text."""
    mean = x(math.fsum(row.values) / len(row.values))
    drawn = [el("text", row.label, x=_LABELS - 14, y=px(y + 4), text_anchor="end", class_="label")]
    if reference is not None:
        drawn.append(el("line", x1=px(x(reference)), x2=px(mean), y1=px(y), y2=px(y), class_=f"stem {row.css}"))
    if len(row.values) > 1:
        drawn += [el("circle", cx=px(x(value)), cy=px(y), r=3, class_=f"seed {row.css}") for value in row.values]
    drawn.append(el("circle", cx=px(mean), cy=px(y), r=6, class_=f"dot {row.css}"))
    drawn.append(el("text", row.shown, x=WIDTH - 4, y=px(y + 4), text_anchor="end", class_="value"))
    return join(*drawn)


def svg(drawn: Sequence[Markup], height: int, title: str) -> Markup:
    """Return the drawing as one element that scales with the page and is told by its title."""
    return el(
        "svg", el("title", title), *drawn, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title, class_="chart"
    )


def px(value: float) -> str:
    """Return a coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")
