"""What join asks of the person at the terminal, and what is shown there and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from offsite.console import say
from offsite.errors import ConfigError, PolicyError


def is_watched() -> bool:
    """Tell whether stderr is a terminal: rows of private text are shown there alone, never into a file or a pipe."""
    return sys.stderr.isatty()


def show_privately(lines: list[str]) -> None:
    """The lines are on the terminal, if there is one; otherwise nowhere."""
    if is_watched():
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def show_verdicts(lines: Iterable[tuple[str, str, str]]) -> None:
    """One line for each gate is on stderr: its name, the verdict, and why."""
    for name, verdict, told in lines:
        say(f"  {name:<10} {verdict:<14} {told}")


def can_ask() -> bool:
    """Tell whether somebody is there to answer."""
    return sys.stdin is not None and sys.stdin.isatty()


def typed(question: str) -> str:
    """Return what the person at the terminal types."""
    say(question)
    return sys.stdin.readline().strip()


def agree(question: str, *, yes: bool, otherwise: str) -> None:
    """Return only if the answer is yes, given beforehand or typed.

    Args:
        question: without "type yes".
        yes: the answer was given beforehand.
        otherwise: what is true when it is anything else.

    Raises:
        ConfigError: when nobody is there to answer.
        PolicyError: when the answer is anything else.
    """
    if yes:
        return
    if not can_ask():
        raise ConfigError(f"nobody is here to answer: {question}", hint="--yes answers; or run it at a terminal")
    if typed(f"{question} type yes:").lower() not in ("yes", "y"):
        raise PolicyError(f"not agreed: {otherwise}", hint="the same command asks again")
