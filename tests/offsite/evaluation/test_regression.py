"""Figures of values against hand-worked ones, and intervals against the tables they approximate."""

from __future__ import annotations

import math
import random

import pytest

from offsite.evaluation.regression import interval, pearson, ranks, regression_figures


def test_figures_of_three_rows_by_hand():
    found = regression_figures([1.0, 2.0, 4.0], [1.0, 4.0, 2.0])
    assert found["rmse"] == pytest.approx(math.sqrt(8 / 3))
    # means 7/3 and 7/3; covariance sum 1/3, both variance sums 14/3
    assert found["pearson"] == pytest.approx((-4 / 3 * -4 / 3 + -1 / 3 * 5 / 3 + 5 / 3 * -1 / 3) / (42 / 9))
    assert found["spearman"] == pytest.approx(0.5)


def test_equal_values_share_the_mean_of_their_ranks():
    assert ranks([3.0, 1.0, 3.0, 2.0, 3.0]) == [4.0, 1.0, 4.0, 2.0, 4.0]
    assert pearson([1.0, 1.0], [0.0, 5.0]) == 0.0
    assert pearson([1e8, 1e8 + 1, 1e8 + 2], [1.0, 2.0, 3.0]) == pytest.approx(1.0)


def test_they_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    one = [draw.randint(0, 9) / 3 for _ in range(60)]
    other = [value + draw.gauss(0, 2) for value in one]
    found = regression_figures(one, other)
    assert found["pearson"] == pytest.approx(stats.pearsonr(one, other).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(one, other).statistic)
    low, high = interval("pearson", found["pearson"], 60)
    assert (low, high) == pytest.approx(tuple(stats.pearsonr(one, other).confidence_interval()), abs=1e-6)
    for num in (10, 50):
        low, high = interval("rmse", 2.0, num)
        assert low == pytest.approx(2 * math.sqrt(num / stats.chi2.ppf(0.975, num)), rel=2e-3)
        assert high == pytest.approx(2 * math.sqrt(num / stats.chi2.ppf(0.025, num)), rel=1e-2)


def test_intervals_where_nothing_is_known():
    assert interval("spearman", 0.4, 3) == (-1.0, 1.0)
    assert interval("pearson", 1.0, 9) == (1.0, 1.0)
    assert interval("rmse", 1.0, 1)[1] > 10
