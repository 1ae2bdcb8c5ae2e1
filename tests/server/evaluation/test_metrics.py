"""The figures, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite.evaluation.figures import gap, recovery, recovery_nats
from offsite.evaluation.results import Summary
from server.evaluation.metrics import IN_NATS, REFERENCES, compare, compare_nats, summarise

PERPLEXITIES = st.floats(1.0, 1e6)


def one(value):
    return Summary(mean=value, deviation=None, values={"seed0": value})


def test_recovery_of_the_prototypes_best_row():
    """Zero-shot 18.3, LoRA on the full model 7.7, plugged in 9.3: 9.0 of 10.6 points."""
    assert recovery(9.3, 18.3, 7.7) == pytest.approx(9.0 / 10.6)


@given(zero_shot=PERPLEXITIES, reference=PERPLEXITIES)
def test_recovery_is_one_at_the_reference_and_none_at_zero_shot(zero_shot, reference):
    if zero_shot == reference:
        assert recovery(reference, zero_shot, reference) is None
    else:
        assert recovery(reference, zero_shot, reference) == pytest.approx(1.0)
        assert recovery(zero_shot, zero_shot, reference) == 0.0


def test_recovery_has_one_sign_for_perplexity_and_accuracy():
    assert recovery(15.0, 18.0, 8.0) == pytest.approx(0.3)  # perplexity fell
    assert recovery(0.33, 0.30, 0.40) == pytest.approx(0.3)  # accuracy rose
    assert recovery(20.0, 18.0, 8.0) == pytest.approx(-0.2)  # plugging in did harm
    assert recovery(7.0, 18.0, 8.0) == pytest.approx(1.1)  # better than the reference


def test_recovery_without_a_reference_is_none():
    assert recovery(9.3, 18.3, None) is None


def test_gap_is_emulator_tuned_over_plugged_in():
    assert gap(12.0, 9.6) == pytest.approx(1.25)
    assert gap(0.3, 0.0) is None


def nats_rows(**changes):
    rows = {
        "zero_shot": one(math.e),
        "emulator_zero_shot": one(math.e**3.5),
        "emulator_tuned": summarise({"seed0": math.e**2, "seed1": math.e**0.5}),
        "plugged_in": summarise({"seed0": math.e**0.5, "seed1": math.e**0.25}),
        "lora_full": one(math.e**0.2),
    }
    return {**rows, **changes}


def test_what_is_withheld_is_told_seed_by_seed_after_tuning_and_before_it():
    """Full zero-shot 1 nat; tuned emulators 2 and 0.5 nats: one falls short by 1, the other is better by 0.5."""
    found = compare_nats(nats_rows())
    assert found["withheld_after_tuning"].values == pytest.approx({"seed0": 1.0, "seed1": -0.5})
    assert found["withheld_after_tuning"].mean == pytest.approx(0.25)
    assert found["withheld_zero_shot"].mean == pytest.approx(2.5)
    assert found["capability"] == found["withheld_zero_shot"]  # its first name


def test_an_emulator_as_good_as_the_model_withholds_nothing():
    same = compare_nats(nats_rows(emulator_zero_shot=one(math.e), emulator_tuned=one(math.e), plugged_in=one(math.e)))
    assert (same["capability"].mean, same["withheld_after_tuning"].mean) == (0.0, 0.0)


def test_recoveries_in_nats_are_of_the_logarithms():
    """From 1 nat to 0.5 and to 0.25, where the reference reaches 0.2: 0.5 / 0.8 and 0.75 / 0.8."""
    found = compare_nats(nats_rows())
    assert found["recovery_nats_vs_lora"].values == pytest.approx({"seed0": 0.625, "seed1": 0.9375})
    assert found["recovery_nats_vs_ceiling"] is None
    assert found["recovery_nats_vs_full"] is None
    assert set(found) == {*IN_NATS, "withheld_after_tuning", "withheld_zero_shot", "capability"}
    assert set(IN_NATS) == {name.replace("recovery", "recovery_nats") for name in REFERENCES}
    far = nats_rows(zero_shot=one(124.4), plugged_in=one(20.3), lora_full=one(14.0))
    assert compare(far)["recovery_vs_lora"].mean == pytest.approx(0.94, abs=0.005)
    assert compare_nats(far)["recovery_nats_vs_lora"].mean == recovery_nats(20.3, 124.4, 14.0)


def test_mean_and_sample_deviation():
    found = summarise({"a": 9.0, "b": 10.0, "c": 11.0})
    assert (found.mean, found.deviation) == (10.0, 1.0)
    assert found.values == {"a": 9.0, "b": 10.0, "c": 11.0}
    assert summarise({"a": 9.0}).deviation is None


def test_the_whole_table_is_compared_seed_by_seed():
    rows = {
        "zero_shot": one(18.0),
        "emulator_tuned": summarise({"seed0": 12.0, "seed1": 13.0}),
        "plugged_in": summarise({"seed0": 10.0, "seed1": 9.0}),
        "lora_full": one(8.0),
        "ceiling": summarise({"x": 6.0, "y": 8.0}),
    }
    found = compare(rows)
    assert found["recovery_vs_lora"].values == {"seed0": 0.8, "seed1": 0.9}
    assert found["recovery_vs_lora"].mean == pytest.approx(0.85)
    assert found["recovery_vs_ceiling"].values == {"seed0": 8 / 11, "seed1": 9 / 11}
    assert found["recovery_vs_full"] is None
    assert found["gap"].values == {"seed0": 1.2, "seed1": 13 / 9}
    assert set(found) == {*REFERENCES, "gap"}


@given(st.lists(PERPLEXITIES, min_size=1, max_size=5), PERPLEXITIES, PERPLEXITIES)
def test_the_mean_recovery_is_the_recovery_of_the_mean(plugged_in, zero_shot, reference):
    """Recovery is linear in what is plugged in, so that it does not matter where seeds are averaged."""
    if abs(zero_shot - reference) < 1e-3 * zero_shot:
        return
    named = {str(number): value for number, value in enumerate(plugged_in)}
    rows = {
        "zero_shot": one(zero_shot),
        "emulator_tuned": summarise(named),
        "plugged_in": summarise(named),
        "full": one(reference),
    }
    mean = compare(rows)["recovery_vs_full"].mean
    assert mean == pytest.approx(recovery(summarise(named).mean, zero_shot, reference), rel=1e-6, abs=1e-6)


def test_an_undefined_gap_is_null_for_all_seeds():
    rows = {
        "zero_shot": one(0.3),
        "emulator_tuned": summarise({"a": 0.3, "b": 0.2}),
        "plugged_in": summarise({"a": 0.0, "b": 0.4}),
    }
    assert compare(rows)["gap"] is None
