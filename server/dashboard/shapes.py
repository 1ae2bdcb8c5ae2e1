"""What pages are made of: plain text in the places that templates have for it."""

from __future__ import annotations

from dataclasses import dataclass, field

NAME_CHARACTERS, LINE_CHARACTERS, TEXT_CHARACTERS = 64, 300, 2000
"""Bounds on what is shown of a name, of a line, and of a text that somebody else wrote."""


@dataclass(frozen=True)
class Fact:
    """A line: what it is called, what was found, a sentence on what that means, and how it is set."""

    name: str
    value: str
    about: str = ""
    css: str = ""


@dataclass(frozen=True)
class Link:
    """Words that lead to another page."""

    text: str
    href: str


@dataclass(frozen=True)
class PackageRow:
    """A package in the overview: where its page is, and what it gives away in one line."""

    name: str
    href: str
    made: str
    size: str
    gives: str
    audited: str
    jobs: str


@dataclass(frozen=True)
class Arrival:
    """A bundle in a list."""

    id: str
    href: str
    state: str
    client: str
    package: str
    round: str
    since: str


@dataclass(frozen=True)
class Refusal:
    """What was refused on its way in: its id, the check's name, and why."""

    id: str
    check: str
    message: str


@dataclass(frozen=True)
class Measured:
    """A table of figures: its title, a sentence on it, columns and lines, and what has to be read before them."""

    title: str
    about: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    warning: str = ""


@dataclass(frozen=True)
class Action:
    """Something that can be decided of a bundle: its name, where it is confirmed, and whether it cannot be undone."""

    name: str
    href: str
    about: str
    is_final: bool = False


@dataclass(frozen=True)
class Arrived:
    """One bundle's page."""

    id: str
    state: str
    told: str
    client: str
    facts: list[Fact]
    figures: list[Fact]
    checks: tuple[str, ...]
    why: str
    tables: list[Measured]
    gates: list[Fact]
    gates_told: str
    headline: str
    attacks: list[Measured]
    plugged: list[tuple[str, list[Fact]]]
    actions: list[Action]
    commands: list[Fact]
    terms: str = ""
    package: Link | None = None


@dataclass(frozen=True)
class Option:
    """One thing that an invitation may be about."""

    value: str
    text: str


@dataclass(frozen=True)
class Invited:
    """An invitation in the list."""

    name: str
    href: str
    about: str
    client: str
    expires: str


@dataclass(frozen=True)
class Round:
    """One finished round of a federation."""

    number: str
    used: str
    left_out: list[str]
    figures: str


@dataclass(frozen=True)
class Federation:
    """A federation: facts, and its rounds."""

    name: str
    facts: list[Fact]
    rounds: list[Round] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """A privacy report: who says what, or why it does not count."""

    name: str
    headline: str
    facts: list[Fact]
    problem: str


@dataclass(frozen=True)
class LogLine:
    """A line of the registry's log."""

    number: str
    time: str
    event: str
    fields: str
