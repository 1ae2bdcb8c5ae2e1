"""Whatever a template puts in is escaped, as content and as attribute; nothing is left out or made up in silence."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import (
    ChoiceLoader,
    DictLoader,
    TemplateAssertionError,
    TemplateNotFound,
    TemplateRuntimeError,
    UndefinedError,
)
from markupsafe import Markup
from page_lab import EVIL, Outline

from offsite.report.engine import environment, render

PRINTABLE = st.text(st.characters(exclude_categories=["C"], exclude_characters="\r"), max_size=40)


def rendered(template, **values):
    """A template that is not in a file, as the engine makes it."""
    loader = ChoiceLoader([DictLoader({"made.html.jinja": template}), environment().loader])
    return environment().overlay(loader=loader).get_template("made.html.jinja").render(values)


@given(PRINTABLE, PRINTABLE)
def test_any_text_comes_back_as_text(content, attribute):
    made = rendered('<p title="{{ attribute }}">{{ content }}</p>', content=content, attribute=attribute)
    assert made == f'<p title="{html.escape(attribute)}">{html.escape(content)}</p>'
    read = Outline(made)
    assert read.tags == [("p", ("title",)), ("/p", ())]
    assert read.said[0] == attribute
    assert read.text == content


def test_text_of_a_template_is_written_as_that_of_a_value():
    assert rendered("<p>It's {{ word }}</p>", word="it's") == "<p>It&#x27;s it&#x27;s</p>"


@pytest.mark.parametrize(
    "template",
    [
        "{% macro p(text) %}<p>{{ text }}</p>{% endmacro %}{{ p(evil) }}",
        "{% macro p() %}<p>{{ caller() }}</p>{% endmacro %}{% call p() %}{{ evil }}{% endcall %}",
        "{% set text = evil %}<p>{{ text }}</p>",
        "<p>{{ evil if evil else '' }}</p>",
        "<p>{{ '' ~ evil }}</p>",
        "{% set text %}{{ evil }}{% endset %}<p>{{ text }}</p>",
        "{% for text in [evil] %}<p>{{ text }}</p>{% endfor %}",
        "{% from 'parts.html.jinja' import bullets %}<p>{{ bullets([evil]) }}</p>",
    ],
)
def test_no_way_around_leaves_text_unescaped(template):
    read = Outline(rendered(template, evil=EVIL))
    assert {tag for tag, _ in read.tags} <= {"p", "/p", "ul", "/ul", "li", "/li"}
    assert read.text == EVIL


def test_no_filter_marks_text_as_markup():
    with pytest.raises(TemplateAssertionError, match="No filter named 'safe'"):
        rendered("{{ text|safe }}", text="x")
    for name, filtered in environment().filters.items():
        shown = filtered(0.5, 1) if name == "fixed" else filtered(0.5)
        assert type(shown) is str, name


@pytest.mark.parametrize(
    "template", ["{{ gone }}", "{{ there.gone }}", "{% if gone %}{% endif %}", "{{ gone|number }}"]
)
def test_a_name_that_nobody_gave_is_an_error(template):
    with pytest.raises(UndefinedError):
        rendered(template, there={})


@dataclass
class Thing:
    word: str = "secret"


@pytest.mark.parametrize("value", [None, Thing(), ["a"], {"a": 1}, b"bytes", Path("a/path")])
def test_what_has_no_text_of_its_own_is_not_shown(value):
    with pytest.raises(TypeError, match=f"no text for a value of type {type(value).__name__}$"):
        rendered("{{ value }}", value=value)


@pytest.mark.parametrize(
    ("template", "made"),
    [
        ("<ul>\n  <li>one</li>\n  <li>two</li>\n</ul>\n", "<ul><li>one</li><li>two</li></ul>"),
        ("<p>\n  one\n  two\n</p>", "<p>one two</p>"),
        ("<p>\n  {{ a }}\n  two {{ a }}\n  and\n  {{ a }}\n</p>", "<p>A two A and A</p>"),
        ("{% if true %}\n  one\n{% endif %}\n", "one"),
        ("one\n{% if true %} two{% endif %}\nthree", "one twothree"),
        ("<b>one</b>\ntwo\n<b>three</b>", "<b>one</b>two<b>three</b>"),
        ("{# said\n of it #}\n<p>x</p>", "<p>x</p>"),
        ("a  b\tc", "a  b\tc"),
        ("<p>{{ two }}</p>", "<p>1\n  2</p>"),
        ('<i class="a"\n   title="b"></i>', '<i class="a" title="b"></i>'),
    ],
)
def test_line_breaks_lay_out_the_template_not_the_page(template, made):
    assert rendered(template, a="A", two="1\n  2") == made


def test_an_error_names_the_line_of_the_template():
    with pytest.raises(UndefinedError) as caught:
        rendered("<p>\n  one\n</p>\n<p>\n  {{ gone }}\n</p>\n")
    assert 5 in [entry.lineno + 1 for entry in caught.traceback if entry.name == "top-level template code"]


def test_a_new_page_is_a_template_that_extends_the_base():
    template = (
        '{% extends "base.html.jinja" %}\n'
        "{% block title %}{{ name }}{% endblock %}\n"
        "{% block main %}<h1>{{ name }}</h1>{% endblock %}\n"
        "{% block footer %}The end.{% endblock %}\n"
    )
    made = rendered(template, name=EVIL)
    read, plain = Outline(made), Outline(rendered(template, name="a name"))
    assert read.tags == plain.tags
    assert [tag for tag, _ in read.tags][:2] == ["html", "head"]
    assert "default-src 'none'; style-src 'unsafe-inline'" in read.said
    style = Path(environment().loader._template_root, "base.css").read_text(encoding="utf-8")
    assert f"<style>{style}</style>" in made
    for block in ("title", "main", "footer"):
        with pytest.raises(TemplateRuntimeError, match=f"'{block}'"):
            rendered(template.replace(f"block {block} ", f"block no_{block} "), name="x")


def test_only_files_of_the_package_are_templates():
    for name in ("../engine.py", "/etc/hostname", "run/../base.css"):
        with pytest.raises(TemplateNotFound):
            render(name, {})


def test_markup_of_a_templates_own_is_not_escaped_again():
    assert rendered("{{ made }}", made=Markup("<b>")) == "<b>"
