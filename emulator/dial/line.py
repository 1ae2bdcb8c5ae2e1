"""The arithmetic of the dial: a straight line by least squares, and broken lines that never turn.

Nothing here goes beyond the numbers it was given: outside of them there is no value.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Pair = tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """recovery = a - b x, x being nats withheld after tuning; `residual` is the largest distance of a point from it."""

    a: float
    b: float
    residual: float

    def at(self, x: float) -> float:
        """Return the recovery on the line."""
        return self.a - self.b * x


def fit(points: Sequence[Pair]) -> Fit:
    """Return the line of least squares through (x, recovery).

    Raises:
        ValueError: when fewer than two points differ in x.
    """
    num = len(points)
    x_mean, y_mean = (math.fsum(values) / num for values in zip(*points, strict=True)) if num else (0.0, 0.0)
    spread = math.fsum((x - x_mean) ** 2 for x, _ in points)
    if spread <= 0:
        raise ValueError("a line needs two points that differ in what they withhold")
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    a, b = y_mean - slope * x_mean, -slope
    return Fit(a, b, max(abs(y - (a - b * x)) for x, y in points))


def monotone(points: Sequence[Pair], *, rising: bool) -> list[Pair]:
    """Return the points by x with y replaced by the nearest values, in least squares, that never fall (or never rise).

    Neighbours that are in the wrong order are put together and take their mean (pool adjacent violators); points of
    one x take theirs first.
    """
    by_x: dict[float, list[float]] = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y if rising else -y)
    pools: list[tuple[list[float], list[float]]] = []
    for x in sorted(by_x):
        pools.append(([x], by_x[x]))
        while len(pools) > 1 and _mean(pools[-2][1]) > _mean(pools[-1][1]):
            (one, two), (three, four) = pools[-2:]
            pools[-2:] = [(one + three, two + four)]
    sign = 1.0 if rising else -1.0
    return [(x, sign * _mean(values)) for xs, values in pools for x in xs]


def turned(points: Sequence[Pair], *, rising: bool) -> bool:
    """Tell whether the points are in another order than they are made to be."""
    return any((b < a) if rising else (b > a) for (_, a), (_, b) in pairwise(sorted(points)))


def interpolate(points: Sequence[Pair], x: float) -> float:
    """Return y at `x` on the broken line through the points, which are ascending in x.

    Raises:
        ValueError: when `x` lies outside of them.
    """
    xs = [point[0] for point in points]
    if not xs or not xs[0] <= x <= xs[-1]:
        raise ValueError(f"{x:g} lies outside of what was measured")
    place = min(bisect_right(xs, x), len(xs) - 1)
    if len(xs) == 1:
        return points[0][1]
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
