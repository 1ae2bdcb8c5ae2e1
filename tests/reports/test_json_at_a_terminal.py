"""At a terminal a line of up to 900 characters of JSON stood among what people read."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from offsite import cli


def inspected(bundle, *flags):
    return ["inspect", str(bundle.path), *flags]


def test_elsewhere_the_last_line_is_json(tiny_bundle, capsys):
    assert cli.run(inspected(tiny_bundle)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verified"] is True


def test_at_a_terminal_there_is_none(tiny_bundle, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.run(inspected(tiny_bundle)) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "every file agrees with the manifest" in shown.err


def test_unless_it_is_asked_for(tiny_bundle, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.run(inspected(tiny_bundle, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is True


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "is_shown"), [((), False), (("--json",), True)])
def test_on_a_real_terminal(tiny_bundle, flags, is_shown):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "offsite", *inspected(tiny_bundle, *flags)]
    try:
        process = subprocess.Popen(words, stdout=theirs, stderr=subprocess.DEVNULL)
        os.close(theirs)
        found = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            found += part
        assert process.wait() == 0
    finally:
        os.close(ours)
    assert (b'"verified": true' in found) is is_shown
