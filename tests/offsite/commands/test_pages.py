from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import BaseModel, Field

from offsite import cli
from offsite.commands import pages
from offsite.commands.verbs import GROUPS, PARTIES, VERBS
from offsite.config import OUTPUT, PANELS, POSITIONAL, PRIVACY, REPEATED, USUAL, VerbConfig, declared, is_positional

BIG = ("tune", "distill", "evaluate", "federate serve", "seal")
OFFSITE = Path(sys.executable).parent / "offsite"


def settings(verb: str) -> type[VerbConfig]:
    found: type[VerbConfig] = cli._resolve(VERBS[verb].settings)
    return found


def page(capsys, *words: str) -> str:
    assert cli.run([*words, "--help"]) == 0
    shown: str = capsys.readouterr().out
    return shown


def headings(text: str) -> list[str]:
    return re.findall(r"^(\w[\w ]*):$", text, re.M)


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


class Inner(BaseModel):
    epsilon: float = Field(1.0, description="a bound")
    unit: str = Field("row", description="a unit")


class ShownConfig(VerbConfig):
    verb: ClassVar[str] = "shown"

    output: Path = Field(description="a folder", json_schema_extra=OUTPUT)
    rate: float = Field(0.5, description="a rate", json_schema_extra=PRIVACY)
    model: str = Field(description="a model", json_schema_extra=POSITIONAL)
    data: Path = Field(description="a file")
    more: str | None = Field(None, description="a word", json_schema_extra=USUAL | POSITIONAL)
    off: bool = Field(False, description="a switch", json_schema_extra=USUAL)
    on: bool = Field(True, description="another", json_schema_extra=USUAL)
    kind: Literal["a", "b"] = Field("a", description="a choice", json_schema_extra=USUAL)
    inner: Inner | None = Field(None, description="settings", json_schema_extra=PRIVACY)
    seeds: tuple[int, ...] = Field((1, 2), description="seeds", json_schema_extra=USUAL | REPEATED)
    columns: dict[str, str] = Field({}, description="names", json_schema_extra=USUAL)


def test_settings_stand_in_panels_and_what_is_needed_stands_first():
    assert pages.settings_rows(ShownConfig) == {
        "Needed": [("MODEL", "a model"), ("--data PATH", "a file"), ("-o, --output PATH", "a folder")],
        "Usual": [
            ("MORE", "a word"),
            ("--off", "a switch"),
            ("--on / --no-on", "another"),
            ("--kind a|b", "a choice [default: a]"),
            ("--seeds N", "seeds [default: 1,2]"),
            ("--columns NAME=VALUE,...", "names"),
        ],
        "Privacy": [
            ("--rate X", "a rate [default: 0.5]"),
            ("--inner NAME=VALUE,...", "settings; of epsilon, unit"),
        ],
    }
    assert pages._needed(ShownConfig) == ["MODEL", "[MORE]", "--data PATH", "-o PATH"]


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_setting_of_every_verb_has_a_panel_of_the_list(verb):
    for name, field in settings(verb).model_fields.items():
        if field.is_required():
            assert "panel" not in declared(field), f"{name}: what is needed has its panel by itself"
        else:
            assert declared(field).get("panel") in PANELS[1:], name


@pytest.mark.parametrize("verb", list(VERBS))
def test_the_page_of_a_verb_has_every_setting_once_in_the_panels_order(capsys, verb):
    shown, fields = page(capsys, *verb.split()), settings(verb).model_fields
    panels = [panel for panel in PANELS if panel in pages.settings_rows(settings(verb))]
    assert headings(shown) == [*panels, "Every verb"]
    needed = [name for name, field in fields.items() if field.is_required()]
    assert (panels[:1] == ["Needed"]) == bool(needed)
    first = shown.partition("\nNeeded:\n")[2].partition("\n\n")[0]
    for name, field in fields.items():
        typed = name.upper() if is_positional(field) else rf"(?:-\w, )?--{name.replace('_', '-')}"
        assert len(re.findall(rf"^  {typed}(?: |$)", shown, re.M)) == 1, name
        assert bool(re.search(rf"^  {typed}(?: |$)", first, re.M)) == (name in needed), name


@pytest.mark.parametrize("verb", BIG)
def test_the_big_verbs_show_few_things_first(verb):
    rows = pages.settings_rows(settings(verb))
    assert list(rows)[:2] == ["Needed", "Usual"]
    assert 3 <= len(rows["Needed"]) + len(rows["Usual"]) <= 10
    assert len(rows) >= 4


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
    assert [line[2:23].rstrip() for line in owner[:5]] == ["distill", "mark", "audit package", "rehearse", "job create"]
    for line in owner:
        assert re.fullmatch(r"  \S.{23} \S.*", line), "wrapped, or out of its column"


def test_the_page_of_a_group_tells_who_uses_which(capsys):
    shown = page(capsys, "audit")
    assert headings(shown) == ["The owner", "The client", "Options"]
    assert re.search(r"The owner:\n  package .*\n  plugged-in .*\n\nThe client:\n  bundle ", shown)
    assert headings(page(capsys, "trust")) == ["Both parties", "Options"]


def test_the_usage_says_all_that_is_needed(capsys):
    assert page(capsys, "tune").splitlines()[0] == (
        "Usage: offsite tune PACKAGE --data PATH -o PATH [OPTION | KEY=VALUE]..."
    )
    assert page(capsys, "plug-in").startswith("Usage: offsite plug-in MODEL ID --registry PATH -o PATH\n")
    assert page(capsys, "exchange", "status").startswith("Usage: offsite exchange status URL [SEALED] [OPTION")
    assert page(capsys, "realign").startswith("Usage: offsite realign PACKAGE ROUND --model")
    assert page(capsys, "report").startswith("Usage: offsite report VERB ...\n")


def test_no_line_ends_inside_a_flag_or_a_default(capsys):
    shown = page(capsys, "tune") + page(capsys, "audit", "bundle") + page(capsys, "federate", "serve")
    assert not re.search(r"\w-$", shown, re.M)
    assert not re.search(r"\[default:$", shown, re.M)


def in_terminal(*words: str, columns: str, **environment: str) -> str:
    here, there = pty.openpty()
    done = subprocess.run(
        [OFFSITE, *words],
        stdout=there,
        check=True,
        env={**os.environ, "COLUMNS": columns, "TERM": "xterm", **environment},
    )
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
    assert done.returncode == 0
    return shown.decode()


def test_a_terminal_gets_bold_headings_and_more_columns_where_it_has_them():
    shown = in_terminal("keygen", "--help", columns="120")
    assert "\x1b[1mUsual\x1b[0m:" in shown
    assert 80 < max(len(line.strip()) for line in shown.splitlines()) <= 100
    assert "\x1b" not in in_terminal("keygen", "--help", columns="80", NO_COLOR="1")
