"""The figures of an exchange: hand-worked values, and that the two recoveries differ as the text says."""

from __future__ import annotations

import math

import pytest

from offsite.evaluation.figures import gap, recovery, recovery_nats, withheld


def test_recovery_in_nats_is_less_flattering_where_zero_shot_is_far_off() -> None:
    assert recovery(20.3, 124.4, 14.0) == pytest.approx(104.1 / 110.4)
    found = recovery_nats(20.3, 124.4, 14.0)
    assert found == pytest.approx(math.log(124.4 / 20.3) / math.log(124.4 / 14.0))
    assert found is not None
    assert round(found, 2) == 0.83


@pytest.mark.parametrize("figure", [recovery, recovery_nats])
def test_nothing_to_recover_is_said_to_be_none(figure: object) -> None:
    assert figure(9.0, 13.0, None) is None  # type: ignore[operator]
    assert figure(9.0, 13.0, 13.0) is None  # type: ignore[operator]


def test_withheld_is_above_zero_only_while_the_emulator_is_worse() -> None:
    assert withheld(math.e * 13.0, 13.0) == pytest.approx(1.0)
    assert withheld(13.0, 13.0) == 0
    assert withheld(11.5, 13.1) < 0


def test_gap_of_an_accuracy_of_zero_is_none() -> None:
    assert gap(0.3, 0.0) is None
    assert gap(12.0, 9.0) == pytest.approx(4 / 3)
