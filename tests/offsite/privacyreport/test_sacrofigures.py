"""Figures under the names of output checkers' tools: those that SACRO-ML works out, and free of the order of rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from offsite.audits.membership import membership_of
from offsite.audits.statistics import balanced_accuracy
from offsite.privacyreport.sacrofigures import Placed, figures, placed

VECTOR = Path(__file__).parents[2] / "vectors" / "sacro"


def test_the_figures_are_those_that_sacroml_gives():
    scores = json.loads((VECTOR / "scores.json").read_text())
    given = Placed(np.array(scores["members"]), np.array(scores["nonmembers"]))
    found = figures(given, [(0.0, 0.0), (1.0, 1.0)])
    for name, value in json.loads((VECTOR / "figures.json").read_text()).items():
        if not name.startswith("TPR@"):  # those are interpolated there
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_hits_at_a_rate_are_of_no_more_false_alarms_than_that():
    members, others = np.arange(1000) + 0.5, np.arange(0, 2000, 2)
    found = figures(placed(members, others), [])
    alarms = np.sort(others)[::-1]
    for percent in (0.5, 0.2, 0.1, 0.01):
        allowed = int(percent / 100 * 1000)
        threshold = alarms[allowed]  # all but so many lie at or below it
        assert found[f"TPR@{percent:g}%"] == (members > threshold).mean()


@pytest.mark.parametrize("rounded", [3, 0])
def test_what_is_handed_over_keeps_the_area_and_has_the_best_threshold_at_a_half(rounded):
    rng = np.random.default_rng(3)
    members, others = np.round(rng.normal(0.7, 1, 300), rounded), np.round(rng.normal(0, 1, 200), rounded)
    scores = placed(members, others)
    found = figures(scores, [])
    assert found["AUC"] == pytest.approx(membership_of("loss", members, others).auc.value, abs=1e-12)
    assert (1 + found["Advantage"]) / 2 == pytest.approx(balanced_accuracy(members, others), abs=1e-12)
    both = np.concatenate(scores)
    assert 0 < both.min() < 0.5 < both.max() < 1
    assert 0.5 not in both
    assert np.unique(both).size == np.unique(np.concatenate([members, others])).size


def test_rows_that_tie_count_alike_in_any_order():
    rng = np.random.default_rng(4)
    members, others = rng.integers(0, 4, 90).astype(float), rng.integers(0, 4, 70).astype(float)
    one = figures(placed(members, others), [])
    other = figures(placed(members[::-1], np.sort(others)), [])
    for name in one.keys() - {"fpr", "tpr"}:
        assert one[name] == pytest.approx(other[name], rel=1e-12), name
    alike = figures(placed(np.ones(30), np.ones(30)), [])
    assert (alike["FDIF01"], alike["AUC"], alike["Advantage"]) == (0.0, 0.5, 0.0)
