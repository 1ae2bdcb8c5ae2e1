"""Rules of aggregation against the dense arithmetic they stand for, their conditions, and what stops a round."""

from __future__ import annotations

import math
import random

import pytest
import torch
from scipy import stats

from adapters.updates import LowRank, dense, norm
from offsite.errors import ConfigError, NotFinite, RunFailed
from server.aggregation import aggregate as module
from server.aggregation.aggregate import Contribution, Rule, aggregate, clipped, shares

SHAPES = {"top.0.q.weight": (16, 24), "top.0.norm.weight": (12,)}


def contribution(number, *, weight=1.0, size=1.0):
    draw = torch.Generator().manual_seed(number)
    low = LowRank(torch.randn(2, 24, generator=draw), size * torch.randn(16, 2, generator=draw))
    vector = size * torch.randn(12, generator=draw)
    return Contribution(f"client-{number}", {"top.0.q.weight": low, "top.0.norm.weight": vector}, weight)


def flat(update):
    return torch.cat([dense(update[name]).double().flatten() for name in sorted(update)])


def result(given, **rule):
    return aggregate(given, Rule(**rule), min_survivors=1, shapes=SHAPES)


@pytest.fixture
def eight():
    return [contribution(number) for number in range(8)]


RULES = [
    {"name": "mean"},
    {"name": "mean", "max_norm": 3.0},
    {"name": "trimmed-mean", "num_byzantine": 1},
    {"name": "median", "num_byzantine": 3},
    {"name": "krum", "num_byzantine": 2},
    {"name": "multi-krum", "num_byzantine": 1, "keep": 5},
]


def test_the_mean_is_weighted_and_stays_in_factors(eight):
    given = [contribution(number, weight=number + 1.0) for number in range(3)]
    found = result(given)
    expected = sum((number + 1) / 6 * flat(given[number].update) for number in range(3))
    torch.testing.assert_close(flat(found.update), expected, rtol=1e-5, atol=1e-6)
    assert found.update["top.0.q.weight"].rank == 6
    assert found.used == ("client-0", "client-1", "client-2")
    assert found.left_out == {}
    assert found.figures["norm_update"] == pytest.approx(norm(found.update))


@pytest.mark.parametrize("weight", [1e308, 1e-308])
def test_weights_of_any_size_are_shares(weight):
    assert shares([weight, weight / 3]) == pytest.approx([0.75, 0.25])
    assert sum(shares([weight, weight / 3])) == pytest.approx(1)


@pytest.mark.parametrize("num", [3, 4, 7, 8])
def test_the_median_is_numpys(num, monkeypatch):
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 100)
    given = [contribution(number) for number in range(num)]
    stacked = torch.stack([flat(one.update) for one in given])
    found = result(given, name="median")
    torch.testing.assert_close(flat(found.update), stacked.quantile(0.5, dim=0), rtol=1e-6, atol=1e-7)
    assert len(found.used) == num


@pytest.mark.parametrize(("trim", "cut"), [(0.1, 1), (0.125, 1), (0.2, 2), (0.25, 2), (0.3, 3)])
def test_the_trimmed_mean_is_scipys_with_the_share_rounded_up(eight, trim, cut):
    found = result(eight, name="trimmed-mean", trim=trim)
    stacked = torch.stack([flat(one.update) for one in eight]).numpy()
    expected = torch.from_numpy(stats.trim_mean(stacked, cut / 8, axis=0))
    torch.testing.assert_close(flat(found.update), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("f", "keep"), [(0, 1), (1, 1), (2, 1), (1, 5), (2, 3)])
def test_krum_is_the_definition_on_dense_vectors(eight, f, keep):
    vectors = [flat(one.update) for one in eight]
    scores = []
    for one in range(8):
        apart = sorted(float((vectors[one] - vectors[other]).square().sum()) for other in range(8) if other != one)
        scores.append(sum(apart[: 8 - f - 2]))
    best = sorted(range(8), key=scores.__getitem__)[:keep]
    found = result(eight, name="krum" if keep == 1 else "multi-krum", num_byzantine=f, keep=keep)
    assert found.used == tuple(f"client-{number}" for number in sorted(best))
    expected = torch.stack([vectors[number] for number in best]).mean(0)
    torch.testing.assert_close(flat(found.update), expected, rtol=1e-5, atol=1e-6)
    assert len(found.left_out) == 8 - keep
    assert all(reason.startswith("score ") for reason in found.left_out.values())


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_contributions_does_not_matter(eight, rule):
    found = result(eight, **rule)
    random.Random(3).shuffle(eight)
    again = result(eight, **rule)
    assert torch.equal(flat(found.update), flat(again.update))
    assert (found.used, found.left_out, found.figures) == (again.used, again.left_out, again.figures)


def test_clipping_is_of_the_whole_update():
    large, small = contribution(0, size=10.0), contribution(1, size=0.01)
    found = result([large, small], max_norm=2.0)
    assert found.figures["num_clipped"] == 1
    expected = (flat(large.update) * 2 / norm(large.update) + flat(small.update)) / 2
    torch.testing.assert_close(flat(found.update), expected, rtol=1e-5, atol=1e-6)
    zero = {"x": torch.zeros(3)}
    assert clipped(zero, 0.0, 1.0) is zero
    for size in (math.nan, math.inf):
        with pytest.raises(NotFinite):
            clipped(zero, size, None)


IMPOSSIBLE = [
    ({"name": "mean", "num_byzantine": 1}, 8, "bears no bad client"),
    ({"name": "trimmed-mean", "trim": 0.4}, 4, "cutting 2 values at each end leaves none of 4"),
    ({"name": "trimmed-mean", "trim": 0.1, "num_byzantine": 2}, 8, "does not bear 2 bad clients"),
    ({"name": "median"}, 2, "at least 3 clients"),
    ({"name": "median", "num_byzantine": 4}, 8, "fewer than 4 bad ones, not 4"),
    ({"name": "krum", "num_byzantine": 3}, 8, "at least 9 clients, there are 8"),
    ({"name": "krum"}, 2, "at least 3 clients"),
    ({"name": "multi-krum", "num_byzantine": 3}, 8, "at least 9 clients"),
    ({"name": "multi-krum", "num_byzantine": 1, "keep": 6}, 8, "may keep 5, not 6"),
]


@pytest.mark.parametrize(("rule", "num", "message"), IMPOSSIBLE)
def test_what_a_rule_cannot_bear_is_said_before_and_stops_the_round(rule, num, message):
    with pytest.raises(ConfigError, match=message):
        Rule(**rule).require(num)
    if "keep" not in rule:
        with pytest.raises(RunFailed, match=message):
            result([contribution(number) for number in range(num)], **rule)


@pytest.mark.parametrize("rule", RULES)
def test_rules_that_can_be_carried_out(rule):
    Rule(**rule).require(8)
    Rule(name="krum", num_byzantine=3).require(9)


@pytest.mark.parametrize(
    "given",
    [{"trim": 0.5}, {"trim": 0.0}, {"max_norm": 0.0}, {"max_norm": math.nan}, {"num_byzantine": -1}, {"keep": 0},
     {"name": "fedavg"}, {"num_byzantine": "1"}, {"max_norms": 1.0}, {"num_byzantine": True}],
)  # fmt: skip
def test_rules_that_are_none(given):
    with pytest.raises(ValueError, match="validation error"):
        Rule(**given)


@pytest.mark.parametrize("weight", [0, -9, math.nan, math.inf, True])
def test_row_22_weights_that_are_no_positive_number(weight):
    with pytest.raises(ConfigError, match="is not a positive number"):
        result([contribution(0), contribution(1, weight=weight)])


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule["name"] != "mean"])
def test_rules_that_know_no_weights_refuse_them(eight, rule):
    with pytest.raises(ConfigError, match="the weights differ"):
        result([*eight, contribution(9, weight=2.0)], **rule)
    result([contribution(number, weight=0.125) for number in range(8)], **rule)


def test_a_client_counts_once(eight):
    with pytest.raises(ConfigError, match="'client-3' contributes 2 updates"):
        result([*eight, contribution(3)])


def test_too_few_are_left(eight):
    bad = [Contribution(one.client, {**one.update, "top.0.norm.weight": torch.full((12,), math.nan)}) for one in eight]
    given = [*bad[:5], *eight[5:]]
    found = aggregate(given, Rule(), min_survivors=3)
    assert found.used == ("client-5", "client-6", "client-7")
    with pytest.raises(RunFailed, match=r"3 of 8 updates are sound, at least 4 are needed; client-0: .* NaN"):
        aggregate(given, Rule(), min_survivors=4)
    with pytest.raises(RunFailed, match=r"3 of 8 updates are sound: rule 'krum'"):
        aggregate(given, Rule(name="krum", num_byzantine=1), min_survivors=1)
    with pytest.raises(RunFailed, match="0 of 0"):
        aggregate([], Rule(), min_survivors=1)
    with pytest.raises(ConfigError, match="at least 1"):
        aggregate(eight, Rule(), min_survivors=0)


def test_without_stated_shapes_the_form_of_most_counts(eight):
    other = [Contribution(one.client, {"top.0.norm.weight": torch.ones(12)}) for one in eight]
    found = aggregate([*eight[:5], *other[5:]], Rule(), min_survivors=1)
    assert len(found.left_out) == 3
    with pytest.raises(RunFailed, match="no common form"):
        aggregate([*eight[:4], *other[4:]], Rule(), min_survivors=1)
    with pytest.raises(RunFailed, match="0 of 8"):  # what the owner states goes before what all clients do
        aggregate(other, Rule(), min_survivors=1, shapes=SHAPES)


def test_krum_decides_equal_scores_by_name(eight):
    same = [Contribution(f"client-{number}", eight[0].update) for number in range(5)]
    assert result(same, name="krum", num_byzantine=1).used in {(f"client-{number}",) for number in range(5)}
    assert result(same, name="krum").used == result(same[::-1], name="krum").used


def test_refused_updates_do_not_stop_multi_krum_they_leave_fewer_to_keep(eight):
    bad = Contribution("client-7", {**eight[7].update, "top.0.norm.weight": torch.full((12,), math.inf)})
    found = result([*eight[:7], bad], name="multi-krum", num_byzantine=1, keep=5)
    assert len(found.used) == 4
    assert "infinity" in found.left_out["client-7"]
