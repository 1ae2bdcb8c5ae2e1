"""A small version of ``benchmarks/exchange``: good, duplicate, tampered and oversized bundles at once."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("exchange_run", ROOT / "benchmarks" / "exchange" / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check(found, numbers):
    kinds = {}
    for outcome, count in found["outcomes"].items():
        kind, fate = outcome.split(": ", 1)
        kinds.setdefault(kind, {})[fate] = count
    assert kinds["good"] == {"verified": numbers["good"]}
    assert kinds["duplicate"] == {"verified": numbers["duplicate"]}
    assert sum(kinds["tampered"].values()) == numbers["tampered"]
    assert all(fate.startswith("refused") for fate in kinds["tampered"])
    assert kinds["oversized"] == {"refused, TooLarge": numbers["oversized"]}
    assert found["num_verified"] == numbers["good"]
    assert found["num_5xx"] == 0
    assert found["uploads_left"] == 0
    assert found["peak_bytes"] - found["rest_bytes"] < 300 * 2**20


@pytest.mark.slow
def test_each_good_one_is_taken_in_once_and_none_of_the_others(run, tmp_path):
    found = run.measure(tmp_path, 16, 40, random.Random(0))
    check(found, {"good": 24, "duplicate": 8, "tampered": 4, "oversized": 4})


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "exchange" / "results").glob("*.json")), ids=lambda p: p.stem
)
def test_the_committed_result_holds_what_the_readme_says(path):
    found = json.loads(path.read_text())
    assert not found["dirty"]
    assert (found["config"]["clients"], found["config"]["bundles"]) == (64, 200)
    check(found, {"good": 120, "duplicate": 40, "tampered": 20, "oversized": 20})
