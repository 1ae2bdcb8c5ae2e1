"""The one template engine of every page: what ``templates/`` lays out, filled with values that are always escaped.

A template is HTML with the places of its values in it; ``base.html.jinja`` is the page that the others fill in. Jinja
escapes every value, and a name that nobody gave is an error. Nothing marks a value as markup: no filter of this engine
can, so a string from anywhere is text wherever a template puts it.

A line break and the indentation after it lay out the template, not the page: beside a tag, of HTML or of the engine,
they are nothing, and between words they are one blank. Everything else is in the page as it stands.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Undefined
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from markupsafe import Markup

from offsite.report import numbers
from offsite.report.drawing import px

_BREAK = re.compile(r"\s*\n\s*")


def render(template: str, values: Mapping[str, object], *, package: str = "offsite.report") -> str:
    """Return the page that the template makes of the values: the same values, the same text.

    Args:
        template: a name under ``templates/``, with ``/`` between folders.
        package: in whose folder ``templates/`` is.

    Raises:
        jinja2.UndefinedError: when the template uses a name that is not among the values.
        TypeError: when it puts in what has no text of its own, such as None.
    """
    return environment(package).get_template(template).render(values)


@cache
def environment(package: str = "offsite.report") -> Environment:
    """Return the engine, which reads templates of that package alone."""
    made = Environment(
        loader=PackageLoader(package, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_escaped,
        keep_trailing_newline=True,
        extensions=[_Layout],
    )
    made.globals.clear()
    made.filters = {
        "count": numbers.count,
        "fixed": numbers.fixed,
        "general": numbers.general,
        "number": numbers.number,
        "percent": numbers.percent,
        "px": px,
        "rough": numbers.rough,
        "size": numbers.size,
        "whole": numbers.whole,
    }
    return made


def _escaped(value: object) -> Markup | Undefined:
    """A value as text of the page, in the one form that such text has, whatever version of the engine escapes.

    A privacy report's page is compared byte for byte with one made anew, so the form is part of what is compared.
    """
    if isinstance(value, Markup | Undefined):  # made by a template out of escaped values; or refused when it is put in
        return value
    if not isinstance(value, str | int | float):
        raise TypeError(f"a page has no text for a value of type {type(value).__name__}")
    return Markup(html.escape(str(value)))  # noqa: S704 - the one place where text becomes markup: escaped just here


class _Layout(Extension):
    """Line breaks of a template are not the page's, and its apostrophes are written as those of values are."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        """Yield the tokens, the text among them as the page has it; style sheets stay as they are."""
        tokens = list(stream)
        for place, token in enumerate(tokens):
            if token.type == "data" and (stream.name or "").endswith(".jinja"):
                text = _flowed(token.value, _beside_value(tokens, place))
                yield Token(token.lineno, token.type, text)
            else:
                yield token


def _beside_value(tokens: Sequence[Token], place: int) -> tuple[bool, bool]:
    """Whether a value stands right before this text, and right after it."""
    before = place > 0 and tokens[place - 1].type == "variable_end"
    after = place + 1 < len(tokens) and tokens[place + 1].type == "variable_begin"
    return before, after


def _flowed(text: str, beside_value: tuple[bool, bool]) -> str:
    def flow(found: re.Match[str]) -> str:
        at_start, at_end = found.start() == 0, found.end() == len(text)
        word_before = beside_value[0] if at_start else text[found.start() - 1] != ">"
        word_after = beside_value[1] if at_end else text[found.end()] != "<"
        return " " if word_before and word_after else ""

    return _BREAK.sub(flow, text).replace("'", html.escape("'"))
