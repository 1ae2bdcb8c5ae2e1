"""Lower bounds on epsilon: jax-privacy and brute force as oracles, known values, and mechanisms of known epsilon."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite.audits.lowerbound import (
    SHARES,
    _chance,
    _largest_rejected,
    _num_correct,
    epsilon_from_rates,
    guessed_epsilon,
    one_run_ceiling,
    one_run_epsilon,
)
from offsite.errors import ConfigError, RunFailed

DELTA = 1e-5
quick = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def oracle():
    """The module `jax_privacy.auditing`, by its path - the package around it would import jax - and more precise."""
    path = importlib.metadata.distribution("jax-privacy").locate_file("jax_privacy/auditing.py")
    spec = importlib.util.spec_from_file_location("jax_privacy_auditing", path)
    module = importlib.util.module_from_spec(spec)

    def root(function, low, high, xtol):
        return scipy.optimize.brentq(function, low, high, xtol=1e-13)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # its dataclasses look themselves up
        spec.loader.exec_module(module)
        module.scipy = SimpleNamespace(optimize=SimpleNamespace(brentq=root), special=scipy.special, stats=scipy.stats)
        yield module


def bound(num_canaries, num_guesses, num_correct, delta=DELTA, significance=0.05):
    return _largest_rejected(_chance(num_canaries, num_guesses, num_correct, delta), significance)


# --- the chance and the bound


@pytest.mark.parametrize(
    ("num", "expected"), [(50, 2.78), (100, 3.49), (200, 4.19), (500, 5.10), (1000, 5.78), (2000, 6.45)]
)
def test_known_ceilings(num, expected):
    assert one_run_ceiling(num, DELTA) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("right", "expected"), [(0.55, 0.09), (0.60, 0.30), (0.70, 0.73), (0.80, 1.25)])
def test_known_bounds_of_a_thousand_guesses(right, expected):
    assert bound(1000, 1000, round(1000 * right)) == pytest.approx(expected, abs=0.005)


CASES = [
    (num, guesses, correct, epsilon, delta)
    for num, guesses in ((10, 1), (10, 10), (100, 30), (1000, 200), (1000, 1000))
    for correct in sorted({0, guesses // 2, round(0.8 * guesses), guesses})
    for epsilon in (0.0, 0.5, 3.0)
    for delta in (0.0, 1e-6, 1e-3, 0.1)
]


@pytest.mark.parametrize(("num", "guesses", "correct", "epsilon", "delta"), CASES)
def test_the_chance_is_the_oracles_and_the_papers_loop(oracle, num, guesses, correct, epsilon, delta):
    found = _chance(num, guesses, correct, delta)(epsilon)
    assert found == pytest.approx(oracle._one_run_p_value(num, guesses, correct, epsilon, delta), abs=1e-9)
    trials = scipy.stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    largest = between = 0.0
    for i in range(1, correct + 1):
        between += trials.pmf(correct - i)
        largest = max(largest, between / i)
    assert found == pytest.approx(min(1.0, trials.sf(correct - 1) + 2 * num * delta * largest), abs=1e-9)


@pytest.mark.parametrize("delta", [1e-9, DELTA, 1e-3])
@pytest.mark.parametrize("sides_apart", [0.3, 1.0, 3.0, 20.0])
def test_the_bound_is_the_oracles_at_the_same_threshold(oracle, sides_apart, delta):
    chance = np.random.default_rng(round(10 * sides_apart))
    scores_in, scores_out = chance.normal(sides_apart, 1, 240), chance.normal(0, 1, 260)
    threshold = np.sort(np.concatenate((scores_in, scores_out)))[-100]
    expected = oracle.CanaryScoreAuditor(scores_in, scores_out).epsilon_one_run(
        0.05, delta, threshold_strategy=oracle.Explicit(threshold)
    )
    found = one_run_epsilon(scores_in, scores_out, delta, num_guesses=100, sides="in")
    assert found.epsilon == pytest.approx(expected, abs=1e-9)


@quick
@given(st.integers(1, 60), st.integers(0, 40), st.sampled_from([0.0, 1e-5, 1e-3, 0.05]), st.sampled_from([0.05, 0.5]))
def test_the_bound_grows_with_the_correct_guesses_and_shrinks_with_silence(guesses, silent, delta, significance):
    bounds = [bound(guesses + silent, guesses, correct, delta, significance) for correct in range(guesses + 1)]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= bound(guesses, guesses, guesses, delta, significance) + 1e-9


@quick
@given(st.integers(1, 80), st.integers(0, 30), st.integers(0, 30), st.floats(0, 0.3), st.floats(0.001, 0.5))
def test_no_epsilon_under_the_bound_is_kept_and_none_over_it_is_rejected(guesses, silent, wrong, delta, significance):
    """Also where 2 m delta is large, of which the paper speaks least: the rejected ones are an interval from zero."""
    chance = _chance(guesses + silent, guesses, max(0, guesses - wrong), delta)
    found = _largest_rejected(chance, significance)
    for epsilon in np.linspace(0, found + 3, 200):
        if abs(epsilon - found) > 1e-9:
            assert (chance(epsilon) <= significance) == (epsilon < found)


# --- guesses


SMALL = st.lists(st.integers(0, 2).map(float), min_size=1, max_size=3)


@quick
@given(SMALL, SMALL, st.data())
def test_ties_go_to_the_order_with_the_fewest_correct_guesses(scores_in, scores_out, data):
    num = data.draw(st.integers(1, len(scores_in) + len(scores_out)))
    sides = data.draw(st.sampled_from(["both", "in"]))
    canaries = [(score, True) for score in scores_in] + [(score, False) for score in scores_out]
    num_out = num // 2 if sides == "both" else 0
    tops, bottoms = [], []
    for order in itertools.permutations(canaries):
        ranked = sorted(order, key=lambda one: -one[0])  # stable: ties stay in this order
        tops.append(sum(is_in for _, is_in in ranked[: num - num_out]))
        bottoms.append(sum(not is_in for _, is_in in ranked[len(ranked) - num_out :]))
    assert _num_correct(np.array(scores_in), np.array(scores_out), num, sides) == min(tops) + min(bottoms)


@quick
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_order_alone_counts_and_swapping_in_and_out_mirrors_the_guesses(seed, half):
    chance = np.random.default_rng(seed)
    scores_in, scores_out = chance.normal(1, 1, 30).round(1), chance.normal(0, 1, 30).round(1)
    found = one_run_epsilon(scores_in, scores_out, DELTA, num_guesses=2 * half)
    assert one_run_epsilon(-scores_out, -scores_in, DELTA, num_guesses=2 * half) == found
    assert one_run_epsilon(np.exp(scores_in)[::-1], np.exp(scores_out), DELTA, num_guesses=2 * half) == found


def test_scores_all_equal_prove_nothing():
    found = one_run_epsilon(np.ones(500), np.ones(500), DELTA, num_guesses=[100, 1000])
    assert found.epsilon == 0
    assert found.num_correct <= found.num_guesses / 2


# --- rules


def test_one_declared_number_is_tested_at_the_whole_significance_and_several_at_their_share():
    chance = np.random.default_rng(0)
    scores_in, scores_out = chance.normal(1, 1, 200), chance.normal(0, 1, 200)
    singles = {
        number: one_run_epsilon(scores_in, scores_out, DELTA, 1 - 0.05 / 3, num_guesses=number)
        for number in (40, 100, 200)
    }
    several = one_run_epsilon(scores_in, scores_out, DELTA, num_guesses=[100, 40, 200, 40])
    best = max(singles.values(), key=lambda one: one.epsilon)
    assert several.epsilon == pytest.approx(best.epsilon, abs=1e-9)
    assert (several.num_guesses, several.num_correct) == (best.num_guesses, best.num_correct)
    assert (several.rule, several.declared) == ("bonferroni", (200, 100, 40))
    assert (best.rule, best.declared) == ("fixed", (best.num_guesses,))
    default = one_run_epsilon(scores_in, scores_out, DELTA)
    assert default.declared == tuple(round(400 * share) for share in SHARES)


@pytest.mark.parametrize("num_guesses", [100, [20, 100], None])
def test_an_attack_that_is_never_wrong_reaches_the_ceiling(num_guesses):
    found = one_run_epsilon(np.arange(95.0) + 500, np.arange(105.0), DELTA, num_guesses=num_guesses)
    assert found.num_correct == found.num_guesses == 100
    assert found.epsilon == found.ceiling == one_run_ceiling(200, DELTA, num_guesses=found.declared)
    assert found.ceiling < one_run_ceiling(200, DELTA)


# --- mechanisms of known epsilon


def answers(chance, num, epsilon):
    """Randomized response about `num` coins, as scores without ties; the coins."""
    coins = chance.random(num) < 0.5
    told = coins ^ (chance.random(num) < 1 / (1 + math.exp(epsilon)))
    return coins, told + 0.1 * chance.random(num)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
def test_of_randomized_response_more_than_epsilon_is_claimed_as_seldom_as_stated_exactly(epsilon, confidence):
    """A guess follows every answer, so the correct ones are binomial: the case that the theorem is tight in."""
    correct = scipy.stats.binom(100, 1 / (1 + math.exp(-epsilon)))
    too_much = [v for v in range(101) if bound(100, 100, v, 0.0, 1 - confidence) > epsilon]
    chance = sum(correct.pmf(v) for v in too_much)
    assert 0.2 * (1 - confidence) < chance <= 1 - confidence


@pytest.mark.parametrize("sides", ["both", "in"])
@pytest.mark.parametrize("num_guesses", [60, [20, 60, 100], None])
def test_of_randomized_response_the_bound_is_below_epsilon_in_95_of_100_runs(num_guesses, sides):
    chance = np.random.default_rng(7)
    bounds = []
    for _ in range(300):
        coins, scores = answers(chance, 200, 1.0)
        found = one_run_epsilon(scores[coins], scores[~coins], DELTA, num_guesses=num_guesses, sides=sides)
        bounds.append(found.epsilon)
    assert np.mean(np.array(bounds) > 1.0) <= 0.05
    assert np.median(bounds) > 0.2  # and it is not trivially below


@pytest.mark.parametrize("at_once", [False, True])
def test_with_delta_the_bound_is_below_epsilon_in_95_of_100_runs(at_once):
    """What delta allows: now and then a coin is told outright, of each canary by itself or of all at once."""
    chance = np.random.default_rng(8)
    delta, num_runs = 0.02, 400
    too_much = 0
    for _ in range(num_runs):
        coins, scores = answers(chance, 60, 1.0)
        is_told = chance.random(1 if at_once else 60) < delta
        scores = np.where(is_told, 10.0 * coins - 5 + scores, scores)
        found = one_run_epsilon(scores[coins], scores[~coins], delta, num_guesses=[10, 30])
        too_much += found.epsilon > 1.0
    assert too_much / num_runs <= 0.05


def test_where_there_is_no_privacy_the_bound_refutes_a_claim():
    chance = np.random.default_rng(9)
    for _ in range(50):
        coins = chance.random(400) < 0.5
        scores = coins + 0.2 * chance.normal(size=400)
        found = one_run_epsilon(scores[coins], scores[~coins], DELTA)
        assert 3 < found.epsilon <= found.ceiling


def test_of_scores_that_mean_nothing_the_bound_is_zero_nearly_always():
    chance = np.random.default_rng(10)
    bounds = []
    for _ in range(300):
        coins = chance.random(200) < 0.5
        scores = chance.normal(size=200)
        bounds.append(one_run_epsilon(scores[coins], scores[~coins], DELTA).epsilon)
    assert np.mean(np.array(bounds) > 0) <= 0.05


# --- many runs


@pytest.mark.parametrize("delta", [0.0, 0.01])
def test_the_bound_from_rates_is_the_oracles(oracle, delta):
    chance = np.random.default_rng(11)
    members, nonmembers = chance.normal(1.5, 1, 800), chance.normal(0, 1, 900)
    auditor = oracle.CanaryScoreAuditor(members, nonmembers)
    for threshold in (-1.0, 0.5, 1.0, 2.0, 9.0):
        expected = auditor.epsilon_clopper_pearson(0.05, delta, threshold_strategy=oracle.Explicit(threshold))
        counts = int((members >= threshold).sum()), 800, int((nonmembers >= threshold).sum()), 900
        assert epsilon_from_rates(*counts, delta) == pytest.approx(expected, abs=1e-9)


def test_the_bound_from_rates_is_below_epsilon_in_95_of_100_audits():
    chance = np.random.default_rng(12)
    right = 1 / (1 + math.exp(-1.0))
    counts = zip(chance.binomial(200, right, 500), chance.binomial(200, 1 - right, 500), strict=True)
    bounds = [epsilon_from_rates(int(hits), 200, int(alarms), 200) for hits, alarms in counts]
    assert np.mean(np.array(bounds) > 1.0) <= 0.05
    assert np.median(bounds) > 0.5


# --- refusals


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"delta": -0.1}, "delta -0.1"),
        ({"delta": 1.0}, "delta 1"),
        ({"delta": math.nan}, "delta nan"),
        ({"confidence": 1.0}, "confidence 1"),
        ({"num_guesses": 0}, "0 guesses about 60 canaries"),
        ({"num_guesses": [10, 61]}, "61 guesses about 60"),
        ({"num_guesses": []}, "no guesses"),
        ({"scores_in": []}, "scores of canaries in"),
        ({"scores_out": [[1.0]]}, "scores of canaries out"),
        ({"scores_out": np.zeros(2)}, "30 of 32 canaries are in"),
        ({"scores_out": np.zeros(200)}, "30 of 230 canaries are in"),
    ],
)
def test_arguments_out_of_range_are_refused(change, match):
    sound = {"scores_in": np.zeros(30), "scores_out": np.zeros(30), "delta": DELTA}
    with pytest.raises(ConfigError, match=match):
        one_run_epsilon(**{**sound, **change})


def test_scores_and_counts_that_make_no_sense_are_refused():
    with pytest.raises(RunFailed, match="canaries in: 1 of 1 are NaN"):
        one_run_epsilon([math.nan], [1.0], DELTA)
    with pytest.raises(ConfigError, match="guesses about 0 canaries"):
        one_run_ceiling(0, DELTA)
    with pytest.raises(ConfigError, match="delta 2"):
        epsilon_from_rates(1, 2, 1, 2, delta=2.0)
    with pytest.raises(ConfigError, match="5 successes in 2"):
        epsilon_from_rates(5, 2, 1, 2)


@pytest.mark.parametrize("declared", [None, 100, (150, 50)])
def test_what_guesses_prove_is_the_same_without_their_scores(declared):
    draw = np.random.default_rng(5)
    found = one_run_epsilon(draw.normal(2, 1, 150), draw.normal(0, 1, 150), DELTA, num_guesses=declared)
    given = (found.num_canaries, found.num_guesses, found.num_correct, DELTA)
    assert found.epsilon > 0
    assert guessed_epsilon(*given, declared=found.declared) == found.epsilon
    for guesses, correct in ((found.num_guesses + 1, 1), (found.num_guesses, -1), (50, 51)):
        with pytest.raises(ConfigError, match="guesses are right, expected"):
            guessed_epsilon(300, guesses, correct, DELTA, declared=found.declared)
