from __future__ import annotations

import pytest

from emulator.dial.targets import read_target
from offsite.artefacts.owner import DialFigures

FIGURES = DialFigures(recovery=0.7, recovery_nats=0.65, withheld=0.4, gap=1.9, num_bytes=60_000_000)


@pytest.mark.parametrize(
    ("words", "value", "shown", "is_met"),
    [
        ("recovery=0.7", 0.7, "recovery at least 0.7", True),
        ("recovery=0.71", 0.71, "recovery at least 0.71", False),
        ("gap=1.5", 1.5, "gap at least 1.5", True),
        ("withheld=.4", 0.4, "withheld at least 0.4", True),
        ("withheld = 0.5", 0.5, "withheld at least 0.5", False),
        ("bytes=60MB", 60e6, "bytes at most 60\N{NO-BREAK SPACE}MB", True),
        ("bytes=0.05GB", 50e6, "bytes at most 50\N{NO-BREAK SPACE}MB", False),
        ("bytes=70000000", 70e6, "bytes at most 70\N{NO-BREAK SPACE}MB", True),
        ("bytes=70e6 b", 70e6, "bytes at most 70\N{NO-BREAK SPACE}MB", True),
    ],
)
def test_a_target_is_a_figure_and_its_bound(words, value, shown, is_met):
    target = read_target(words)
    assert target.value == pytest.approx(value)
    assert target.shown() == shown
    assert target.is_met(FIGURES) is is_met


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("0.8", "expected NAME=VALUE of recovery, gap, withheld, bytes, as recovery=0.8"),
        ("", "expected NAME=VALUE"),
        ("recovry=0.8", "no figure 'recovry', expected one of .*; did you mean 'recovery'?"),
        ("recovery=2", "expected more than 0 and at most 1, share of the gain"),
        ("recovery=0", "expected more than 0 and at most 1"),
        ("recovery=80%", "expected a number, share of the gain"),
        ("recovery=-1", "expected a number"),
        ("recovery=nan", "expected a number"),
        ("gap=1", "expected more than 1"),
        ("withheld=0", "expected more than 0"),
        ("withheld=0.3nats", "expected a number, nats per token"),
        ("bytes=60XB", "expected a number and B, kB, MB or GB, as bytes=60MB"),
        ("bytes=MB", "expected a number and B"),
        ("bytes=0", "expected more than 0"),
        ("bytes=1e99", "at most 1e.15"),
    ],
)
def test_what_is_no_target_is_told(words, told):
    with pytest.raises(ValueError, match=told):
        read_target(words)
