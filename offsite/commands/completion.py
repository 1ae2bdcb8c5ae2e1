"""Completion of verbs, flags and values in a shell: bash, zsh and fish, by Click's own scripts.

``offsite --show-completion SHELL`` prints the script; the shell calls back with ``_OFFSITE_COMPLETE`` in the
environment, and the words so far in ``COMP_WORDS``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from offsite.errors import ConfigError

VARIABLE = "_OFFSITE_COMPLETE"
SHELLS = ("bash", "zsh", "fish")


def words_so_far(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """Return the words that a shell asks to complete, the program's name left out; None where none asks."""
    if not environment.get(VARIABLE):
        return None
    return environment.get("COMP_WORDS", "").split()[1:]


def answer(command: click.Command, environment: Mapping[str, str] = os.environ) -> int:
    """Print what may come next, or the shell's script, as the environment asks. Returns the exit code."""
    return shell_complete(command, {}, "offsite", VARIABLE, environment[VARIABLE])


def script(shell: str) -> str:
    """Return what makes a shell ask: to be evaluated in it, or kept where it looks for completions.

    Raises:
        ConfigError: for a shell that there is no script for.
    """
    cls = get_completion_class(shell) if shell in SHELLS else None
    if cls is None:
        raise ConfigError(f"--show-completion: found {shell!r}, expected one of {', '.join(SHELLS)}")
    return cls(click.Command("offsite"), {}, "offsite", VARIABLE).source()


class Value(click.ParamType):
    """What a setting may be: passed on as it is typed, and completed by its choices or by files."""

    name = "text"

    def __init__(self, words: Sequence[str] = (), *, is_file: bool = False) -> None:
        self.words = words
        self.is_file = is_file

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the choices that begin so; a mark for the shell to complete files."""
        if self.is_file:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(word) for word in self.words if word.startswith(incomplete)]
