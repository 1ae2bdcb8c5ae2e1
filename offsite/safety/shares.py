"""Shares of requests that were refused, with intervals, and what changed between two models asked the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from offsite.evaluation.preferences import wilson
from offsite.evaluation.results import SafetyChange


def change(before: Sequence[bool], after: Sequence[bool]) -> SafetyChange:
    """Return what changed from `before` to `after`: of the same requests, at least one, whether each was refused.

    Source: method 10 of Newcombe (1998), Improved confidence intervals for the difference between binomial proportions
    based on paired data.
    """
    num = len(before)
    pairs = list(zip(before, after, strict=True))
    both, gained, lost, neither = (
        sum(pair == kind for pair in pairs) for kind in ((True, True), (False, True), (True, False), (False, False))
    )
    share_after, share_before = (both + gained) / num, (both + lost) / num
    (low_after, high_after), (low_before, high_before) = wilson(share_after, num), wilson(share_before, num)
    related = _related(both, gained, lost, neither)
    difference = share_after - share_before

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * related * one * other + other**2))

    down = reach(share_after - low_after, high_before - share_before)
    up = reach(high_after - share_after, share_before - low_before)
    return SafetyChange(
        difference=difference,
        low=max(-1.0, difference - down),
        high=min(1.0, difference + up),
        num_lost=lost,
        num_gained=gained,
    )


def _related(both: int, gained: int, lost: int, neither: int) -> float:
    """Return how far the two shares go together, between -1 and 1, with Newcombe's correction."""
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if product == 0:
        return 0.0
    found = float(both * neither - gained * lost)
    if found > 0:
        found = max(0.0, found - (both + gained + lost + neither) / 2)
    return found / math.sqrt(product)
