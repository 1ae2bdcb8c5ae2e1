from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import BaseModel, Field

from offsite import cli
from offsite.commands.settings import needed, panels
from offsite.commands.verbs import VERBS
from offsite.config import OUTPUT, PANELS, POSITIONAL, PRIVACY, REPEATED, USUAL, VerbConfig, declared, is_positional

BIG = ("tune", "distill", "evaluate", "federate serve", "seal")


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
    assert panels(ShownConfig) == {
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
    assert needed(ShownConfig) == ["MODEL", "[MORE]", "--data PATH", "-o PATH"]


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
    expected = [panel for panel in PANELS if panel in panels(settings(verb))]
    assert headings(shown) == [*expected, "Every verb"]
    required = [name for name, field in fields.items() if field.is_required()]
    assert (expected[:1] == ["Needed"]) == bool(required)
    first = shown.partition("\nNeeded:\n")[2].partition("\n\n")[0]
    for name, field in fields.items():
        typed = name.upper() if is_positional(field) else rf"(?:-\w, )?--{name.replace('_', '-')}"
        assert len(re.findall(rf"^  {typed}(?: |$)", shown, re.M)) == 1, name
        assert bool(re.search(rf"^  {typed}(?: |$)", first, re.M)) == (name in required), name


@pytest.mark.parametrize("verb", BIG)
def test_the_big_verbs_show_few_things_first(verb):
    rows = panels(settings(verb))
    assert list(rows)[:2] == ["Needed", "Usual"]
    assert 3 <= len(rows["Needed"]) + len(rows["Usual"]) <= 10
    assert len(rows) >= 4


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
