"""How near a head's values come to the true ones: root mean squared error, and correlation of values and of ranks.

A model whose head was never trained knows nothing of a text: the best that can be said without one is the same value
of every text, and the best such is the mean of the rows measured. So its error is their standard deviation. Where all
that is said, or all that is true, is one value, a correlation has no definition; it is 0 here, as there is none.

Shapes: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_DEVIATIONS = 1.959964  # 95 %


def regression_figures(said: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Return ``rmse``, ``spearman`` and ``pearson`` of what was said of N rows, one at least.

    Raises:
        ValueError: when they are not as many.
    """
    squares = [(one - value) ** 2 for one, value in zip(said, values, strict=True)]
    return {
        "rmse": math.sqrt(math.fsum(squares) / len(squares)),
        "spearman": pearson(ranks(said), ranks(values)),
        "pearson": pearson(said, values),
    }


def pearson(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of two rows of numbers, from -1 to 1; 0 where all of either are equal."""
    if max(one) == min(one) or max(other) == min(other):
        return 0.0
    a, b = _centred(one), _centred(other)
    found = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return max(-1.0, min(1.0, found / (math.hypot(*a) * math.hypot(*b))))


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of every value, the smallest being 1; equal ones share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            found[place] = (start + end) / 2 + 1
        start = end + 1
    return found


def interval(metric: str, value: float, num: int) -> tuple[float, float]:
    """Return the 95 % interval of a figure of `regression_figures`, measured on `num` rows.

    Of a correlation by Fisher's transformation, of ranks with Bonett and Wright's variance. Of the error by the
    chi-squared distribution, as Wilson and Hilferty approximate its quantiles: errors are then normal around 0.

    Sources: Fisher (1921), On the probable error of a coefficient of correlation; Bonett and Wright (2000), Sample size
    requirements for estimating Pearson, Kendall and Spearman correlations; Wilson and Hilferty (1931), The distribution
    of chi-square.
    """
    if metric == "rmse":
        low, high = (_chi_squared(num, deviations) for deviations in (-_DEVIATIONS, _DEVIATIONS))
        return value * math.sqrt(num / high), math.inf if low <= 0 else value * math.sqrt(num / low)
    if num <= 3:
        return -1.0, 1.0
    if abs(value) >= 1:
        return value, value
    spread = 1 + value**2 / 2 if metric == "spearman" else 1.0
    reach = _DEVIATIONS * math.sqrt(spread / (num - 3))
    middle = math.atanh(value)
    return math.tanh(middle - reach), math.tanh(middle + reach)


def _centred(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def _chi_squared(num: int, deviations: float) -> float:
    """Return about that quantile of the chi-squared distribution of `num` degrees of freedom."""
    return float(num * (1 - 2 / (9 * num) + deviations * math.sqrt(2 / (9 * num))) ** 3)
