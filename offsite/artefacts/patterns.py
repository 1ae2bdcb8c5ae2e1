"""The patterns of a package's tokenizer: simple ones, which come to an end on any text.

A tokenizer may cut and replace by regular expressions, and a search that tries every way of matching can take longer
than anybody waits. Two checks come before the client's text: the form of each pattern, from an allow-list in which a
repetition holds no other without bound; and a trial on text made of its own letters, within a time. What passes both
can still be slow on some text, so encoding has a limit as well (`offsite.text.calls`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from offsite.errors import BadSchema
from offsite.text.calls import TookTooLong, quietly

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_PATTERNS = 128
MAX_LENGTH = 4096
MAX_REPEATS = 1024
MOST_UNBOUNDED = 4  # times that something without bound may itself be repeated

_TRIAL_SECONDS = 30.0
_TRIAL_LENGTH = 2048
_TRIAL_LETTERS = "aA1é中 \n\t!'._-"
_MOST_LETTERS = 64
_INFINITE = float("inf")
_HINT = "ask its owner for a package whose tokenizer cuts text by simpler patterns"

_ATOM = re.compile(
    r"\\(?:[pPxX]\{[^}]*\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^0-9kgKxupP]|0[0-7]{0,2})"
    r"|\\p\^?[A-Za-z]|(?P<opens>\((?:\?(?:[:=!>]|<[=!]|<[A-Za-z_][A-Za-z0-9_]*>|[imx-]+[:)])|(?![?*])))|(?P<closes>\))|(?P<class>\[)"
    r"|(?P<repeats>[*+?]|\{[0-9]+(?:,[0-9]*)?\}|\{,[0-9]+\})|[^\\(]",
    re.DOTALL,
)


def patterns_of(tokenizer: Tokenizer) -> list[str]:
    """Return the regular expressions of the tokenizer's parts as it has read them, in their order."""
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    return [pattern for part in parts if part is not None for pattern in _patterns(json.loads(part.__getstate__()))]


def check_patterns(what: str, patterns: Sequence[str]) -> None:
    """Return only if all are of a form that is allowed.

    Raises:
        BadSchema: saying what of one is not, and never the pattern.
    """
    if len(patterns) > MAX_PATTERNS:
        raise BadSchema(f"{what}: {len(patterns)} patterns, expected {MAX_PATTERNS} at most", hint=_HINT)
    for number, pattern in enumerate(patterns, 1):
        long = f"has {len(pattern)} characters, expected {MAX_LENGTH} at most"
        problem = long if len(pattern) > MAX_LENGTH else _problem(pattern)
        if problem is not None:
            raise BadSchema(f"{what}: pattern {number} {problem}", hint=_HINT)


def try_patterns(what: str, patterns: Sequence[str], tokenizer: Tokenizer) -> None:
    """Return once the tokenizer has encoded long runs of the letters that its patterns hold, and of others.

    Raises:
        BadSchema: when it fails on them, or they take too long.
    """
    letters = dict.fromkeys(_TRIAL_LETTERS + "".join(patterns))
    runs = [letter * _TRIAL_LENGTH for letter in [*letters][:_MOST_LETTERS] if letter.isprintable() or letter in "\n\t"]

    def refusal(kind: str) -> BadSchema:
        how = "do not come to an end" if kind == TookTooLong.__name__ else f"fail ({kind})"
        return BadSchema(f"{what}: its patterns {how} on {_TRIAL_LENGTH} equal letters", hint=_HINT)

    quietly(lambda: tokenizer.encode_batch(runs), refusal, compiled=True, limit_seconds=_TRIAL_SECONDS)


def _patterns(content: Any) -> Iterator[str]:
    """Yield every regular expression of a part."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name == "Regex" and isinstance(value, str):
                yield value
            else:
                yield from _patterns(value)
    elif isinstance(content, list):
        for value in content:
            yield from _patterns(value)


def _problem(pattern: str) -> str | None:
    """Return what is not allowed of a pattern, None where all is."""
    groups = [_Repeats()]  # what repeats in each open group, the whole pattern first
    last, position = _Repeats(), 0
    while position < len(pattern):
        atom = _ATOM.match(pattern, position)
        end = None if atom is None else _class_end(pattern, atom.end()) if atom["class"] else atom.end()
        if atom is None or end is None:
            return "refers back, calls itself, or has a form that is not known here"
        position = end
        if atom["closes"]:
            if len(groups) == 1:
                return "closes what it did not open"
            last = groups.pop()
            groups[-1] = groups[-1].beside(last)
        elif atom["repeats"]:
            least, most = _bounds(atom["repeats"])
            if (most == _INFINITE and last.varies) or (most > MOST_UNBOUNDED and last.most == _INFINITE):
                return "repeats what repeats without bound, or now more, now less often"
            last = _Repeats(last.most * most, last.varies or (most > 1 and least != most))
            if MAX_REPEATS < last.most < _INFINITE:
                return f"repeats up to {last.most:.0f} times, expected {MAX_REPEATS} at most"
            groups[-1] = groups[-1].beside(last)
            position += pattern[position : position + 1] in ("?", "+")  # as few as will do, or for good
        else:
            last = _Repeats()
            if atom["opens"] and not atom["opens"].endswith(")"):  # "(?i)" opens nothing
                groups.append(last)
    return None if len(groups) == 1 else "has an open group"


class _Repeats(NamedTuple):
    """How often anything in a part of a pattern may stand, and whether that is now more, now less."""

    most: float = 1.0
    varies: bool = False

    def beside(self, other: _Repeats) -> _Repeats:
        return _Repeats(max(self.most, other.most), self.varies or other.varies)


def _bounds(repeats: str) -> tuple[float, float]:
    """Return how often a quantifier lets its atom stand, at least and at most."""
    if repeats in ("*", "+", "?"):
        return float(repeats == "+"), 1.0 if repeats == "?" else _INFINITE
    least, comma, most = repeats[1:-1].partition(",")
    return float(least or 0), float(most or _INFINITE) if comma else float(least)


def _class_end(pattern: str, position: int) -> int | None:
    """Return where the class of characters ends that begins before `position`; classes may hold classes."""
    depth, start = 1, position
    while position < len(pattern):
        letter = pattern[position]
        if letter == "\\":
            position += 1
        elif letter == "[":
            depth += 1
        elif letter == "]" and not (depth == 1 and pattern[start:position] in ("", "^")):
            depth -= 1
            if not depth:
                return position + 1
        position += 1
    return None
