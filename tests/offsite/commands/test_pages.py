from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from offsite import cli
from offsite.commands.verbs import GROUPS, PARTIES, VERBS

OFFSITE = Path(sys.executable).parent / "offsite"


def page(capsys, *words: str) -> str:
    assert cli.run([*words, "--help"]) == 0
    shown: str = capsys.readouterr().out
    return shown


def headings(text: str) -> list[str]:
    return re.findall(r"^(\w[\w ]*):$", text, re.M)


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("words", [(), *((group,) for group in GROUPS), *(tuple(verb.split()) for verb in VERBS)])
def test_a_page_fits_80_columns_and_a_pipe(capsys, words):
    shown = page(capsys, *words)
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert shown.isascii()
    assert "\x1b" not in shown
    assert "\n\n\n" not in shown


def test_all_verbs_stand_by_who_uses_them_a_line_each(capsys):
    shown = page(capsys)
    assert headings(shown) == [*PARTIES, "Options"]
    owner = shown.partition("\nThe owner:\n")[2].partition("\n\n")[0].splitlines()
    assert [line[2:23].rstrip() for line in owner[:5]] == ["owner", "distill", "mark", "audit package", "rehearse"]
    for line in owner:
        assert re.fullmatch(r"  \S.{23} \S.*", line), "wrapped, or out of its column"


def test_the_page_of_a_group_tells_who_uses_which(capsys):
    shown = page(capsys, "audit")
    assert headings(shown) == ["The owner", "The client", "Options"]
    assert re.search(r"The owner:\n  package .*\n  plugged-in .*\n\nThe client:\n  bundle ", shown)
    assert headings(page(capsys, "trust")) == ["Both parties", "Options"]


def test_the_list_of_verbs_needs_no_settings():
    lines = [
        "import sys",
        "from offsite import cli",
        "assert cli.run(['--help']) == cli.run(['audit', '--help']) == cli.run(['--version']) == 0",
        "slow = {'pydantic', 'torch', 'rich', 'yaml', 'cryptography'} & sys.modules.keys()",
        "assert not slow, slow",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, stdout=subprocess.DEVNULL)


def in_terminal(*words: str, columns: str, **environment: str) -> str:
    here, there = pty.openpty()
    usual = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    usual |= {"COLUMNS": columns, "TERM": "xterm"}
    subprocess.run([OFFSITE, *words], stdout=there, check=True, env=usual | environment)
    os.close(there)
    shown = b""
    while True:
        try:
            part = os.read(here, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(here)
    return shown.decode()


def test_a_terminal_gets_bold_headings_and_more_columns_where_it_has_them():
    shown = in_terminal("keygen", "--help", columns="120")
    assert "\x1b[1mUsual\x1b[0m:" in shown
    assert 80 < max(len(line.strip()) for line in shown.splitlines()) <= 100
    assert "\x1b" not in in_terminal("keygen", "--help", columns="80", NO_COLOR="1")
