"""From tried sizes to any between them, and back: by a world whose law is known, and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from dial_law import BASE, LORA_FULL, ZERO_SHOT, bytes_of, kl_of, plugged_of, recovery_of, tuned_of

from emulator.dial.exploration import Rung, Tried, figures_of
from emulator.dial.predict import answer, curve
from emulator.dial.targets import read_target

SIZES = (0.2, 0.33, 0.5, 0.67, 0.85)
SHARES = [number / 100 for number in range(1, 101)]


def tried(size, *, method="width", bend=0.0):
    figures = figures_of(ZERO_SHOT, LORA_FULL, tuned_of(size), plugged_of(size, bend), bytes_of(size))
    return Tried(
        method=method,
        size=size,
        package_digest=BASE,
        field_kl=kl_of(size),
        emulator_zero_shot=99.0,
        emulator_tuned=tuned_of(size),
        plugged_in=plugged_of(size, bend),
        scale=0.5,
        withheld_zero_shot=math.log(99.0 / ZERO_SHOT),
        figures=figures,
    )


def law(sizes=SIZES, rungs=(), **more):
    ladder = [Rung(method="width", size=size, field_kl=kl_of(size), num_bytes=bytes_of(size)) for size in rungs]
    return curve(
        more.get("method", "width"),
        [tried(size, **more) for size in sizes],
        ladder,
        zero_shot=ZERO_SHOT,
        lora_full=LORA_FULL,
    )


def test_a_tried_size_is_predicted_as_it_was_measured():
    found = law()
    for size in SIZES:
        figures = found.at(size)
        assert figures.recovery == pytest.approx(recovery_of(size))
        assert figures.withheld == pytest.approx(math.log(tuned_of(size) / ZERO_SHOT))
        assert figures.gap == pytest.approx(tuned_of(size) / plugged_of(size))
        assert figures.num_bytes == bytes_of(size)
    assert not found.is_turned


def test_halfway_by_hand():
    """At 0.4 between 0.2 and 0.6: KL 1.28 and 0.32, mean 0.8; ln tuned is straight in KL; recovery on the line."""
    found = law(sizes=(0.2, 0.6, 0.9))
    log_tuned = math.log(ZERO_SHOT) + 0.05 + 0.5 * 0.8
    figures = found.at(0.4)
    assert figures.withheld == pytest.approx(0.45)
    assert figures.recovery == pytest.approx(0.82 - 0.36 * 0.45)
    plugged = ZERO_SHOT - figures.recovery * (ZERO_SHOT - LORA_FULL)
    assert figures.gap == pytest.approx(math.exp(log_tuned) / plugged)
    assert figures.recovery_nats == pytest.approx(math.log(ZERO_SHOT / plugged) / math.log(ZERO_SHOT / LORA_FULL))


def test_sizes_without_a_client_bring_a_prediction_nearer():
    truth, coarse = recovery_of(0.4), law(sizes=(0.2, 0.6, 0.9)).at(0.4).recovery
    fine = law(sizes=(0.2, 0.6, 0.9), rungs=(0.4,)).at(0.4).recovery
    assert fine == pytest.approx(truth)
    assert abs(coarse - truth) > 0.01


def test_nothing_is_said_beyond_the_tried_sizes():
    for size in (0.19, 0.86):
        with pytest.raises(ValueError, match="outside of what was measured"):
            law().at(size)
    beyond = law(rungs=(0.1, 0.95))
    with pytest.raises(ValueError, match="outside of what was measured"):
        beyond.at(0.95)


@pytest.mark.parametrize("words", ["recovery=0.7", "recovery=0.6", "gap=1.5", "withheld=0.2", "bytes=150MB"])
def test_the_size_found_is_the_last_that_gives_what_is_asked(words):
    target, found = read_target(words), law(rungs=(0.26, 0.42, 0.58, 0.76))
    got = answer(target, [found], [SHARES])
    assert got.is_met
    assert target.is_met(got.predicted)
    step = -0.01 if target.name == "recovery" else 0.01
    assert not target.is_met(found.at(got.size + step)), "a neighbour on the other side gives it, too"


def test_inversion_by_hand():
    """With ln tuned = 0.05 + KL / 2, recovery 0.7 is at KL (0.12 / 0.36 - 0.05) * 2 = 0.5667: size 1 - sqrt(KL / 2)."""
    rungs = [share for share in SHARES if 0.2 < share < 0.85 and share not in SIZES]
    got = answer(read_target("recovery=0.7"), [law(rungs=rungs)], [SHARES])
    wanted = 1 - math.sqrt((0.12 / 0.36 - 0.05) * 2 / 2)
    assert got.size == pytest.approx(math.ceil(wanted * 100) / 100)


@pytest.mark.parametrize(
    ("words", "size"), [("recovery=0.95", 0.85), ("withheld=5", 0.2), ("gap=9", 0.2), ("bytes=10MB", 0.2)]
)
def test_what_no_tried_size_gives_is_answered_by_the_nearest(words, size):
    got = answer(read_target(words), [law()], [SHARES])
    assert not got.is_met
    assert got.size == size


@pytest.mark.parametrize(("words", "size"), [("recovery=0.1", 0.2), ("gap=1.01", 0.85), ("bytes=9GB", 0.85)])
def test_what_every_size_gives_is_answered_within_those_tried(words, size):
    got = answer(read_target(words), [law()], [SHARES])
    assert got.is_met
    assert got.size == size


def test_of_two_methods_the_better_one_is_taken():
    one, other = law(), law(method="drop", bend=0.1)
    for words in ("recovery=0.6", "withheld=0.2"):
        got = answer(read_target(words), [one, other], [SHARES, SHARES])
        assert got.method == "drop"


def test_sizes_out_of_order_are_told_and_put_in_order():
    points = [tried(size) for size in SIZES]
    worse = points[2].model_copy(update={"field_kl": kl_of(0.2) + 1})
    found = curve("width", [*points[:2], worse, *points[3:]], [], zero_shot=ZERO_SHOT, lora_full=LORA_FULL)
    assert found.is_turned
    recoveries = [found.at(size).recovery for size in SHARES if 0.2 <= size <= 0.85]
    assert recoveries == sorted(recoveries)
