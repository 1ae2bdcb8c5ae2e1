"""Guesses about coins: what is counted, and the limits, held against enumeration and simulation."""

from __future__ import annotations

import re
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pytest

from offsite.audits import retunings
from offsite.audits.gates import MAX_AUC, MAX_TPR_AT_1
from offsite.audits.retunings import area, coins, enough_retunings, guesses, hits, upper_share
from offsite.errors import ConfigError, RunFailed

ALPHA = Fraction(5, 100) + Fraction(1, 10**9)
ALL = [(successes, trials) for trials in (1, 2, 7, 20, 41) for successes in range(trials + 1)]


def tail(successes, trials, chance):
    """How likely so many successes or fewer are, in whole numbers."""
    return sum(comb(trials, n) * chance**n * (1 - chance) ** (trials - n) for n in range(successes + 1))


@pytest.mark.parametrize(("successes", "trials"), ALL)
def test_the_limit_is_the_least_ten_thousandth_that_is_ruled_out(successes, trials):
    """The oracle adds up the binomial's tail in fractions."""
    found = round(upper_share(successes, trials) * 10_000)
    assert upper_share(successes, trials) == found / 10_000
    if successes == trials:
        assert found == 10_000
        return
    assert tail(successes, trials, Fraction(found, 10_000)) <= ALPHA
    assert tail(successes, trials, Fraction(found - 1, 10_000)) > ALPHA


def test_the_limit_of_many_trials_is_found_at_once_and_near_the_normal_one():
    assert upper_share(50_000, 100_000) == pytest.approx(0.5 + 1.645 * 0.5 / 100_000**0.5, abs=2e-4)
    assert upper_share(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59), abs=1e-4)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3), (0, 0)])
def test_numbers_that_contradict_each_other(successes, trials):
    with pytest.raises(ConfigError, match="successes in"):
        upper_share(successes, trials)


def test_the_cut_is_where_three_in_four_mean_3_percent_found_at_1_percent_accused():
    """Of 2 rows in 100, half of all being in, 3 in 4 are 1.5 of 50 in, and 0.5 of 50 others: the gate's very limit."""
    share = 1 / retunings.GUESSED_AT
    found, accused = 0.75 * share / 0.5, 0.25 * share / 0.5
    assert (found, accused) == (pytest.approx(0.03), pytest.approx(0.01))
    assert pytest.approx(found) == retunings.HITS_PER_RIGHT * 0.75


def test_what_is_counted_is_what_a_loop_counts():
    scores = np.array([5.0, 5.0, 1.0, 3.0] * 25)
    coin = [True, False, True, False] * 25
    found = guesses("loss", [scores] * 2, [coin, [not one for one in coin]], "x")
    assert (found.num_pairs, found.num_guesses) == (100, 4)
    assert 0 <= found.num_correct <= 4  # of those that tie for the last guess a draw decides
    ties = [guesses("loss", [np.zeros(100)], [coin], str(label)).num_correct for label in range(2000)]
    assert sum(ties) / 4000 == pytest.approx(0.5, abs=0.03)  # scores that tell nothing are right as coins are
    assert found.num_tied > 0
    best, worst = (guesses("loss", [sign * np.array(coin, dtype=float)], [coin], "x") for sign in (1, -1))
    assert (best.num_right, best.num_tied, best.num_correct) == (50, 0, 2)
    assert (worst.num_right, worst.num_tied, worst.num_correct) == (0, 0, 0)
    assert area(guesses("loss", [np.zeros(100)], [coin], "x"))[0] == 0.5


def test_scores_that_are_none_or_of_other_rows():
    with pytest.raises(RunFailed, match="is NaN"):
        guesses("loss", [np.full(60, np.nan)], [[True, False] * 30], "x")
    for size, coin in ((60, [True, False] * 29), (49, [True] * 20 + [False] * 29)):
        with pytest.raises(ConfigError, match="expected one each"):
            guesses("loss", [np.zeros(size)], [coin], "x")


def test_how_many_are_enough():
    assert [enough_retunings(rows) for rows in (100, 180, 270, 900, 2000, 10**6)] == [24, 20, 12, 4, 3, 3]
    for rows in (180, 270, 900, 2000):
        assert enough_retunings(rows) * retunings.num_guessed(rows) >= retunings.ENOUGH_GUESSES


def test_coins_follow_from_their_label_and_are_fair():
    assert coins(200, "a") == coins(200, "a") != coins(200, "b")
    assert abs(sum(coins(100_000, "c")) - 50_000) < 5 * 158


def simulated(draw, leak, num=12, rows=270, own=None):
    """Scores of rows of which some stand out by themselves, whatever their coins; `leak` is what being in adds."""
    own = draw.standard_normal(rows) * 2 if own is None else own  # the same in every retuning
    included = [list(draw.random(rows) < 0.5) for _ in range(num)]
    scores = [own + draw.standard_normal(rows) * 0.3 + leak(draw, rows) * np.array(one) for one in included]
    return guesses("reference", scores, included, "s")


@pytest.mark.parametrize("shift", [0.0, 0.9])
def test_limits_hold_as_often_as_is_said_though_the_same_rows_stand_out(shift):
    """Of a way of tuning that tells nothing the truth is 0.5 and 2%; else it is what many more coins come to."""
    draw = np.random.default_rng(7)
    own = draw.standard_normal(270) * 2
    found = [simulated(draw, lambda _d, n: np.full(n, shift), own=own) for _ in range(250)]
    areas, shares = zip(*((area(one), hits(one)) for one in found), strict=True)
    known = [np.mean([one for one, _ in kind]) for kind in (areas, shares)] if shift else [0.5, 0.02]
    for kind, true in zip((areas, shares), known, strict=True):
        held = sum(most >= true for _, most in kind) / len(kind)
        assert held >= 0.92  # 95% but for the error of 250 draws


def test_a_harmless_way_passes_and_a_leaking_one_does_not_at_300_rows():
    """Two leaks: every row by a little, and 3 rows in 100 by a lot, which the area does not show."""
    draw = np.random.default_rng(11)
    harmless = [simulated(draw, lambda _d, n: np.zeros(n)) for _ in range(100)]
    assert sum(area(one)[1] <= 0.60 and hits(one)[1] <= 0.03 for one in harmless) >= 93
    every = [simulated(draw, lambda _d, n: np.full(n, 1.5)) for _ in range(50)]
    assert sum(area(one)[1] <= 0.60 for one in every) == 0
    few = [simulated(draw, lambda d, n: np.where(d.random(n) < 0.06, 9.0, 0.0)) for _ in range(50)]
    assert sum(hits(one)[1] <= 0.03 for one in few) == 0
    assert np.mean([area(one)[0] for one in few]) < 0.55


def test_the_examples_in_the_documentation_are_what_is_worked_out():
    page = (Path(__file__).parents[3] / "docs" / "privacy.md").read_text()
    found = re.findall(r"^\| (area|hits) \| ([\d,]+) of ([\d,]+)[a-z ]* \| ([\d.]+)%? \| \S+ \| (\w+)", page, re.M)
    assert len(found) == 4
    for kind, right, num, most, verdict in found:
        limit = upper_share(int(right.replace(",", "")), int(num.replace(",", "")))
        shown = f"{limit:.3f}" if kind == "area" else f"{100 * retunings.HITS_PER_RIGHT * limit:.1f}"
        assert shown == most
        assert (limit <= (MAX_AUC if kind == "area" else MAX_TPR_AT_1 / retunings.HITS_PER_RIGHT)) == (
            verdict == "passed"
        )
