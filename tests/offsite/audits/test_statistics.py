"""Rates of attacks: jax-privacy and brute force as oracles, what must not change them, and intervals that cover."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import sys
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite.audits import statistics as auditing
from offsite.audits.statistics import (
    Points,
    auc,
    balanced_accuracy,
    clopper_pearson,
    exposure,
    rank_of,
    require_extra,
    roc,
    thinned,
    tpr_at_fpr,
)
from offsite.errors import ConfigError, RunFailed

SCORES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)  # few values: many ties
quick = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def oracle():
    """The module `jax_privacy.auditing`, by its path: the package around it would import jax."""
    path = importlib.metadata.distribution("jax-privacy").locate_file("jax_privacy/auditing.py")
    spec = importlib.util.spec_from_file_location("jax_privacy_auditing", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # its dataclasses look themselves up
        spec.loader.exec_module(module)
        yield module


def normal(seed, num_in, num_out, apart, *, decimals=None):
    chance = np.random.default_rng(seed)
    members, nonmembers = chance.normal(apart, 1, num_in), chance.normal(0, 1, num_out)
    return (members, nonmembers) if decimals is None else (members.round(decimals), nonmembers.round(decimals))


# --- the curve


@quick
@given(SCORES, SCORES)
def test_the_curve_is_what_every_threshold_gives(members, nonmembers):
    members, nonmembers = np.array(members), np.array(nonmembers)
    thresholds = [math.inf, *sorted({*members, *nonmembers}, reverse=True)]
    expected = [((nonmembers >= one).mean(), (members >= one).mean()) for one in thresholds]
    found = roc(members, nonmembers)
    np.testing.assert_allclose(np.stack(found, axis=1), expected, atol=1e-12)
    assert (found.fpr[0], found.tpr[0], found.fpr[-1], found.tpr[-1]) == (0, 0, 1, 1)
    area = np.trapezoid(found.tpr, found.fpr)
    assert area == pytest.approx(auc(members, nonmembers).value, abs=1e-12)


@pytest.mark.parametrize("num", [3, 4, 10, 100, 3000])
@pytest.mark.parametrize("apart", [0.0, 1.0, 9.0])
def test_a_thinned_curve_has_both_ends_and_points_of_the_whole_one(num, apart):
    whole = roc(*normal(0, 1000, 1000, apart))
    few = thinned(whole, num)
    assert few.fpr.size <= num
    assert (few.fpr[0], few.tpr[0], few.fpr[-1], few.tpr[-1]) == (0, 0, 1, 1)
    assert {*zip(*few, strict=True)} <= {*zip(*whole, strict=True)}
    if num < 3000:
        for fpr, tpr in list(zip(*few, strict=True))[1:]:
            assert tpr == whole.tpr[whole.fpr == fpr].max()
    else:
        assert few is whole


def test_a_thinned_curve_keeps_low_rates():
    few = thinned(roc(*normal(1, 10_000, 10_000, 1.0)), 40)
    for low, high in ((0.0001, 0.001), (0.001, 0.01), (0.01, 0.1), (0.1, 1)):
        assert ((few.fpr >= low) & (few.fpr <= high)).sum() >= 6


# --- the area


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_the_area_is_the_oracles_and_mann_and_whitneys(oracle, decimals):
    members, nonmembers = normal(2, 83, 61, 0.7, decimals=decimals)
    found = auc(members, nonmembers)
    statistic = scipy.stats.mannwhitneyu(members, nonmembers).statistic
    assert found.value == pytest.approx(statistic / (83 * 61), abs=1e-12)
    pairs = np.sign(members[:, None] - nonmembers[None, :]) / 2 + 0.5
    assert found.value == pytest.approx(pairs.mean(), abs=1e-12)
    # the oracle's curve is the concave hull: its area is ours of the curve made so, and never less
    assert oracle.CanaryScoreAuditor(members, nonmembers).attack_auroc() >= found.value


def test_the_area_of_a_concave_curve_is_the_oracles(oracle):
    # one level for every group: the likelihood ratio grows with the score
    members = np.repeat([0.0, 1.0, 2.0, 3.0], [5, 10, 20, 40])
    nonmembers = np.repeat([0.0, 1.0, 2.0, 3.0], [40, 20, 10, 5])
    expected = oracle.CanaryScoreAuditor(members, nonmembers).attack_auroc()
    assert auc(members, nonmembers).value == pytest.approx(expected, abs=1e-9)


def test_the_variance_is_delongs_of_the_loop_over_pairs():
    members, nonmembers = normal(3, 40, 25, 1.0, decimals=1)
    pairs = np.array([[(a > b) + (a == b) / 2 for b in nonmembers] for a in members])
    error = math.sqrt(pairs.mean(axis=1).var(ddof=1) / 40 + pairs.mean(axis=0).var(ddof=1) / 25)
    area = pairs.mean()
    found = auc(members, nonmembers, confidence=0.9)
    for bound, side in ((found.low, -1), (found.high, 1)):
        reach = math.log(bound / (1 - bound)) - math.log(area / (1 - area))
        assert reach == pytest.approx(side * 1.6448536269514722 * error / (area * (1 - area)), rel=1e-9)


@quick
@given(SCORES, SCORES)
def test_the_area_depends_on_order_alone_and_swapping_mirrors_it(members, nonmembers):
    found = auc(members, nonmembers)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    stretched = auc(np.exp(members) * 7 - 3, np.exp(nonmembers) * 7 - 3)
    assert stretched == found
    swapped = auc(nonmembers, members)
    expected = (1 - found.value, 1 - found.high, 1 - found.low)
    assert tuple(swapped) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("num_in", "num_out", "apart"), [(30, 30, 0.0), (100, 40, 1.0), (50, 50, 3.0), (25, 400, 1.5)])
def test_the_interval_of_the_area_covers(num_in, num_out, apart):
    expected = NormalDist().cdf(apart / math.sqrt(2))
    intervals = [auc(*normal(seed, num_in, num_out, apart)) for seed in range(600)]
    covered = np.mean([one.low <= expected <= one.high for one in intervals])
    assert covered >= 0.92  # near 1 it is a little below what is stated


@pytest.mark.parametrize(
    ("members", "nonmembers", "value", "num_pairs"),
    [
        (np.arange(20.0) + 50, np.arange(30.0), 1.0, 20),
        (np.arange(30.0), np.arange(20.0) + 50, 0.0, 20),
        (np.ones(12), np.ones(12), 0.5, 12),
        (np.array([math.inf]), np.array([-math.inf, 0.0]), 1.0, 1),
    ],
)
def test_an_interval_without_variance_is_that_of_disjoint_pairs(members, nonmembers, value, num_pairs):
    found = auc(members, nonmembers)
    assert found == pytest.approx(clopper_pearson(round(value * num_pairs), num_pairs), abs=1e-12)
    assert found.high - found.low > 0.1


# --- rates at a threshold


@pytest.mark.parametrize("decimals", [None, 2, 1])
def test_the_rate_at_a_corner_of_the_hull_is_the_oracles(oracle, decimals):
    members, nonmembers = normal(4, 700, 1000, 1.0, decimals=decimals)
    auditor = oracle.CanaryScoreAuditor(members, nonmembers)
    corners = [count / 1000 for count in auditor._get_fp_counts() if count >= 10]
    assert len(corners) > 3
    for fpr in corners:
        assert tpr_at_fpr(members, nonmembers, fpr).value == pytest.approx(auditor.tpr_at_given_fpr(fpr), abs=1e-9)
    for fpr in np.linspace(0.01, 1, 50):  # the oracle may toss a coin between two thresholds
        assert tpr_at_fpr(members, nonmembers, fpr).value <= auditor.tpr_at_given_fpr(fpr) + 1e-9


@quick
@given(SCORES, st.lists(st.integers(-4, 4).map(float), min_size=20, max_size=40), st.floats(0.51, 1))
def test_the_rate_is_the_best_of_all_thresholds_that_so_few_nonmembers_exceed(members, nonmembers, fpr):
    members, nonmembers = np.array(members), np.array(nonmembers)
    thresholds = [-math.inf, *members, *nonmembers]
    rates = [(members > one).mean() for one in thresholds if (nonmembers > one).mean() <= fpr * (1 + 1e-12)]
    assert tpr_at_fpr(members, nonmembers, fpr).value == max(rates)


def test_a_tie_at_the_threshold_counts_for_nobody():
    nonmembers = np.repeat([0.0, 1.0, 2.0], [980, 15, 5])  # 5 may pass, 20 may not
    found = tpr_at_fpr(np.array([1.0, 1.0, 2.0, 3.0]), nonmembers, 0.01)
    assert found.value == 0.5


@pytest.mark.parametrize(("fpr", "fewest"), [(0.01, 1000), (0.001, 10_000), (0.29, 35), (0.5, 20)])
def test_too_few_nonmembers_give_no_rate(fpr, fewest):
    members = np.arange(5.0)
    assert tpr_at_fpr(members, np.arange(fewest - 1.0), fpr) is None
    assert tpr_at_fpr(members, np.arange(float(fewest)), fpr) is not None


def test_the_interval_of_a_rate_covers_the_rate_at_its_threshold():
    covered = []
    for seed in range(400):
        members, nonmembers = normal(seed, 150, 1000, 1.0)
        expected = 1 - NormalDist(1, 1).cdf(np.sort(nonmembers)[-11])
        found = tpr_at_fpr(members, nonmembers, 0.01)
        covered.append(found.low <= expected <= found.high)
    assert np.mean(covered) >= 0.95


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_balanced_accuracy_is_the_oracles_and_the_best_of_all_thresholds(oracle, decimals):
    members, nonmembers = normal(5, 90, 70, 0.8, decimals=decimals)
    found = balanced_accuracy(members, nonmembers)
    assert found == pytest.approx(oracle.CanaryScoreAuditor(members, nonmembers).max_accuracy(prevalence=0.5), abs=1e-9)
    thresholds = [math.inf, *members, *nonmembers]
    each = [((members >= one).mean() + (nonmembers < one).mean()) / 2 for one in thresholds]
    assert found == pytest.approx(max(each), abs=1e-12)
    assert balanced_accuracy([0.0], [1.0]) == 0.5
    assert balanced_accuracy([1.0], [0.0]) == 1.0


# --- binomial intervals


@pytest.mark.parametrize("trials", [1, 7, 50, 3000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_binomial_intervals_are_the_oracles(oracle, trials, confidence):
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        found = clopper_pearson(successes, trials, confidence)
        exact = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
        assert found == pytest.approx((successes / trials, exact.low, exact.high), abs=1e-9)
        upper = oracle._clopper_pearson_upper(successes, trials, (1 - confidence) / 2)
        assert found.high == pytest.approx(float(upper), abs=1e-9)


@pytest.mark.parametrize("trials", [1, 10, 40])
def test_binomial_intervals_cover_exactly(trials):
    intervals = [clopper_pearson(successes, trials) for successes in range(trials + 1)]
    for chance in np.linspace(0.001, 0.999, 97):
        weights = scipy.stats.binom.pmf(np.arange(trials + 1), trials, chance)
        assert sum(w for w, one in zip(weights, intervals, strict=True) if one.low <= chance <= one.high) >= 0.95


# --- exposure


def test_exposure_is_what_a_perfect_and_a_useless_rank_give():
    assert exposure(1, 1024) == 10
    assert exposure(1024, 1024) == 0
    assert exposure(1, 1) == 0
    assert exposure(3, 1000) == pytest.approx(math.log2(1000 / 3))


def test_ranks_count_ties_against_the_attack():
    assert rank_of(2.0, [1.0, 0.0, -math.inf]) == 1
    assert rank_of(0.0, [1.0, 0.0, 0.0, -1.0]) == 4
    others = np.zeros(1023)
    assert exposure(rank_of(0.0, others), 1024) == 0


def test_a_secret_that_was_not_learned_is_exposed_as_seldom_as_chance_says():
    chance = np.random.default_rng(0)
    found = [exposure(rank_of(chance.random(), chance.random(255)), 256) for _ in range(2000)]
    for bits in (1, 2, 4):
        assert np.mean(np.array(found) >= bits) == pytest.approx(2**-bits, abs=0.03)


# --- refusals


@pytest.mark.parametrize("function", [roc, auc, balanced_accuracy, lambda a, b: tpr_at_fpr(a, b, 0.5)])
@pytest.mark.parametrize("wrong", [[], [[1.0]], 1.0])
def test_scores_that_are_none_or_no_row_are_refused(function, wrong):
    with pytest.raises(ConfigError, match=r"scores of members: shape .*, expected one score"):
        function(wrong, [1.0])
    with pytest.raises(ConfigError, match="scores of non-members"):
        function([1.0], wrong)


@pytest.mark.parametrize("function", [roc, auc, balanced_accuracy, lambda a, b: tpr_at_fpr(a, b, 0.5)])
def test_nan_is_no_score(function):
    with pytest.raises(RunFailed, match="1 of 2 are NaN") as caught:
        function([1.0, math.nan], [1.0])
    assert caught.value.hint
    with pytest.raises(RunFailed, match="the secret"):
        rank_of(math.nan, [1.0])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: auc([1.0], [0.0], confidence=0.4), "confidence 0.4"),
        (lambda: auc([1.0], [0.0], confidence=1.0), "confidence 1"),
        (lambda: auc([1.0], [0.0], confidence=math.nan), "confidence nan"),
        (lambda: tpr_at_fpr([1.0], [0.0], 0.01, confidence=2.0), "confidence 2"),
        (lambda: tpr_at_fpr([1.0], [0.0], 0.0), "false-positive rate 0"),
        (lambda: tpr_at_fpr([1.0], [0.0], 1.1), "false-positive rate 1.1"),
        (lambda: tpr_at_fpr([1.0], [0.0], math.nan), "false-positive rate nan"),
        (lambda: clopper_pearson(3, 2), "3 successes in 2 trials"),
        (lambda: clopper_pearson(-1, 2), "-1 successes"),
        (lambda: clopper_pearson(0, 0), "0 successes in 0 trials"),
        (lambda: thinned(Points(np.array([0.0, 1.0]), np.array([0.0, 1.0])), 2), "2 points"),
        (lambda: exposure(0, 10), "rank 0 among 10"),
        (lambda: exposure(11, 10), "rank 11 among 10"),
        (lambda: rank_of(1.0, []), "scores of candidates"),
    ],
)
def test_arguments_out_of_range_are_refused(call, match):
    with pytest.raises(ConfigError, match=match):
        call()


def test_without_scipy_the_module_imports_and_says_what_to_install(monkeypatch):
    require_extra()
    for name in [name for name in sys.modules if name.split(".")[0] == "scipy"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("auditing_anew", auditing.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert anew.auc([1.0, 2.0, 3.0], [0.0, 1.5, 2.5]).value == pytest.approx(2 / 3)
    for call in (anew.require_extra, lambda: anew.clopper_pearson(1, 2)):
        with pytest.raises(ConfigError, match="'scipy'") as caught:
            call()
        assert caught.value.hint == "pip install 'offsite-tuning[privacy]'"
