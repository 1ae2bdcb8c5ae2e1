"""The pages of ``--help``: verbs by who uses them, settings in panels, what is needed first.

A page is made of the settings' own declarations; plain lines of at most 80 columns, or 100 where a terminal has them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import click
from click.formatting import wrap_text
from pydantic.fields import FieldInfo
from typer.core import TyperCommand, TyperGroup

from offsite.commands.verbs import listed
from offsite.config import PANELS, VerbConfig, declared, flag_name, is_positional, model_in, panel_of

WIDTH = {"max_content_width": 100}
"""What Typer is told of every page."""

CONFIG = ("--config FILE", "YAML file with any of these settings")
_ALWAYS = [
    ("KEY=VALUE", "any setting above; KEY.SUB=VALUE for one inside another"),
    CONFIG,
    ("--help", "show this page"),
]
_FIRST_COLUMN = 26  # columns of what is typed; what is longer stands on a line of its own

Rows = list[tuple[str, str]]


def settings_rows(settings: type[VerbConfig]) -> dict[str, Rows]:
    """Return (what is typed, what it means) of every setting, by panel, in the panels' order."""
    found: dict[str, Rows] = {panel: [] for panel in PANELS}
    for name, field in _in_order(settings):
        found[panel_of(field)].append((_typed(name, field), explained(field)))
    return {panel: rows for panel, rows in found.items() if rows}


def spellings(name: str, field: FieldInfo) -> list[str]:
    """Return what a flag's setting is called on the command line, its short name first."""
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
    shown = "" if field.is_required() else _as_typed(field.default)
    return f"{text} [default: {shown}]" if shown and field.annotation is not bool else text


def metavar(kind: Any) -> str:
    """Return what stands for a value of this type."""
    if model_in(kind) is not None or get_origin(kind) is dict:
        return "NAME=VALUE,..."
    if isinstance(kind, type) and get_origin(kind) is None:
        return {"int": "N", "float": "X", "Path": "PATH", "str": "TEXT"}.get(kind.__name__, kind.__name__.upper())
    if found := choices(kind):
        return "|".join(found)
    names = [metavar(part) for part in get_args(kind) if part not in (type(None), ...)]
    return names[0] if names else "TEXT"


def choices(kind: Any) -> list[str]:
    """Return the words that a setting may be, where they are few; empty otherwise."""
    found = [part for part in get_args(kind) if isinstance(part, str)]
    return found or next((inner for part in get_args(kind) if (inner := choices(part))), [])


class VerbPage(TyperCommand):
    """A verb's command; its help is made of the settings in its context's ``obj``."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write how the verb is called, with all that it needs."""
        _write_usage(ctx, formatter, [*_needed(ctx.obj), "[OPTION | KEY=VALUE]..."])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the settings in panels, and what every verb takes."""
        _write_panels(formatter, settings_rows(ctx.obj) | {"Every verb": _ALWAYS})


class GroupPage(TyperGroup):
    """A group of verbs, or all of them; its help tells who uses which."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write how a verb of the group is called."""
        _write_usage(ctx, formatter, ["VERB ..."])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs by who uses them, and the options that need no verb."""
        group = None if ctx.parent is None else self.name
        options = [row for option in self.params if (row := option.get_help_record(ctx)) is not None]
        _write_panels(formatter, listed(group) | {"Options": [*options, _ALWAYS[-1]]})

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write where the rest is told."""
        formatter.write(f"\n{ctx.command_path} VERB --help tells what a verb needs, and all that it takes.\n")


def _in_order(settings: type[VerbConfig]) -> list[tuple[str, FieldInfo]]:
    """Return the settings as they are shown: words, flags as they are declared, and what is written last."""
    fields = list(settings.model_fields.items())
    return sorted(fields, key=lambda pair: ("short" in declared(pair[1])) - is_positional(pair[1]))


def _needed(settings: type[VerbConfig]) -> list[str]:
    """Return what has to be typed for a verb, each piece as it is typed; and words that may be."""
    words, flags = [], []
    for name, field in _in_order(settings):
        if is_positional(field):
            words.append(name.upper() if field.is_required() else f"[{name.upper()}]")
        elif field.is_required():
            flags.append(f"{spellings(name, field)[0]} {metavar(field.annotation)}")
    return words + flags


def _write_usage(ctx: click.Context, formatter: click.HelpFormatter, pieces: list[str]) -> None:
    start = f"Usage: {ctx.command_path} "
    kept = " ".join(_whole(piece) for piece in pieces)
    lines = wrap_text(kept, formatter.width, initial_indent=start, subsequent_indent=" " * len(start))
    formatter.write(_plain(lines) + "\n")


def _write_panels(formatter: click.HelpFormatter, panels: Mapping[str, Rows]) -> None:
    """Write every panel, with one column for what is typed on the whole page."""
    lengths = [len(typed) for rows in panels.values() for typed, _ in rows]
    column = max(length for length in lengths if length <= _FIRST_COLUMN)
    for panel, rows in panels.items():
        page = click.HelpFormatter(width=formatter.width)
        with page.section(_heading(panel)):
            page.write_dl([(typed.ljust(column), _unbroken(text)) for typed, text in rows], col_max=column)
        formatter.write("\n" + _plain(page.getvalue()))


def _heading(panel: str) -> str:
    """Return the panel's name, bold in a terminal: click leaves styles out elsewhere."""
    return panel if os.environ.get("NO_COLOR") else click.style(panel, bold=True)


def _whole(text: str) -> str:
    """Return the text such that no line of it ends inside; `_plain` undoes that."""
    return text.replace(" ", "\xa0").replace("-", "\u2011")


def _unbroken(text: str) -> str:
    """Return the text such that no line ends inside a word, a flag or a default."""
    start, mark, default = text.replace("-", "\u2011").partition("[default: ")
    return start + _whole(mark + default) if len(default) < _FIRST_COLUMN else start + mark + default


def _plain(text: str) -> str:
    return text.replace("\xa0", " ").replace("\u2011", "-")


def _typed(name: str, field: FieldInfo) -> str:
    if is_positional(field):
        return name.upper()
    if field.annotation is bool:
        return f"{flag_name(name)} / --no-{flag_name(name)[2:]}" if field.default else flag_name(name)
    return f"{', '.join(spellings(name, field))} {metavar(field.annotation)}"


def _as_typed(value: object) -> str:
    """Return a default as it would be typed; empty for none."""
    if value is None or value in ("", (), [], {}):
        return ""
    return ",".join(str(part) for part in value) if isinstance(value, tuple | list) else str(value)
