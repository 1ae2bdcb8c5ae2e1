"""What tests of several pages share: the values that a page gives its template, and the same with hostile text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from html.parser import HTMLParser

from pydantic import BaseModel

EVIL = (
    "<script>alert(1)</script></style></title>--><!--\"' onload=x &amp; &lt; {{ 7 * 7 }} {% raw %} `\N{NO-BREAK SPACE}"
)
SWITCHES = {"anchor", "form"}  # words that code chooses and a template compares, never shows


class Outline(HTMLParser):
    """Every tag with the names of its attributes, in order, and all text and attribute values."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.said, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.said += [value for _, value in attrs]

    def handle_endtag(self, tag):
        self.tags.append((f"/{tag}", ()))

    def handle_comment(self, data):
        self.tags.append(("a comment", ()))

    def handle_data(self, data):
        self.said.append(data)
        self.text += data


def given(monkeypatch, module, *arguments):
    """Return the template and the values that `module.page` renders for these arguments."""
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(module, "render", lambda template, values: seen.append((template, values)) or "")
        module.page(*arguments)
    return seen[0]


def hostile(value):
    """Return the value with text of an attacker's in front of every string in it that says something."""
    if isinstance(value, str):
        return type(value)(EVIL + value) if value else value
    if isinstance(value, Mapping):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(hostile(item) for item in value)
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: hostile(getattr(value, name)) for name in type(value).model_fields})
    if dataclasses.is_dataclass(value):
        names = {field.name for field in dataclasses.fields(value)} - SWITCHES
        return dataclasses.replace(value, **{name: hostile(getattr(value, name)) for name in names})
    return value
