"""The pages of ``--help`` that tell of verbs, and how every page is laid out.

Plain lines of at most 80 columns, or 100 where a terminal has them. No settings are imported for these pages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import click
from click.formatting import wrap_text
from typer.core import TyperGroup

from offsite.commands.verbs import listed

WIDTH = {"max_content_width": 100}
"""What Typer is told of every page."""

HELP = ("--help", "show this page")
_FIRST_COLUMN = 26  # columns of what is typed; what is longer stands on a line of its own

Rows = Sequence[tuple[str, str]]


class GroupPage(TyperGroup):
    """A group of verbs, or all of them; its help tells who uses which."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write how a verb of the group is called."""
        write_usage(ctx, formatter, ["VERB ..."])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs by who uses them, and the options that need no verb."""
        group = None if ctx.parent is None else self.name
        options = [row for option in self.params if (row := option.get_help_record(ctx)) is not None]
        write_panels(formatter, {**listed(group), "Options": [*options, HELP]})

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write where the rest is told."""
        formatter.write(f"\n{ctx.command_path} VERB --help tells what a verb needs, and all that it takes.\n")


def write_usage(ctx: click.Context, formatter: click.HelpFormatter, pieces: Sequence[str]) -> None:
    """Write the line of how a command is called, no piece of it broken."""
    start = f"Usage: {ctx.command_path} "
    kept = " ".join(_whole(piece) for piece in pieces)
    lines = wrap_text(kept, formatter.width, initial_indent=start, subsequent_indent=" " * len(start))
    formatter.write(_plain(lines) + "\n")


def write_panels(formatter: click.HelpFormatter, panels: Mapping[str, Rows]) -> None:
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
    """Return the text such that no line ends inside a word, a flag or a short default."""
    start, mark, default = text.replace("-", "\u2011").partition("[default: ")
    return start + _whole(mark + default) if len(default) < _FIRST_COLUMN else start + mark + default


def _plain(text: str) -> str:
    return text.replace("\xa0", " ").replace("\u2011", "-")
