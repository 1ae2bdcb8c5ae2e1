"""What an audit states of an attack is what its scores say, in the form of the schema."""

from __future__ import annotations

import numpy as np
import pytest

from offsite.audits.membership import membership_of
from offsite.audits.record import MAX_POINTS
from offsite.audits.statistics import auc, balanced_accuracy, tpr_at_fpr
from offsite.errors import ConfigError, RunFailed


def test_the_figures_are_those_of_the_scores():
    draw = np.random.default_rng(0)
    members, nonmembers = draw.normal(1, 1, 1500), draw.normal(0, 1, 1200)
    found = membership_of("reference", members, nonmembers, 0.9)
    assert (found.signal, found.num_members, found.num_nonmembers) == ("reference", 1500, 1200)
    assert (found.auc.value, found.auc.low, found.auc.high) == auc(members, nonmembers, 0.9)
    assert found.auc.confidence == 0.9
    assert found.balanced_accuracy == balanced_accuracy(members, nonmembers)
    hits = tpr_at_fpr(members, nonmembers, 0.01, 0.9)
    assert found.tpr_at_1 is not None
    assert (found.tpr_at_1.value, found.tpr_at_1.low, found.tpr_at_1.high) == hits
    assert found.tpr_at_01 is None  # 10,000 others are needed
    assert 2 <= len(found.roc) <= MAX_POINTS
    assert (found.roc[0], found.roc[-1]) == ((0.0, 0.0), (1.0, 1.0))


@pytest.mark.parametrize(
    ("members", "nonmembers", "area"),
    [([1.0], [0.0], 1.0), ([0.0], [0.0], 0.5), ([0.0] * 30, [1.0] * 40, 0.0), ([2.0, 3.0], [1.0, 0.0, 0.5], 1.0)],
)
def test_few_scores_and_extremes_are_stated_too(members, nonmembers, area):
    found = membership_of("loss", members, nonmembers)
    assert found.auc.value == area
    assert found.auc.low < found.auc.high
    assert found.tpr_at_1 is None


def test_no_scores_and_nan_are_refused():
    with pytest.raises(ConfigError):
        membership_of("loss", [], [1.0])
    with pytest.raises(RunFailed, match="NaN"):
        membership_of("loss", [float("nan")], [1.0])
