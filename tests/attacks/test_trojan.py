"""Row 20, a trojan adapter: a crude one is flagged, a mild one may not be, and the page says how often it was not."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

import server.aggregation.screening
from server.aggregation.aggregate import Contribution
from server.aggregation.screening import screen

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "screening"
RESULT = BENCHMARK / "results" / "tiny-llama-cpu.json"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("screening_run", BENCHMARK / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lab(bench):
    return bench.Lab(bench.Setting(steps=30, pretraining_steps=40), 1)


def test_row_20_a_crude_trojan_is_flagged(bench, lab):
    honest = bench.honest_of(lab)
    for name, flagged in (("none", False), ("crude, scaled by 8", True)):
        found = bench.round_of(lab, honest, bench.ATTACKS[name])
        assert (bench.TROJAN in found["flags"]) is flagged
        assert len(found["scores"]) == 8
        for scores in found["scores"].values():
            assert scores.keys() == {"distance", "cosine", "concentration", "size"}
            assert all(map(math.isfinite, scores.values()))
    assert found["scores"][bench.TROJAN]["size"] > 3.5
    assert found["averaged"]["triggered"] > 0.5  # scaled up eightfold, it is one eighth of the mean


def test_row_20_a_trojan_that_copies_an_honest_update_is_not(bench, lab):
    """Why it is no guarantee: figures of an update are all it goes by, and an attacker may know them."""
    honest = bench.honest_of(lab)
    found = screen([Contribution(client, update) for client, update in {**honest, "x": honest["client-0"]}.items()])
    assert "x" not in found.flags


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RESULT.read_text(encoding="utf-8"))


def test_row_20_the_page_shows_what_was_measured(bench, recorded):
    page = (BENCHMARK / "README.md").read_text(encoding="utf-8")
    assert bench.table(recorded) in page
    assert "no guarantee" in page
    assert "no guarantee" in server.aggregation.screening.__doc__
    assert set(recorded["attacks"]) == set(bench.ATTACKS)


def test_row_20_misses_are_recorded_and_count_what_the_rounds_say(bench, recorded):
    for name, found in recorded["attacks"].items():
        flagged = sum(bench.TROJAN in one["flags"] for one in found["rounds"])
        accused = sum(len(one["flags"]) for one in found["rounds"]) - (flagged if name != "none" else 0)
        assert found["num_rounds"] == len(found["rounds"]) == recorded["config"]["rounds"]
        assert found["num_flagged"] == (flagged if name != "none" else 0)
        assert found["num_honest_flagged"] == accused
        for one in found["rounds"]:
            limit = recorded["config"]["limit"]
            assert one["flags"].keys() == {c for c, scores in one["scores"].items() if max(scores.values()) > limit}
    attacks = recorded["attacks"]
    assert attacks["mild"]["num_flagged"] < attacks["mild"]["num_rounds"] / 2  # most mild ones are missed
    assert attacks["crude, scaled by 8"]["num_flagged"] == attacks["crude, scaled by 8"]["num_rounds"]
