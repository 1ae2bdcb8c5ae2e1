"""The state of a federation after a closed round: the sum so far, and what is told of the round."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters.updates import Update, combined

SHARED = "shared"
"""Under which name the sum is kept that all clients share; a personal one is kept under its client's fingerprint."""


@dataclass(frozen=True)
class Told:
    """What is told of a closed round: whose updates were used, who was left out and why, norms by client, figures.

    `flags` are clients whose update looks unlike the others' (``server/aggregation/screening.py``): a signal, and
    nothing follows.
    """

    used: list[str]
    left_out: dict[str, str]
    norms: dict[str, float]
    figures: dict[str, float]
    flags: dict[str, str] = field(default_factory=dict)


def added(state: Update, update: Update) -> Update:
    """Return the sum so far with one more update in it."""
    return combined([state, update], [1.0, 1.0]) if state else dict(update)
