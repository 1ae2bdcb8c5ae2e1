"""What is said of the gates beforehand, by the numbers that the gates themselves ask for."""

from __future__ import annotations

import pytest

from client.audit.config import AuditBundleConfig
from client.join.outlook import MOST_ROWS, Numbers, all_can_pass, audit_share, expected_gates, num_canaries

ENOUGH = {"num_train": 2800, "num_aside": 1200, "steps": 200, "num_drawn": 2800, "num_asked": 200, "num_canaries": 280}


def outlook(**changes) -> dict[str, str]:
    return {one.name: one.outlook for one in expected_gates(Numbers(**{**ENOUGH, **changes}))}


def test_with_enough_of_everything_all_can_pass():
    assert all_can_pass(expected_gates(Numbers(**ENOUGH)))
    assert list(outlook()) == ["scan", "auc", "tpr_at_1", "secrets", "verbatim", "inversion"]


SHORT = {
    "rows set aside": ({"num_aside": 999}, {"auc": "not measurable", "tpr_at_1": "not measurable"}),
    "none set aside": ({"num_aside": 0}, {"auc": "not measurable", "tpr_at_1": "not measurable"}),
    "rows trained on": (
        {"num_train": 99, "num_drawn": 99, "num_asked": 99},
        {"auc": "not measurable", "tpr_at_1": "not measurable", "verbatim": "not measurable", "inversion": "will fail"},
    ),
    "canaries": ({"num_canaries": 0}, {"secrets": "not measurable"}),
    "long rows": ({"num_asked": 99}, {"verbatim": "not measurable"}),
    "steps": ({"steps": 9}, {"inversion": "will fail"}),
    "epochs": ({"num_drawn": 280}, {"secrets": "not measurable", "verbatim": "not measurable"}),
    "text": ({"writes": False, "num_asked": 0}, {"secrets": "not measurable", "verbatim": "not measurable"}),
    "a head": ({"writes": False, "num_canaries": 0}, {"secrets": "not measurable"}),
}


@pytest.mark.parametrize("what", SHORT)
def test_too_few(what):
    changes, expected = SHORT[what]
    assert {name: found for name, found in outlook(**changes).items() if found != "measurable"} == expected


SMALL = {"num_train": 270, "num_aside": 0, "num_drawn": 270, "num_canaries": 30, "num_coins": 270}


def test_with_300_rows_all_can_pass_by_retunings_and_their_cost_is_said():
    assert all_can_pass(expected_gates(Numbers(**{**ENOUGH, **SMALL})))
    told = {one.name: one.told for one in expected_gates(Numbers(**{**ENOUGH, **SMALL}))}
    assert told["auc"].startswith("by 12 retunings on random halves of 270 rows: about 6 times what tuning takes")
    for changes, few in (
        ({"retunings": 0}, {"auc", "tpr_at_1"}),
        ({"num_coins": 99}, {"auc", "tpr_at_1"}),
        ({"num_coins": 0}, {"auc", "tpr_at_1"}),
        ({"retunings": 2}, {"tpr_at_1"}),  # 10 guesses: not even coins would keep the limit
    ):
        assert {name for name, found in outlook(**{**SMALL, **changes}).items() if found != "measurable"} == few
    assert outlook(**{**SMALL, "epsilon": 20.0})["auc"] == "not measurable"


def test_rows_that_an_audit_scores_at_most():
    assert AuditBundleConfig.model_fields["rows"].default == MOST_ROWS


def test_a_private_run_is_held_to_its_claim():
    assert outlook(epsilon=8.0, num_aside=0) == dict.fromkeys(("scan", "budget", "epsilon"), "measurable")
    assert outlook(epsilon=8.0, num_canaries=99)["epsilon"] == "not measurable"
    weak = outlook(epsilon=20.0, num_aside=0)
    assert list(weak)[:5] == ["scan", "budget", "epsilon", "canaries", "secrets"]
    assert weak["auc"] == "not measurable"


def test_rows_are_set_aside_where_that_is_of_use():
    assert audit_share(3999) == 0.0
    assert audit_share(4000) == 0.3
    assert 1000 < audit_share(100_000) * 100_000 < 1500
    assert [num_canaries(rows, is_private=False) for rows in (10, 400, 10**6)] == [8, 40, 1000]
    assert num_canaries(10, is_private=True) == 1000
