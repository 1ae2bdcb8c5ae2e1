"""The templates as they are written: no way around escaping, nothing from outside, no layout twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import meta

from offsite.report.engine import environment

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "offsite" / "report" / "templates"
TEMPLATES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.jinja"))
SHEETS = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.css"))
PAGES = ["dial/page.html.jinja", "privacy/board.html.jinja", "privacy/page.html.jinja", "run/page.html.jinja"]
TAGS = re.compile(r"<[^>]*>")


def source(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def used(name):
    """The templates and style sheets that this one is made of, itself among them."""
    found = {name}
    if name.endswith(".jinja"):
        for other in meta.find_referenced_templates(environment().parse(source(name))):
            found |= used(other)
    return found


def test_every_template_and_style_sheet_is_part_of_a_page():
    assert set().union(*(used(page) for page in PAGES)) == {*TEMPLATES, *SHEETS}
    others = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix not in {".jinja", ".css"}]
    assert others == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_turns_escaping_off_or_marks_text_as_markup(name):
    text = source(name)
    for way in ("safe", "autoescape", "Markup", "__html__", "|e ", "escape", "tojson", "xmlattr"):
        assert not re.search(rf"\{{[{{%][^}}]*{re.escape(way)}", text), way
    assert environment().autoescape is True
    assert environment().loader.get_source(environment(), name)[0] == text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_value_is_put_where_escaping_is_enough(name):
    """In text, or inside the quotes of an attribute; not in a name, and in no script, style sheet or address."""
    text = re.sub(r"\{#.*?#\}", "", source(name), flags=re.DOTALL)
    text = re.sub(r"\{%.*?%\}", "", text, flags=re.DOTALL)
    marked = re.sub(r"\{\{.*?\}\}", "\N{BLACK SQUARE}", text, flags=re.DOTALL)
    for tag in TAGS.findall(marked):
        assert "\N{BLACK SQUARE}" not in re.sub(r'="[^"]*"', "", tag), tag
        assert not re.match(r"</?(script|link|img|iframe|object|form|base|a|embed)\b", tag), tag
        assert not re.search(r"\s(on\w+|style|href|src|action)=", tag), tag
    for style in re.findall(r"<style>(.*?)</style>", marked, flags=re.DOTALL):
        assert style == ""  # blocks and included files alone


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_base_has_the_layout_of_all_pages(name):
    if name == "base.html.jinja":
        assert source(name).count("<!doctype html>") == 1
    else:
        assert not re.search(r"<(!doctype|html|head|body|main|meta name=.viewport|style|footer)\b", source(name))
    assert (name in PAGES) == ('{% extends "base.html.jinja" %}' in source(name))


def rules(sheet):
    """Selector and what it sets, of every rule outside of media queries."""
    flat = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", source(sheet))
    return {(selector.strip(), body.strip()) for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", flat)}


def test_no_style_sheet_says_again_what_the_base_says():
    base = rules("base.css")
    assert len(base) > 50
    for sheet in SHEETS:
        if sheet != "base.css":
            assert rules(sheet)
            assert not rules(sheet) & base


@pytest.mark.parametrize("sheet", SHEETS)
def test_style_sheets_load_nothing_and_end_no_element(sheet):
    for words in ("url(", "@import", "//", "</", "expression("):
        assert words not in source(sheet), words


def test_text_becomes_markup_at_one_place_of_the_code():
    found = []
    packages = ("adapters", "client", "emulator", "offsite", "server")
    for path in sorted(path for package in packages for path in (ROOT / package).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"\bmarkupsafe\b|\bMarkup\(|__html__|<(p|div|span|td|svg)\b", text):
            found.append((path.relative_to(ROOT).as_posix(), text.count("Markup(")))
    assert found == [("offsite/report/engine.py", 1)]
