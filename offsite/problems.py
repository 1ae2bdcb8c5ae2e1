"""What is told of a wrong setting: in this project's words, with the right spelling where one is near."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "too_short": ("at least", "min_length"),
    "too_long": ("at most", "max_length"),
    "string_too_long": ("at most", "max_length"),
    "string_too_short": ("at least", "min_length"),
}
_UNITS = {
    "too_short": " given",
    "too_long": " given",
    "string_too_long": " characters",
    "string_too_short": " characters",
}
_KINDS = (
    ("int", "a whole number"),
    ("float", "a number"),
    ("finite_number", "a finite number"),
    ("bool", "true or false"),
    ("string_type", "text"),
    ("path", "a path"),
    ("list", "a list"),
    ("tuple", "a list"),
    ("dict", "NAME=VALUE,..."),
    ("string_pattern_mismatch", "another form"),
)


def near(word: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that was most likely meant by `word`, or None when none is near.

    First the one whose parts begin as the letters of `word` do (``lr`` is ``learning_rate``), then the most alike.
    """
    known = {name.replace("-", "_").strip("_"): name for name in names}
    asked = word.lower().replace("-", "_").strip("_")
    initials = [name for plain, name in known.items() if "".join(part[:1] for part in plain.split("_")) == asked]
    if len(initials) == 1 and len(asked) > 1:
        return initials[0]
    alike = difflib.get_close_matches(asked, known, n=1, cutoff=0.55)
    if not alike and len(asked) > 2:
        alike = [plain for plain in known if plain.startswith(asked)][:1]
    return known[alike[0]] if alike else None


def meant(word: str, names: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for the nearest of `names`, or nothing."""
    found = near(word, names)
    return "" if found is None else f"; did you mean {found!r}?"


def expected(item: Mapping[str, Any]) -> str:
    """Return what a setting was expected to be, from one of a validator's errors with its context.

    Args:
        item: an entry of pydantic's ``ValidationError.errors()``.
    """
    kind, context = str(item["type"]), item.get("ctx") or {}
    if kind == "value_error":
        message = str(item["msg"]).removeprefix("Value error, ")
        return f"{message[:1].lower()}{message[1:]}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"expected {words} {_number(context[bound])}{_UNITS.get(kind, '')}"
    if kind == "literal_error":
        return f"expected {_choices(item)}".replace("'", "")
    for beginning, words in _KINDS:
        if kind.startswith(beginning):
            return f"expected {words}"
    return "expected another form"


def guess(item: Mapping[str, Any]) -> str:
    """Return ``; did you mean X?`` for a setting that takes one of a few words, or nothing."""
    found = item["input"]
    if item["type"] != "literal_error" or not isinstance(found, str):
        return ""
    return meant(found, re.findall(r"'([^']*)'", _choices(item)))


def _choices(item: Mapping[str, Any]) -> str:
    return str((item.get("ctx") or {})["expected"])


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
