"""HTML and SVG built from elements, so that no text gets into a page without being escaped."""

from __future__ import annotations

import html
import re

_VOID = frozenset({"br", "circle", "line", "meta", "path", "polyline", "rect"})
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


class Markup(str):
    """Text that is markup already; any other string is escaped where it is put into an element."""

    __slots__ = ()


def el(tag: str, /, *children: object, **attributes: object) -> Markup:
    """Return one element.

    Args:
        children: markup, text to escape, or None for nothing.
        attributes: values are escaped, None leaves the attribute out; ``class_`` is ``class`` and ``_`` becomes ``-``.

    Raises:
        ValueError: for a name that is no element's or attribute's: names come from code, never from data.
    """
    words = [_checked(tag)]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{_checked(key.rstrip("_").replace("_", "-"))}="{html.escape(str(value), quote=True)}"')
    start = " ".join(words)
    return Markup(f"<{start}/>" if tag in _VOID else f"<{start}>{join(*children)}</{tag}>")


def join(*children: object) -> Markup:
    """Return the children one after the other, what is not markup escaped."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(str(c)) for c in children if c is not None))


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an element or attribute")
    return name
