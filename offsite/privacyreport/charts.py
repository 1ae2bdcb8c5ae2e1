"""The privacy report's charts, in the look of the run's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offsite.report.charts import Curve, ticks
from offsite.report.drawing import WIDTH, Circle, Cross, Drawing, Line, Point, Polyline, Rectangle, Shape, Text

_LEFT, _RIGHT, _TOP, _BELOW = 58, WIDTH - 16, 34, 44
MOST_STEMS = 48
"""So many secrets are drawn one by one; more of them as curves."""

_BAR, _GAP, _GROUP = 15, 4, 18


@dataclass(frozen=True)
class Bar:
    """One bar of a group: its share on the axis, the figure it stands for, and the CSS class that colours it."""

    label: str
    share: float
    shown: str
    css: str


@dataclass(frozen=True)
class _Axes:
    """Where a chart's figures lie on the drawing."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    bottom: float


def roc(lines: Sequence[Curve], *, title: str, floor: float, limit: tuple[float, float] | None) -> Drawing:
    """Return hits against false alarms, both on logarithmic axes from `floor` to 1; chance is the diagonal.

    Args:
        floor: the smallest rate drawn, a power of ten below 0.1; smaller ones lie on the edge.
        limit: (false alarms, hits) that are the most a gate lets pass, drawn as a small cross.
    """
    height, decades = 350, round(-math.log10(floor))
    axes = _Axes(
        lambda rate: _RIGHT + math.log10(max(rate, floor)) / decades * (_RIGHT - _LEFT),
        lambda rate: _TOP - math.log10(max(rate, floor)) / decades * (height - _BELOW - _TOP),
        height - _BELOW,
    )
    rates = [(10.0**-power, f"{100 * 10.0**-power:g}%") for power in range(decades, -1, -1)]
    drawn = [shape for rate, shown in rates for shape in _across(axes, rate, shown)]
    drawn += [shape for rate, shown in rates for shape in _up(axes, rate, shown)]
    drawn += _titles("false alarms", "hits", axes)
    drawn.append(_path([(floor, floor), (1, 1)], axes, "chance"))
    if floor < 0.01:
        drawn.append(Line.down(axes.x(0.01), 4, axes.bottom, "reference"))
    if limit is not None:
        x, y = axes.x(limit[0]), axes.y(limit[1])
        drawn.append(Cross(x, y, 5, "limit"))
        drawn.append(Text(f"limit {limit[1]:.0%}", x - 9, y - 6, "axis", "end"))
    drawn += [_path(line.points, axes, f"line {line.css}") for line in lines]
    return Drawing(title, height, tuple(drawn))


def exposure(after: Sequence[float], before: Sequence[float], *, most: float, title: str) -> Drawing:
    """Return the bits of each secret in the order of `after`, with those before tuning, under the most there could be.

    A few secrets are stems from before to after; many are two curves, each in its own order.
    """
    after, before = [max(0.0, bits) for bits in after], [max(0.0, bits) for bits in before]
    height, highest = 260, max([most, *after, *before]) * 1.12 or 1.0
    num = max(len(after), len(before), 1)
    axes = _Axes(
        lambda place: _LEFT + 14 + place / max(num - 1, 1) * (_RIGHT - _LEFT - 28),
        lambda bits: height - _BELOW - bits / highest * (height - _BELOW - _TOP),
        height - _BELOW,
    )
    drawn = [shape for bits in ticks(0, highest, 5) for shape in _across(axes, bits, f"{bits:g}")]
    drawn += _titles("secrets, most exposed first", "bits", axes)
    drawn += _level(axes, most, f"most there could be: {most:.1f}", _LEFT + 8)
    stems = len(after) <= MOST_STEMS and len(before) in (0, len(after))
    order = sorted(range(len(after)), key=lambda number: (-after[number], number))
    first = [before[number] for number in order] if stems and before else sorted(before, reverse=True)
    if stems:
        for place, number in enumerate(order):
            from_ = axes.y(before[number] if before else 0.0)
            drawn.append(Line.down(axes.x(place), from_, axes.y(after[number]), "stem client"))
        drawn += [Circle(axes.x(place), axes.y(bits), 4, "hollow") for place, bits in enumerate(first)]
        drawn += [Circle(axes.x(place), axes.y(after[number]), 4.5, "dot client") for place, number in enumerate(order)]
    else:
        drawn.append(_path(list(enumerate(first)), axes, "line before"))
        drawn.append(_path([(place, after[number]) for place, number in enumerate(order)], axes, "line s2"))
    return Drawing(title, height, tuple(drawn))


def spent(points: Sequence[Point], *, claimed: float, budget: float, total: float, title: str) -> Drawing:
    """Return epsilon over steps, against what is claimed, what all runs spent and what they may."""
    height, highest, last = (
        270,
        max([claimed, budget, total, *(value for _, value in points)]) * 1.14 or 1.0,
        points[-1][0],
    )
    axes = _Axes(
        lambda step: _LEFT + step / last * (_RIGHT - _LEFT),
        lambda value: height - _BELOW - value / highest * (height - _BELOW - _TOP),
        height - _BELOW,
    )
    drawn = [shape for value in ticks(0, highest, 5) for shape in _across(axes, value, f"{value:g}")]
    drawn += [shape for step in ticks(0, last, 6) for shape in _up(axes, step, f"{step:,.0f}")]
    drawn += _titles("steps", "epsilon", axes)
    levels: dict[float, list[str]] = {}
    for value, name in ((claimed, "claimed"), (total, "all runs"), (budget, "budget")):
        levels.setdefault(round(value, 3), []).append(name)
    for place, (value, names) in enumerate(levels.items()):  # beside each other: two may lie close
        drawn += _level(axes, value, f"{', '.join(names)} {value:.2f}", _LEFT + 8 + 210 * place)
    drawn.append(_path([(0.0, 0.0), *points], axes, "line s1"))
    drawn += [Circle(axes.x(step), axes.y(value), 3, "dot owner") for step, value in points]
    return Drawing(title, height, tuple(drawn))


def recovery(lines: Sequence[Curve], *, title: str, limit: float | None) -> Drawing:
    """Return the share of lost capability regained against tokens, on a logarithmic axis with none at its left end."""
    height = 290
    tokens = [num for line in lines for num, _ in line.points if num > 0] or [1.0]
    shares = [share for line in lines for _, share in line.points] + ([] if limit is None else [limit])
    low, high = min(0.0, *shares), max(1.0, *shares) * 1.06
    least, most = math.log10(min(tokens)), math.log10(max(tokens))
    start, span = (_LEFT + 46 if any(n <= 0 for line in lines for n, _ in line.points) else _LEFT), most - least or 1.0
    axes = _Axes(
        lambda num: start + (math.log10(num) - least) / span * (_RIGHT - start) if num > 0 else float(_LEFT),
        lambda share: height - _BELOW - (share - low) / (high - low) * (height - _BELOW - _TOP),
        height - _BELOW,
    )
    drawn = [shape for share in ticks(low, high, 5) for shape in _across(axes, share, f"{share:g}")]
    if start > _LEFT:
        drawn += _up(axes, 0, "0")
    marks = [10.0**power for power in range(math.ceil(least - 1e-9), math.floor(most + 1e-9) + 1)] or [min(tokens)]
    drawn += [shape for num in marks for shape in _up(axes, num, _short(num))]
    drawn += _titles("tokens", "share regained", axes)
    if limit is not None:
        drawn += _level(axes, limit, f"limit {limit:.2f}", _LEFT + 8)
    for line in lines:
        drawn.append(_path(line.points, axes, f"line {line.css}"))
        drawn += [Circle(axes.x(num), axes.y(share), 3, f"mark {line.css}") for num, share in line.points]
    return Drawing(title, height, tuple(drawn))


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], *, title: str, limit: float | None) -> Drawing:
    """Return groups of bars from 0 (chance) to 1 (the full model), the figures at their right."""
    shares = [bar.share for _, group in groups for bar in group] + ([] if limit is None else [limit])
    low, high = min(0.0, *shares), max(1.0, *shares)
    height = sum((_BAR + _GAP) * len(group) + _GROUP + 20 for _, group in groups) + 34
    left, right = 152, WIDTH - 92
    axes = _Axes(
        lambda share: left + (share - low) / (high - low) * (right - left),
        lambda place: place,
        height - 26,
    )
    drawn = [shape for share in ticks(low, high, 5) for shape in _up(axes, share, f"{share:g}")]
    drawn.append(Line.down(axes.x(0), 4, axes.bottom, "axis-line"))
    if limit is not None:
        drawn.append(Line.down(axes.x(limit), 4, axes.bottom, "reference"))
    top = 4.0
    for name, group in groups:
        drawn.append(Text(name, 4, top + 14, "label strong halo"))
        top += 20
        for bar in group:
            drawn += _bar(bar, axes, top, left)
            top += _BAR + _GAP
        top += _GROUP
    return Drawing(title, height, tuple(drawn))


def _bar(bar: Bar, axes: _Axes, top: float, left: float) -> list[Shape]:
    from_, to = sorted((axes.x(0), axes.x(bar.share)))
    middle = top + _BAR / 2 + 4.5
    return [
        Text(bar.label, left - 12, middle, "label", "end"),
        Rectangle(from_, top, max(to - from_, 1.5), _BAR, f"bar {bar.css}"),
        Text(bar.shown, WIDTH - 4, middle, "value", "end"),
    ]


def _path(points: Sequence[Point], axes: _Axes, css: str) -> Polyline:
    return Polyline(tuple((axes.x(x), axes.y(y)) for x, y in points), css)


def _across(axes: _Axes, value: float, shown: str) -> list[Shape]:
    y = axes.y(value)
    return [Line.across(_LEFT, _RIGHT, y, "grid"), Text(shown, _LEFT - 8, y + 4, "axis", "end")]


def _up(axes: _Axes, value: float, shown: str) -> list[Shape]:
    x = axes.x(value)
    return [Line.down(x, 4, axes.bottom, "grid"), Text(shown, x, axes.bottom + 18, "axis", "middle")]


def _titles(across: str, up: str, axes: _Axes) -> list[Shape]:
    return [Text(across, _RIGHT, axes.bottom + 36, "axis", "end"), Text(up, 4, _TOP - 20, "axis halo")]


def _level(axes: _Axes, value: float, shown: str, x: float) -> list[Shape]:
    y = axes.y(value)
    return [Line.across(_LEFT, _RIGHT, y, "reference"), Text(shown, x, y - 5, "axis halo")]


def _short(num: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if num >= unit:
            return f"{num / unit:g} {name}"
    return f"{num:g}"
