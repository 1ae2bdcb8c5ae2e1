"""Retunings: what attacks guess of rows that fair coins put in or left out, and how much that leaves possible.

An adapter is tuned several times as the bundle was, each time on the rows that a fair coin of their own puts in. What a
row scores under such an adapter cannot hang on its coin unless the adapter tells it; so of adapters that tell nothing,
guesses are right as coins are, whatever the rows are like, and however often a row stands out. Two kinds of guesses are
counted: which of a pair, one row in and one not, was in; and that the rows which score highest were in.

A bound is what Clopper and Pearson's exact upper limit leaves possible at `CONFIDENCE`. It is about these very rows and
this way of tuning: chance comes in by the coins alone. It takes the guesses for independent trials: exact where
adapters tell nothing, an approximation where they do, because one adapter may tell of many rows at once.

Source: many rows with coins of their own in one training, arXiv:2305.08846; the limit, Clopper and Pearson 1934.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from offsite.audits.record import MAX_RETUNINGS, Guesses, Retuned, SignalName
from offsite.errors import ConfigError, RunFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENCE = 0.95
GUESSED_AT = 50
"""One row in so many is guessed to be in, of those that score highest: 2%. Where 3 in 4 of such guesses are right, 3%
of the rows that are in are found and 1% of the others accused; where fewer are, fewer are found at 1%."""
HITS_PER_RIGHT = 0.04
"""The share of rows found, where all guesses about 2% of the rows are right, half of which are in."""
ENOUGH_GUESSES = 60
"""Of so many guesses that rows are in coins leave the gate passed 98 times in 100, and 3 in 4 right 3 times."""
FEWEST_RETUNINGS = 3
MOST_BY_DEFAULT = 24

_STEPS = 10_000
_ROUNDING = 1e-9  # so that every machine finds the same where the two are equal


def num_guessed(num_rows: int) -> int:
    """Return of how many rows it is guessed, of one retuning, that they were in."""
    return num_rows // GUESSED_AT


def enough_retunings(num_rows: int) -> int:
    """Return how many retunings leave enough guesses about so many rows, as far as that many are made by themselves."""
    wanted = math.ceil(ENOUGH_GUESSES / max(1, num_guessed(num_rows)))
    return max(FEWEST_RETUNINGS, min(wanted, MOST_BY_DEFAULT, MAX_RETUNINGS))


def coins(num_rows: int, label: str) -> list[bool]:
    """Return a fair coin for every row, which the label decides."""
    draw = random.Random(f"offsite/v1/retuning/{label}")  # noqa: S311 - not a secret
    return [draw.random() < 0.5 for _ in range(num_rows)]


def guesses(
    signal: SignalName, scores: Sequence[NDArray[np.float64]], included: Sequence[Sequence[bool]], label: str
) -> Guesses:
    """Return what an attack guesses right, over all retunings; of equal scores at the last guess a draw decides.

    Args:
        scores: of every row, of each retuning: (rows,), higher for more likely in.
        included: the rows' coins, of each retuning.
        label: decides which rows make pairs, and which of those that score alike are guessed.

    Raises:
        RunFailed: when a score is NaN.
        ConfigError: when coins and scores are not of the same rows, or those are too few.
    """
    draw = random.Random(f"offsite/v1/pairs/{label}")  # noqa: S311 - not a secret
    pairs = right = tied = tried = correct = 0
    for one, coin in zip(scores, included, strict=True):
        inside = np.array(coin, dtype=np.bool_)
        if one.shape != inside.shape or not num_guessed(one.size):
            raise ConfigError(f"{one.size} scores of {inside.size} rows, expected one each of {GUESSED_AT} or more")
        if np.isnan(one).any():
            raise RunFailed("a score of a retuning is NaN", hint="nothing can be said of such a run; try a lower rate")
        members, others = one[inside].tolist(), one[~inside].tolist()
        draw.shuffle(members)
        draw.shuffle(others)
        for member, other in zip(members, others, strict=False):  # the rest of the larger side has no partner
            pairs, right, tied = pairs + 1, right + (member > other), tied + (member == other)
        turns = list(range(one.size))
        draw.shuffle(turns)
        top = np.lexsort((np.array(turns), -one))[: num_guessed(one.size)]
        tried, correct = tried + top.size, correct + int(inside[top].sum())
    return Guesses(
        signal=signal, num_pairs=pairs, num_right=right, num_tied=tied, num_guesses=tried, num_correct=correct
    )


def area(found: Guesses) -> tuple[float, float]:
    """Return the share of pairs told apart, those tied counted half, and the most that it leaves possible."""
    return (found.num_right + found.num_tied / 2) / found.num_pairs, upper_share(
        found.num_right + math.ceil(found.num_tied / 2), found.num_pairs
    )


def hits(found: Guesses) -> tuple[float, float]:
    """Return the share of rows found, as `HITS_PER_RIGHT` has it, and the most that the guesses leave possible."""
    most = upper_share(found.num_correct, found.num_guesses)
    return HITS_PER_RIGHT * found.num_correct / found.num_guesses, HITS_PER_RIGHT * most


def by_coins(found: Retuned) -> tuple[float, float]:
    """Return the area and the hits that so many guesses leave possible if just half of them are right."""
    one = found.attacks[0]
    most = upper_share(math.ceil(one.num_guesses / 2), one.num_guesses)
    return upper_share(math.ceil(one.num_pairs / 2), one.num_pairs), HITS_PER_RIGHT * most


def upper_share(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Return the least chance at which no more successes than these are seen in fewer than 1 - confidence of cases.

    It is rounded up to a ten-thousandth, so that every machine finds the same. SciPy is not needed.

    Raises:
        ConfigError: when the numbers contradict each other.
    """
    if not 0 <= successes <= trials or not trials:
        raise ConfigError(f"{successes} successes in {trials} trials, expected one trial or more and no more successes")
    if successes == trials:
        return 1.0
    low, high = 0, _STEPS
    while high - low > 1:
        middle = (low + high) // 2
        if _at_most(successes, trials, middle / _STEPS) <= 1 - confidence + _ROUNDING:
            high = middle
        else:
            low = middle
    return high / _STEPS


def _at_most(successes: int, trials: int, chance: float) -> float:
    """Return how likely it is to see no more than so many successes."""
    yes, no, every = math.log(chance), math.log1p(-chance), math.lgamma(trials + 1)
    total = 0.0
    for number in range(successes, -1, -1):
        ways = every - math.lgamma(number + 1) - math.lgamma(trials - number + 1)
        term = math.exp(ways + number * yes + (trials - number) * no)
        total += term
        if number < trials * chance and term < total * 1e-18:
            break
    return total
