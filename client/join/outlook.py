"""Which gates a run can pass, said before it begins: by its rows and steps, and the numbers that the gates ask for.

What an audit will find nobody knows yet; whether it can find anything is known from the numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from offsite.audits.gates import (
    MAX_TPR_AT_1,
    MIN_CANARIES,
    MIN_MEMBERS,
    MIN_NONMEMBERS,
    MIN_RECORDS,
    MIN_SECRETS,
    MIN_STEPS,
    MIN_VERBATIM,
    WEAK_EPSILON,
)
from offsite.audits.retunings import HITS_PER_RIGHT, enough_retunings, num_guessed, upper_share

Outlook = Literal["measurable", "not measurable", "will fail"]
MOST_ASIDE = 0.3
NUM_SECRETS = 16
MOST_ROWS = 2000
"""Rows that an audit scores at most, by itself."""
_SPARE = 1.2
"""More rows than are asked for, since documents fall by chance and some rows are alike."""


@dataclass(frozen=True)
class Numbers:
    """What is known of a run before it begins.

    Args:
        num_train: rows that are trained on, those that are alike counted once.
        num_aside: rows that are set aside for the audit, likewise.
        steps: optimiser steps, at most.
        num_drawn: rows that these steps draw, at most.
        num_asked: rows that are long enough to be asked for the rest of.
        num_canaries: made-up texts that are planted; 0 for none, and no secrets.
        num_coins: rows, or documents, that have a coin each in retunings; 0 where a run of this kind cannot be retuned.
        retunings: how many there are to be; None for as many as so many rows need.
        writes: whether what is tuned writes text, so that canaries go with it and secrets can be asked for.
        epsilon: of a differentially private run.
    """

    num_train: int
    num_aside: int
    steps: int
    num_drawn: int
    num_asked: int
    num_canaries: int
    num_coins: int = 0
    retunings: int | None = None
    writes: bool = True
    epsilon: float | None = None

    @property
    def drawn_share(self) -> float:
        """How much of what is trained on the steps draw at least once."""
        return min(1.0, self.num_drawn / max(1, self.num_train))


@dataclass(frozen=True)
class Expected:
    """Of one gate, what is known of it beforehand, and why in words."""

    name: str
    outlook: Outlook
    told: str


def audit_share(num_rows: int) -> float:
    """Return the share of rows to set aside, so that attacks on rows can be measured; 0 where there are too few rows.

    Setting aside less than `MIN_NONMEMBERS` would cost rows to train on and measure nothing.
    """
    share = _SPARE * MIN_NONMEMBERS / max(1, num_rows)
    return round(share, 4) if share <= MOST_ASIDE else 0.0


def num_canaries(num_rows: int, *, is_private: bool) -> int:
    """Return how many made-up texts to plant where nobody says: few beside the rows, of a private run enough."""
    return 1000 if is_private else max(8, min(1000, num_rows // 10))


def expected_gates(numbers: Numbers) -> list[Expected]:
    """Return of every gate of the run what is known of it beforehand, in the order of the audit's."""
    scan = Expected("scan", "measurable", "every byte of the bundle is looked at")
    if numbers.epsilon is None:
        rest = [*_membership(numbers), _secrets(numbers), _verbatim(numbers), _inversion(numbers)]
        return [scan, *rest]
    private = [Expected("budget", "measurable", "what is spent is counted"), _bound(numbers)]
    if numbers.epsilon <= WEAK_EPSILON:
        return [scan, *private]
    canaries = _few("canaries", numbers.num_canaries, MIN_CANARIES, "made-up texts are planted")
    more = [canaries, _secrets(numbers), *_membership(numbers), _verbatim(numbers), _inversion(numbers)]
    return [scan, *private, *more]


def all_can_pass(expected: Sequence[Expected]) -> bool:
    """Tell whether no gate stands in the way already."""
    return all(one.outlook == "measurable" for one in expected)


def _membership(numbers: Numbers) -> list[Expected]:
    found = _few("auc", numbers.num_aside, MIN_NONMEMBERS, "rows are set aside to compare with")
    if found.outlook == "measurable":
        found = _few("auc", numbers.num_train, MIN_MEMBERS, "rows are trained on")
    if found.outlook != "measurable":
        found = _retuned(numbers)
    if found.outlook == "measurable" or numbers.num_coins >= MIN_MEMBERS:
        return [found, _enough_guesses(numbers, found)]
    return [found, Expected("tpr_at_1", found.outlook, found.told)]


def _retuned(numbers: Numbers) -> Expected:
    """Return whether retunings can stand in for rows set aside, and what they cost."""
    needed = round(_SPARE * MIN_NONMEMBERS / MOST_ASIDE)
    aside = f"{MIN_NONMEMBERS:,} rows set aside would be needed, of about {needed:,} in all"
    if numbers.epsilon is not None or not numbers.num_coins:
        return Expected("auc", "not measurable", f"a run of this kind is not retuned; {aside}")
    if numbers.retunings == 0:
        return Expected("auc", "not measurable", f"no retunings, as --retunings 0 says; {aside}")
    if numbers.num_coins < MIN_MEMBERS:
        return _few("auc", numbers.num_coins, MIN_MEMBERS, "different rows (documents) can be left out of retunings")
    num = num_retunings(numbers)
    cost = f"about {num / 2:g} times what tuning takes; none from about {needed:,} rows on"
    return Expected("auc", "measurable", f"by {num} retunings on random halves of {numbers.num_coins:,} rows: {cost}")


def num_retunings(numbers: Numbers) -> int:
    """Return how many retunings an audit will make, if any."""
    return enough_retunings(min(numbers.num_coins, MOST_ROWS)) if numbers.retunings is None else numbers.retunings


def _enough_guesses(numbers: Numbers, found: Expected) -> Expected:
    """Return whether so many guesses can keep the limit on hits at all: not where even coins would not."""
    same = Expected("tpr_at_1", found.outlook, found.told)
    if found.outlook != "measurable" or numbers.num_aside >= MIN_NONMEMBERS:
        return same
    num = num_retunings(numbers) * num_guessed(min(numbers.num_coins, MOST_ROWS))
    if HITS_PER_RIGHT * upper_share(math.ceil(num / 2), num) <= MAX_TPR_AT_1:
        return same
    told = f"{num} guesses of these retunings are too few; --retunings {enough_retunings(numbers.num_coins)} are enough"
    return Expected("tpr_at_1", "not measurable", told)


def _secrets(numbers: Numbers) -> Expected:
    if not numbers.writes:
        return Expected("secrets", "not measurable", "canaries do not go with this kind of model or objective")
    if not numbers.num_canaries:
        return Expected("secrets", "not measurable", "none are planted, as --canaries 0 says")
    num = NUM_SECRETS / 2 * numbers.drawn_share  # a coin decides of each whether it is trained on
    if num < MIN_SECRETS + 1:
        told = f"about {num:.0f} made-up secrets would be trained on in so few steps; {MIN_SECRETS} are needed"
        return Expected("secrets", "not measurable", told)
    return Expected("secrets", "measurable", f"about {num:.0f} made-up secrets are trained on and asked for")


def _verbatim(numbers: Numbers) -> Expected:
    if not numbers.writes and not numbers.num_asked:
        return Expected("verbatim", "not measurable", "no row is asked for of this kind of model or objective")
    num = round(numbers.num_asked * numbers.drawn_share)
    return _few("verbatim", num, MIN_VERBATIM, "rows, long enough to be asked for, are trained on")


def _inversion(numbers: Numbers) -> Expected:
    told = (
        f"up to {numbers.steps} steps on about {numbers.num_drawn:,} rows; {MIN_STEPS} on {MIN_RECORDS} are asked for"
    )
    enough = numbers.steps >= MIN_STEPS and numbers.num_drawn >= MIN_RECORDS
    return Expected("inversion", "measurable" if enough else "will fail", told)


def _bound(numbers: Numbers) -> Expected:
    return _few("epsilon", numbers.num_canaries, MIN_CANARIES, "made-up texts are planted")


def _few(name: str, found: int, needed: int, what: str) -> Expected:
    told = f"{found:,} {what}; {needed:,} are needed"
    return Expected(name, "measurable" if found >= needed else "not measurable", told)
