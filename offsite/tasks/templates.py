"""Templates of prompts: plain ``{{name}}``, replaced once, and nothing else. There is no language in them to run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_]{0,63}$"

MAX_PLACES = 2
"""How often a template may take one field: a prompt is then not much longer than what it is made of."""

Value = str | tuple[str, ...]
"""What a field holds: a text, or several, which a prompt shows as a line each."""

_PLACE = re.compile(r"\{\{[ \t]*([A-Za-z][A-Za-z0-9_]{0,63})[ \t]*\}\}")
_LANGUAGE = re.compile(r"\{\{|\}\}|\{%|%\}|\{#|#\}")


def names_in(template: str) -> set[str]:
    """Return the names that the template takes."""
    return set(_PLACE.findall(template))


def problem_of(template: str, fields: Sequence[str]) -> str | None:
    """Return what is wrong with the template, in words that do not repeat it; None where nothing is."""
    if template.lstrip().lower().startswith(("file:", "exec:", "python:", "http:", "https:")):
        return "names a file, a program or an address; write the prompt itself"
    if _LANGUAGE.search(_PLACE.sub("", template)):
        return "holds braces that are not a plain {{name}}; filters, expressions and blocks are not supported"
    unknown = sorted(names_in(template) - set(fields))
    if unknown:
        return f"takes {', '.join(unknown)}, which is none of the fields"
    if not names_in(template):
        return "takes none of the fields"
    if often := sorted(name for name, num in Counter(_PLACE.findall(template)).items() if num > MAX_PLACES):
        return f"takes {', '.join(often)} more than {MAX_PLACES} times"
    return None


def render(template: str, values: Mapping[str, Value]) -> str:
    """Return the template with every ``{{name}}`` replaced; what a value holds is text, also where it holds braces.

    Raises:
        KeyError: when a name has no value.
    """
    return _PLACE.sub(lambda found: _shown(values[found[1]]), template)


def _shown(value: Value) -> str:
    return value if isinstance(value, str) else "\n".join(f"- {one}" for one in value)
