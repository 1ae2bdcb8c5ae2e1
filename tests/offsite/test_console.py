from __future__ import annotations

import io
import sys

import pytest

from offsite import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_people_read_stderr_and_stdout_stays_empty(capsys):
    console.say("one line")
    console.table("figures", ["model", "perplexity"], [["full", "18.3"], ["plugged in", "9.3"]])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "one line",
        "figures",
        "  model       perplexity",
        "  ----------  ----------",
        "  full              18.3",
        "  plugged in         9.3",
    ]


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress(40, "tune") as bar:
        for step in range(1, 41):
            now[0] += 1.0
            bar.update(step, loss=2.5, rate=1e-3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tune  1/40  loss 2.5  rate 0.001  0:39 left"
    assert [line.split()[1] for line in lines] == ["1/40", "11/40", "21/40", "31/40", "40/40"]
    assert lines[-1].endswith("0:00 left")


def test_time_left_counts_from_where_a_resumed_run_began(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress(5000, "distill", start=1000) as bar:
        now[0] += 1.0
        bar.update(1001)
    assert capsys.readouterr().err.endswith("1:06:39 left\n")


def test_progress_on_a_terminal_is_a_bar_that_ends_its_line_also_on_failure(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)

    def work():
        with console.progress(4, "tune") as bar:
            bar.update(2, loss=1.0)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert "[############............] tune  2/4  loss 1" in screen.getvalue()
    assert screen.getvalue().endswith("\n")
