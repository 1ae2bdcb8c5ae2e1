"""Attacks on the auditor: private runs that break their promise in known ways, and one that keeps it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from offsite.gates import MIN_CANARIES

PRIVACY = Path(__file__).resolve().parents[2] / "benchmarks" / "privacy"
NOISE = {"correct": 7.4, "no noise": 7.4, "no clip": 7.4, "repeated": 0.76}  # with which a correct run states about 2
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


def judged(lab, setting, way, seed):
    guarantee = lab.stated(setting, way, NOISE[way])
    assert 1.8 < guarantee.spent.epsilon < 2.2
    found = lab.measure(way, guarantee, seed, setting)
    bound = found.canaries.bound
    assert bound.ceiling > guarantee.spent.epsilon  # the audit could have failed it
    assert bound.num_canaries >= MIN_CANARIES
    return found.gate(guarantee), bound


@pytest.mark.parametrize("way", BROKEN)
def test_row_30_a_broken_private_run_is_failed(lab, setting, way):
    verdicts = []
    while len(verdicts) < 3 and verdicts.count("failed") < max(1, len(verdicts) - 1):  # noise that no seed leads to
        gate, bound = judged(lab, setting, way, 1 + len(verdicts))
        verdicts.append(gate.verdict)
        assert gate.found == bound.epsilon
        assert (bound.epsilon > gate.limit) == (gate.verdict == "failed")
    assert verdicts in (["failed"], ["passed", "failed", "failed"])


def test_row_30_a_correct_private_run_is_not(lab, setting):
    gate, bound = judged(lab, setting, "correct", 1)
    assert gate.verdict == "passed"
    assert bound.epsilon < 1  # a bound near the claim would need a far better attack


@pytest.mark.slow
@pytest.mark.parametrize("way", ["correct", *BROKEN])
def test_row_30_over_several_seeds(lab, setting, way):
    failed = sum(judged(lab, setting, way, seed)[0].verdict == "failed" for seed in range(2, 8))
    assert failed == 0 if way == "correct" else failed >= 5


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
