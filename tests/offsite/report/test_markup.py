"""Markup is built, never pasted: whatever is not markup is escaped, as content and as attribute."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite.report.markup import Markup, el, join


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


PRINTABLE = st.text(st.characters(exclude_categories=["C"], exclude_characters="\r"), max_size=40)


@given(PRINTABLE, PRINTABLE)
def test_any_text_comes_back_as_text(content, attribute):
    read = Reader(el("p", content, title=attribute))
    assert read.seen == [("p", {"title": attribute})]
    assert read.text == content


def test_elements_nest_and_void_ones_close_themselves():
    made = el("ul", el("li", 1), el("li", "a<b"), None, class_="x", aria_label='"q"')
    assert made == '<ul class="x" aria-label="&quot;q&quot;"><li>1</li><li>a&lt;b</li></ul>'
    assert el("line", x1=0) == '<line x1="0"/>'
    assert el("p", class_=None) == "<p></p>"


def test_only_markup_passes_unescaped():
    assert join(Markup("<b>"), "<b>") == "<b>&lt;b&gt;"


@pytest.mark.parametrize("name", ["", "a b", "x><script", "1"])
def test_names_come_from_code(name):
    with pytest.raises(ValueError, match="no name"):
        el(name)
    with pytest.raises(ValueError, match="no name"):
        el("p", **{name: 1})
