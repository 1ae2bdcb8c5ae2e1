"""What people read: lines, tables and progress on stderr. Stdout is left to the one JSON object."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

PLAYED = "OFFSITE_PLAYED"
"""Environment variable that says to a verb that it is a stage of another one."""

_LINE_EVERY_SECONDS = 10.0


_muted: ContextVar[bool] = ContextVar("muted", default=False)


def say(text: str) -> None:
    """One line is on stderr, at once, unless it is `muted`."""
    if not _muted.get():
        print(text, file=sys.stderr, flush=True)


def say_piece(text: str) -> None:
    """Text that somebody else wrote is on stderr at once, without a line end; what moves a cursor is shown as `?`."""
    if not _muted.get():
        shown = "".join(one if one.isprintable() or one in "\n\t" else "?" for one in text)
        print(shown, end="", file=sys.stderr, flush=True)


@contextmanager
def muted() -> Iterator[None]:
    """Nothing is said: for steps that are verbs of their own, inside one that speaks for itself."""
    token = _muted.set(True)
    try:
        yield
    finally:
        _muted.reset(token)


def utc(seconds: float) -> str:
    """Return a time of seconds since 1970 as people read it: ``2026-12-30 06:24 UTC``."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def say_next(*words: object) -> None:
    """One line is on stderr: the command that comes next, as it can be typed; words in capitals are to be filled in.

    Of a verb that another one plays as a stage, nothing: there the stages say what comes next.
    """
    if PLAYED in os.environ:
        return
    say(f"next: {shlex.join(str(word) for word in words)}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain aligned table is on stderr: first column left, the others right."""
    cells = [list(map(str, columns)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    say(title)
    for number, row in enumerate(cells):
        line = [row[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]]
        say("  " + "  ".join(line))
        if number == 0:
            say("  " + "  ".join("-" * width for width in widths))


class Progress:
    """Progress of counted work: a bar on a terminal, otherwise a line about every ten seconds."""

    def __init__(self, total: int, label: str, *, start: int = 0) -> None:
        self._total, self._label = total, label
        self._start, self._began, self._last = start, time.monotonic(), 0.0
        self._tty = sys.stderr.isatty()

    def update(self, step: int, **figures: float) -> None:
        """Show that `step` of the total is done, with named figures."""
        now = time.monotonic()
        pause = 0.2 if self._tty else _LINE_EVERY_SECONDS
        if step < self._total and now - self._last < pause:
            return
        self._last = now
        self._show(step, now - self._began, figures)

    def _show(self, step: int, elapsed_seconds: float, figures: dict[str, float]) -> None:
        done = max(step - self._start, 1)
        left_seconds = elapsed_seconds / done * (self._total - step)
        named = "  ".join(f"{name} {value:,.4g}" for name, value in figures.items())
        text = f"{self._label}  {step}/{self._total}  {named}  {_clock(left_seconds)} left"
        if not self._tty:
            say(text)
            return
        filled = int(24 * step / max(self._total, 1))
        print(f"\r\x1b[2K[{'#' * filled}{'.' * (24 - filled)}] {text}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar's line."""
        if self._tty:
            print(file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def progress(total: int, label: str, *, start: int = 0) -> Iterator[Progress]:
    """Yield a `Progress` that is closed on leaving, also when the work fails."""
    bar = Progress(total, label, start=start)
    try:
        yield bar
    finally:
        bar.close()
