"""The privacy report's charts as inline SVG, in the look of the run's page: colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offsite.report.charts import WIDTH, Curve, px, svg, ticks
from offsite.report.markup import Markup, el, join

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


def roc(lines: Sequence[Curve], *, title: str, floor: float, limit: tuple[float, float] | None) -> Markup:
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
    drawn = [_across(axes, rate, shown) for rate, shown in rates] + [_up(axes, rate, shown) for rate, shown in rates]
    drawn.append(_titles("false alarms", "hits", axes))
    drawn.append(_path([(floor, floor), (1, 1)], axes, "chance"))
    if floor < 0.01:
        mark = px(axes.x(0.01))
        drawn.append(el("line", x1=mark, x2=mark, y1=4, y2=axes.bottom, class_="reference"))
    if limit is not None:
        x, y = axes.x(limit[0]), axes.y(limit[1])
        drawn.append(el("path", d=f"M{px(x - 5)} {px(y)}H{px(x + 5)}M{px(x)} {px(y - 5)}V{px(y + 5)}", class_="limit"))
        drawn.append(el("text", f"limit {limit[1]:.0%}", x=px(x - 9), y=px(y - 6), text_anchor="end", class_="axis"))
    drawn += [_path(line.points, axes, f"line {line.css}") for line in lines]
    return svg(drawn, height, title)


def exposure(after: Sequence[float], before: Sequence[float], *, most: float, title: str) -> Markup:
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
    drawn = [_across(axes, bits, f"{bits:g}") for bits in ticks(0, highest, 5)]
    drawn.append(_titles("secrets, most exposed first", "bits", axes))
    drawn.append(_level(axes, most, f"most there could be: {most:.1f}", _LEFT + 8))
    stems = len(after) <= MOST_STEMS and len(before) in (0, len(after))
    order = sorted(range(len(after)), key=lambda number: (-after[number], number))
    first = [before[number] for number in order] if stems and before else sorted(before, reverse=True)
    if stems:
        for place, number in enumerate(order):
            x, top = px(axes.x(place)), px(axes.y(after[number]))
            from_ = px(axes.y(before[number] if before else 0.0))
            drawn.append(el("line", x1=x, x2=x, y1=from_, y2=top, class_="stem client"))
        drawn += [el("circle", cx=px(axes.x(n)), cy=px(axes.y(b)), r=4, class_="hollow") for n, b in enumerate(first)]
        drawn += [
            el("circle", cx=px(axes.x(place)), cy=px(axes.y(after[number])), r=4.5, class_="dot client")
            for place, number in enumerate(order)
        ]
    else:
        drawn.append(_path(list(enumerate(first)), axes, "line before"))
        drawn.append(_path([(place, after[number]) for place, number in enumerate(order)], axes, "line s2"))
    return svg(drawn, height, title)


def spent(points: Sequence[tuple[float, float]], *, claimed: float, budget: float, total: float, title: str) -> Markup:
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
    drawn = [_across(axes, value, f"{value:g}") for value in ticks(0, highest, 5)]
    drawn += [_up(axes, step, f"{step:,.0f}") for step in ticks(0, last, 6)]
    drawn.append(_titles("steps", "epsilon", axes))
    levels: dict[float, list[str]] = {}
    for value, name in ((claimed, "claimed"), (total, "all runs"), (budget, "budget")):
        levels.setdefault(round(value, 3), []).append(name)
    for place, (value, names) in enumerate(levels.items()):  # beside each other: two may lie close
        drawn.append(_level(axes, value, f"{', '.join(names)} {value:.2f}", _LEFT + 8 + 210 * place))
    drawn.append(_path([(0.0, 0.0), *points], axes, "line s1"))
    drawn += [el("circle", cx=px(axes.x(s)), cy=px(axes.y(v)), r=3, class_="dot owner") for s, v in points]
    return svg(drawn, height, title)


def recovery(lines: Sequence[Curve], *, title: str, limit: float | None) -> Markup:
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
    drawn = [_across(axes, share, f"{share:g}") for share in ticks(low, high, 5)]
    if start > _LEFT:
        drawn.append(_up(axes, 0, "0"))
    marks = [10.0**power for power in range(math.ceil(least - 1e-9), math.floor(most + 1e-9) + 1)] or [min(tokens)]
    drawn += [_up(axes, num, _short(num)) for num in marks]
    drawn.append(_titles("tokens", "share regained", axes))
    if limit is not None:
        drawn.append(_level(axes, limit, f"limit {limit:.2f}", _LEFT + 8))
    for line in lines:
        drawn.append(_path(line.points, axes, f"line {line.css}"))
        drawn += [
            el("circle", cx=px(axes.x(n)), cy=px(axes.y(share)), r=3, class_=f"mark {line.css}")
            for n, share in line.points
        ]
    return svg(drawn, height, title)


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], *, title: str, limit: float | None) -> Markup:
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
    drawn = [_up(axes, share, f"{share:g}") for share in ticks(low, high, 5)]
    zero = px(axes.x(0))
    drawn.append(el("line", x1=zero, x2=zero, y1=4, y2=axes.bottom, class_="axis-line"))
    if limit is not None:
        mark = px(axes.x(limit))
        drawn.append(el("line", x1=mark, x2=mark, y1=4, y2=axes.bottom, class_="reference"))
    top = 4.0
    for name, group in groups:
        drawn.append(el("text", name, x=4, y=px(top + 14), class_="label strong halo"))
        top += 20
        for bar in group:
            drawn.append(_bar(bar, axes, top, left))
            top += _BAR + _GAP
        top += _GROUP
    return svg(drawn, height, title)


def _bar(bar: Bar, axes: _Axes, top: float, left: float) -> Markup:
    from_, to = sorted((axes.x(0), axes.x(bar.share)))
    middle = px(top + _BAR / 2 + 4.5)
    return join(
        el("text", bar.label, x=left - 12, y=middle, text_anchor="end", class_="label"),
        el("rect", x=px(from_), y=px(top), width=px(max(to - from_, 1.5)), height=_BAR, rx=2, class_=f"bar {bar.css}"),
        el("text", bar.shown, x=WIDTH - 4, y=middle, text_anchor="end", class_="value"),
    )


def _path(points: Sequence[tuple[float, float]], axes: _Axes, css: str) -> Markup:
    return el("polyline", points=" ".join(f"{px(axes.x(x))},{px(axes.y(y))}" for x, y in points), class_=css)


def _across(axes: _Axes, value: float, shown: str) -> Markup:
    y = axes.y(value)
    return join(
        el("line", x1=_LEFT, x2=_RIGHT, y1=px(y), y2=px(y), class_="grid"),
        el("text", shown, x=_LEFT - 8, y=px(y + 4), text_anchor="end", class_="axis"),
    )


def _up(axes: _Axes, value: float, shown: str) -> Markup:
    x = px(axes.x(value))
    return join(
        el("line", x1=x, x2=x, y1=4, y2=px(axes.bottom), class_="grid"),
        el("text", shown, x=x, y=px(axes.bottom + 18), text_anchor="middle", class_="axis"),
    )


def _titles(across: str, up: str, axes: _Axes) -> Markup:
    return join(
        el("text", across, x=_RIGHT, y=px(axes.bottom + 36), text_anchor="end", class_="axis"),
        el("text", up, x=4, y=_TOP - 20, class_="axis halo"),
    )


def _level(axes: _Axes, value: float, shown: str, x: float) -> Markup:
    y = axes.y(value)
    return join(
        el("line", x1=_LEFT, x2=_RIGHT, y1=px(y), y2=px(y), class_="reference"),
        el("text", shown, x=px(x), y=px(y - 5), class_="axis halo"),
    )


def _short(num: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if num >= unit:
            return f"{num / unit:g} {name}"
    return f"{num:g}"
