"""The change of a paired share against the worked example of its source, against counting, and at its ends."""

from __future__ import annotations

import random

import pytest

from offsite.evaluation.preferences import wilson
from offsite.safety.shares import change


def pairs(both, gained, lost, neither):
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    after = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return before, after


def test_the_interval_of_the_source():
    """Newcombe (1998), table III: 20, 12, 2 and 16 of 50; method 10 has 0.0562 to 0.3292."""
    found = change(*pairs(20, 12, 2, 16))
    assert (found.difference, found.num_gained, found.num_lost) == (pytest.approx(0.2), 12, 2)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0562, 0.3292)


def test_turned_round_it_is_the_same_with_the_other_sign():
    one, other = change(*pairs(7, 3, 5, 45)), change(*pairs(7, 5, 3, 45))
    assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (60, 60), (60, 0), (0, 60)])
def test_where_all_or_none_are_refused(before, after):
    found = change([True] * before + [False] * (60 - before), [True] * after + [False] * (60 - after))
    assert found.difference == (after - before) / 60
    assert -1 <= found.low <= found.difference <= found.high <= 1
    assert found.high - found.low > wilson(0.0, 60)[1] / 2


def test_it_holds_the_true_change_about_as_often_as_it_says():
    draw = random.Random(0)
    shares, num_held = (0.5, 0.05, 0.2, 0.25), 0
    for _ in range(400):
        drawn = draw.choices(range(4), shares, k=60)
        found = change(*pairs(*(drawn.count(kind) for kind in range(4))))
        num_held += found.low <= shares[1] - shares[2] <= found.high
    assert 0.91 <= num_held / 400 <= 0.99
