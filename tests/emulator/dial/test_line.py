"""A line by least squares and broken lines, against numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.dial.line import fit, interpolate, monotone, turned

PROTOTYPES = [  # (emulator tuned, recovery) of six narrowed emulators, full model at 13.11: the line
    *((24.5, 0.59), (19.4, 0.68), (15.5, 0.76), (26.1, 0.56), (25.3, 0.60), (18.7, 0.70)),
]


def test_three_points_by_hand():
    """Means 1 and 2; slope (-1 * 1 + 0 + 1 * -2) / 2 = -1.5; a = 2 + 1.5 = 3.5; residuals .5, -1, .5 about it."""
    found = fit([(0.0, 3.0), (1.0, 3.0), (2.0, 0.0)])
    assert (found.a, found.b) == pytest.approx((3.5, 1.5))
    assert found.residual == pytest.approx(1.0)
    assert found.at(2.0) == pytest.approx(0.5)


def test_the_prototypes_line_is_found_again():
    found = fit([(math.log(tuned / 13.11), recovery) for tuned, recovery in PROTOTYPES])
    assert found.a == pytest.approx(0.82, abs=0.005)
    assert found.b == pytest.approx(0.36, abs=0.01)
    assert found.residual < 0.02


@given(st.floats(-2, 2), st.floats(-2, 2), st.sets(st.integers(-50, 50), min_size=2, max_size=8))
def test_points_on_a_line_give_it_back(a, b, places):
    found = fit([(place / 10, a - b * place / 10) for place in places])
    assert (found.a, found.b) == pytest.approx((a, b), abs=1e-9)
    assert found.residual < 1e-9


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)]])
def test_one_place_is_no_line(points):
    with pytest.raises(ValueError, match="two points that differ"):
        fit(points)


def test_neighbours_out_of_order_take_their_mean():
    """3, 1, 2 by hand: 3 and 1 make 2 and 2, then 2 is in order; falling, 1, 3, 2 makes 2, 2, 2."""
    assert monotone([(0, 3.0), (1, 1.0), (2, 2.0)], rising=True) == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert monotone([(0, 1.0), (1, 3.0), (2, 2.0)], rising=False) == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert monotone([(0, 5.0), (1, 3.0), (2, 4.0), (3, 1.0)], rising=False) == [(0, 5.0), (1, 3.5), (2, 3.5), (3, 1.0)]
    assert turned([(0, 5.0), (1, 3.0), (2, 4.0)], rising=False)
    assert not turned([(1, 3.0), (0, 5.0)], rising=False)


def test_two_of_one_place_take_their_mean():
    assert monotone([(1, 4.0), (0, 0.0), (1, 2.0)], rising=True) == [(0, 0.0), (1, 3.0)]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12))
def test_what_never_turns_is_in_order_and_keeps_the_mean(values):
    found = monotone(list(enumerate(values)), rising=True)
    assert not turned(found, rising=True) or max(b - a for (_, b), (_, a) in pairwise(found)) < 1e-9
    assert math.fsum(y for _, y in found) == pytest.approx(math.fsum(values), abs=1e-6)


def test_between_two_points_by_hand_and_never_beyond():
    points = [(0.2, 10.0), (0.4, 6.0), (1.0, 0.0)]
    assert interpolate(points, 0.3) == pytest.approx(8.0)
    assert interpolate(points, 0.85) == pytest.approx(1.5)
    assert [interpolate(points, x) for x, _ in points] == pytest.approx([10.0, 6.0, 0.0])
    for outside in (0.19, 1.01):
        with pytest.raises(ValueError, match="outside of what was measured"):
            interpolate(points, outside)
