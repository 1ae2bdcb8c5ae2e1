"""What an owner may ask of a package: a figure, its bound, and which side of it is wanted. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from offsite.artefacts.owner import DialFigures
from offsite.problems import meant
from offsite.report.numbers import size as shown_bytes

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Kind:
    """A figure that can be asked for.

    Attributes:
        read: takes it from a package's figures.
        at_least: whether it is to be at least the value; otherwise at most.
        low: what the value must be more than.
        high: what it may be at most.
        smallest: whether the smallest package that meets it is wanted; otherwise the largest.
    """

    read: Callable[[DialFigures], float]
    at_least: bool
    low: float
    high: float
    smallest: bool
    what: str


KINDS: Mapping[str, Kind] = {
    "recovery": Kind(lambda f: f.recovery, True, 0.0, 1.0, True, "share of the gain of LoRA on the full model"),
    "gap": Kind(lambda f: f.gap, True, 1.0, 1e6, False, "emulator-tuned over plugged in"),
    "withheld": Kind(lambda f: f.withheld, True, 0.0, 100.0, False, "nats per token after tuning"),
    "bytes": Kind(lambda f: float(f.num_bytes), False, 0.0, 1e15, False, "bytes of the package"),
}


@dataclass(frozen=True)
class Target:
    """A figure and its bound: recovery, gap and withheld at least so much, bytes at most."""

    name: str
    value: float

    @property
    def kind(self) -> Kind:
        """Which figure it is."""
        return KINDS[self.name]

    def is_met(self, figures: DialFigures) -> bool:
        """Tell whether a package of these figures is what was asked for."""
        found = self.kind.read(figures)
        return found >= self.value if self.kind.at_least else found <= self.value

    def shown(self, value: float | None = None) -> str:
        """Return the figure as people read it: ``recovery at least 0.8``; of another value the number alone."""
        number = self.value if value is None else value
        text = shown_bytes(number) if self.name == "bytes" else f"{number:.3g}"
        return f"{self.name} {'at least' if self.kind.at_least else 'at most'} {text}" if value is None else text


def read_target(words: str) -> Target:
    """Return the target that ``NAME=VALUE`` asks for.

    Raises:
        ValueError: saying what was found and what is expected.
    """
    name, equals, text = (part.strip() for part in words.partition("="))
    known = ", ".join(KINDS)
    if not equals:
        raise ValueError(f"--target {words}: expected NAME=VALUE of {known}, as recovery=0.8")
    if name not in KINDS:
        raise ValueError(f"--target {words}: no figure {name!r}, expected one of {known}{meant(name, KINDS)}")
    kind = KINDS[name]
    form = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)", text)
    unit = form[2].lower() if form is not None else ""
    if form is None or (unit if name != "bytes" else unit not in UNITS):
        wanted = "a number and B, kB, MB or GB, as bytes=60MB" if name == "bytes" else f"a number, {kind.what}"
        raise ValueError(f"--target {words}: expected {wanted}")
    value = float(form[1]) * UNITS[unit]
    if not kind.low < value <= kind.high:
        raise ValueError(f"--target {words}: expected more than {kind.low:g} and at most {kind.high:g}, {kind.what}")
    return Target(name, value)
