"""Numbers as people read them."""

from __future__ import annotations

import pytest

from offsite.report.numbers import MINUS, count, fixed, general, number, percent, rough, size, whole


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (4907.3, "4,907"),
        (18.34, "18.3"),
        (9.3, "9.30"),
        (0.8512, "0.851"),
        (-0.2, "\N{MINUS SIGN}0.200"),
        (0.0, "0.000"),
    ],
)
def test_about_three_digits_that_tell(value, shown):
    assert number(value) == shown


def test_a_tiny_number_keeps_its_order():
    assert number(2e-4) == "0.0002"
    assert number(-3.21e-7) == f"{MINUS}3.2e{MINUS}07"


def test_parameters_and_bytes():
    space = "\N{NO-BREAK SPACE}"
    assert [count(n) for n in (12, 12_300, 134_515_008, 7.2e9)] == [
        "12",
        f"12.3{space}k",
        f"135{space}M",
        f"7.2{space}G",
    ]
    assert [size(n) for n in (12, 658_923, 45.7e6)] == [f"12{space}bytes", f"659{space}kB", f"45.7{space}MB"]


def test_plain_forms():
    assert [whole(n) for n in (12, 40_800, 181_034.4)] == ["12", "40,800", "181,034"]
    assert [fixed(0.85, 3), fixed(9.966, 1)] == ["0.850", "10.0"]
    assert [general(n) for n in (0.5, 1.0, 0.7)] == ["0.5", "1", "0.7"]
    assert [rough(n) for n in (0.123, 0.02)] == ["0.12", "0.02"]
    assert [percent(0.33), percent(0.0312, 1), percent(0.5, 2)] == ["33%", "3.1%", "50.00%"]
