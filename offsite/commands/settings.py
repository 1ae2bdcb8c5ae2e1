"""A verb's settings on the command line: what they are called, what is told of them, and the page that shows them.

All of it is made of the settings' own declarations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin

import click
from click.shell_completion import CompletionItem
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from offsite.commands.completion import Value
from offsite.commands.pages import HELP, Rows, write_panels, write_usage
from offsite.config import PANELS, VerbConfig, declared, flag_name, is_positional, model_in, panel_of

CONFIG = ("--config FILE", "YAML file with any of these settings")
JSON = ("--json", "print the result as one JSON object at a terminal too; elsewhere it always is")
_WORDS = ("KEY=VALUE", "any setting above; KEY.SUB=VALUE for one inside another")


class VerbPage(TyperCommand):
    """A verb's command; its help is made of the settings in its context's ``obj``."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return what may come next; a flag that takes one value, and has it, is left out."""
        given = {
            flag
            for name, field in ctx.obj.model_fields.items()
            if ctx.params.get(name) and not declared(field).get("repeated")
            for flag in spellings(name, field)
        }
        return [item for item in super().shell_complete(ctx, incomplete) if item.value not in given]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write how the verb is called, with all that it needs."""
        write_usage(ctx, formatter, [*needed(ctx.obj), "[OPTION | KEY=VALUE]..."])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the settings in panels, and what every verb takes."""
        write_panels(formatter, {**panels(ctx.obj), "Every verb": [_WORDS, CONFIG, JSON, HELP]})


def panels(settings: type[VerbConfig]) -> dict[str, Rows]:
    """Return (what is typed, what it means) of every setting, by panel, in the panels' order."""
    found: dict[str, list[tuple[str, str]]] = {panel: [] for panel in PANELS}
    for name, field in _in_order(settings):
        found[panel_of(field)].append((_typed(name, field), explained(field)))
    return {panel: rows for panel, rows in found.items() if rows}


def needed(settings: type[VerbConfig]) -> list[str]:
    """Return what has to be typed for a verb, each piece as it is typed; and words that may be."""
    words, flags = [], []
    for name, field in _in_order(settings):
        if is_positional(field):
            words.append(name.upper() if field.is_required() else f"[{name.upper()}]")
        elif field.is_required():
            flags.append(f"{spellings(name, field)[0]} {metavar(field.annotation)}")
    return words + flags


def spellings(name: str, field: FieldInfo) -> list[str]:
    """Return what a flag is called on the command line, its short name first."""
    flag, short = flag_name(name), declared(field).get("short")
    if field.annotation is bool:
        return [f"{flag}/--no-{flag[2:]}"]
    return [str(short), flag] if short else [flag]


def explained(field: FieldInfo) -> str:
    """Return a setting's line: its description, what it is made of, and its default."""
    text = field.description or ""
    inner = model_in(field.annotation)
    if inner is not None:
        text += f"; of {', '.join(inner.model_fields)}"
    shown = "" if field.is_required() or field.annotation is bool else _as_typed(field.default)
    return f"{text} [default: {shown}]" if shown else text


def metavar(kind: Any) -> str:
    """Return what stands for a value of this type."""
    if model_in(kind) is not None or get_origin(kind) is dict:
        return "NAME=VALUE,..."
    if isinstance(kind, type):
        return {"int": "N", "float": "X", "Path": "PATH", "str": "TEXT"}.get(kind.__name__, kind.__name__.upper())
    if found := _choices(kind):
        return "|".join(found)
    names = [metavar(part) for part in get_args(kind) if part not in (type(None), ...)]
    return names[0] if names else "TEXT"


def value(kind: Any) -> Value:
    """Return how values of this type are completed in a shell."""
    return Value(_choices(kind), is_file=_holds_path(kind))


def _in_order(settings: type[VerbConfig]) -> list[tuple[str, FieldInfo]]:
    """Return the settings as they are shown: words, flags as they are declared, and what is written last."""
    fields = settings.model_fields.items()
    return sorted(fields, key=lambda pair: ("short" in declared(pair[1])) - is_positional(pair[1]))


def _typed(name: str, field: FieldInfo) -> str:
    if is_positional(field):
        return name.upper()
    if field.annotation is bool:
        return f"{flag_name(name)} / --no-{flag_name(name)[2:]}" if field.default else flag_name(name)
    return f"{', '.join(spellings(name, field))} {metavar(field.annotation)}"


def _as_typed(default: object) -> str:
    """Return a default as it would be typed; empty for none."""
    if default is None or default in ("", (), [], {}):
        return ""
    return ",".join(str(part) for part in default) if isinstance(default, tuple | list) else str(default)


def _choices(kind: Any) -> list[str]:
    """Return the words that a setting may be, where they are few; empty otherwise."""
    found = [part for part in get_args(kind) if isinstance(part, str)]
    return found or next((inner for part in get_args(kind) if (inner := _choices(part))), [])


def _holds_path(kind: Any) -> bool:
    return kind is Path or any(_holds_path(part) for part in get_args(kind))
