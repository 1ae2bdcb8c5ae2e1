"""Attacks on the auditor: private runs that break their promise in known ways, and one that keeps it.

The fast tests try the auditor, not the noise: they draw it from a seeded source, so that each has one outcome.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from offsite.audits.gates import MIN_CANARIES

PRIVACY = Path(__file__).resolve().parents[2] / "benchmarks" / "privacy"
NOISE = {"correct": 7.4, "no noise": 7.4, "no clip": 7.4, "repeated": 0.872}  # with which a correct run states about 2
BROKEN = ("no noise", "no clip", "repeated")


@pytest.fixture(scope="module")
def lab():
    spec = importlib.util.spec_from_file_location("privacy_lab", PRIVACY / "lab.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setting(lab):
    """A model of one block and a few thousand numbers."""
    return lab.Setting(width=32, num_blocks=1, batch_size=100)


@pytest.fixture
def seeded(monkeypatch):
    monkeypatch.setattr("offsite.audits.noise._entropy", random.Random(1).randbytes)


def judged(lab, setting, way, seed):
    if way == "repeated":  # rows that stand fifty times are many rows
        setting = replace(setting, batch_size=200)
    guarantee = lab.stated(setting, way, NOISE[way])
    assert 1.8 < guarantee.spent.epsilon < 2.2
    found = lab.measure(way, guarantee, seed, setting)
    bound = found.canaries.bound
    assert bound.ceiling > guarantee.spent.epsilon  # the audit could have failed it
    assert bound.num_canaries >= MIN_CANARIES
    gate = found.gate(guarantee)
    assert gate.found == bound.epsilon
    assert (bound.epsilon > gate.limit) == (gate.verdict == "failed")
    return gate, bound


@pytest.mark.parametrize("way", BROKEN)
def test_row_30_a_broken_private_run_is_failed(lab, setting, way, seeded):
    gate, bound = judged(lab, setting, way, 1)
    assert gate.verdict == "failed"
    assert bound.epsilon > gate.limit + 0.2


def test_row_30_a_correct_private_run_is_not(lab, setting, seeded):
    gate, bound = judged(lab, setting, "correct", 1)
    assert gate.verdict == "passed"
    assert bound.epsilon < 1  # a bound near the claim would need a far better attack


@pytest.mark.slow
@pytest.mark.parametrize("way", ["correct", *BROKEN])
def test_row_30_over_several_seeds(lab, setting, way):
    failed = sum(judged(lab, setting, way, seed)[0].verdict == "failed" for seed in range(2, 6))
    assert failed <= 1 if way == "correct" else failed >= 3  # at 95 % one of twenty correct runs may be failed


def test_row_30_the_committed_benchmark_says_so_of_twenty_seeds():
    found = json.loads((PRIVACY / "results" / "power.json").read_text())
    assert not found["dirty"]
    rows = {(row["way"], row["claimed"]): row for row in found["rows"]}
    assert all(row["runs"] >= 20 for row in rows.values())
    for (way, _), row in rows.items():
        if way == "correct":
            assert row["share_failed"] <= 0.05
        elif row["could_fail"]:
            assert row["share_failed"] >= 0.95
        else:
            assert row["failed"] == 0
    assert all(rows[way, 2.0]["could_fail"] for way in ["correct", *BROKEN])
