"""Lower bounds on epsilon: what the guesses of an attack prove about the mechanism, whatever it claims.

A bound above the claimed epsilon refutes the claim, at the stated confidence; one below confirms nothing. Each bound
comes with its ceiling, what an attack that is never wrong would have shown, so that a low bound is not taken for
privacy where the audit could not have shown more.

Source: one run, arXiv:2305.08846; many runs, arXiv:2101.04535.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offsite.audits.statistics import checked, clopper_pearson, require_confidence, special
from offsite.errors import ConfigError

Sides = Literal["both", "in"]

SHARES = (0.5, 0.2, 0.1)
"""Of the canaries, how many are guessed about where no numbers are declared; Bonferroni pays for trying them all.

Not all: half "in" and half "out" is wrong of some canaries for sure when the coins did not fall in halves.
"""

_IMPLAUSIBLE = 1e-6
_PRECISION = 1e-12


class OneRun(NamedTuple):
    """What one run proves.

    Attributes:
        epsilon: the bound; 0 where nothing is shown.
        num_canaries: those whose coins were drawn, guessed about or not.
        num_guesses: guesses of the bound, of those `declared`.
        num_correct: how many of them are right.
        declared: all numbers of guesses that were tried.
        rule: "fixed" when there was one, else "bonferroni": each is tested at its share of 1 - confidence.
        sides: "both" when half the guesses are "in" and half "out", "in" when all are "in".
        ceiling: the bound if all guesses had been right.
    """

    epsilon: float
    num_canaries: int
    num_guesses: int
    num_correct: int
    declared: tuple[int, ...]
    rule: Literal["fixed", "bonferroni"]
    sides: Sides
    delta: float
    confidence: float
    ceiling: float


def one_run_epsilon(
    scores_in: ArrayLike,
    scores_out: ArrayLike,
    delta: float,
    confidence: float = 0.95,
    *,
    num_guesses: int | Sequence[int] | None = None,
    sides: Sides = "both",
) -> OneRun:
    """Return the epsilon that a training on these canaries has at least, at this delta and confidence.

    Every canary must have been put in by a fair coin of its own, which the attack has not seen; exactly half of them is
    not that. The attack says "in" of those that score highest and "out" of those that score lowest, and keeps silent
    about the rest. A tie for the last guess goes to the canary that makes it wrong: membership must not break ties, and
    no other order is known here. To be spared that, add noise to scores of few values.

    Args:
        scores_in: of the canaries that were in, (canaries,), higher for more likely in.
        scores_out: of those that were not.
        delta: of the claim, in [0, 1).
        num_guesses: how many to make, or several numbers of which the best counts, at Bonferroni's price. They must
            have been settled before anybody saw a score. None for `SHARES` of the canaries.
        sides: "in" to make no guesses "out"; this too is settled before.

    Raises:
        ConfigError: when an argument is out of range, the numbers of canaries in and out are not what fair coins give,
            or SciPy is missing.
        RunFailed: when a score is NaN.

    Source: arXiv:2305.08846, the main theorem and the p-value of its appendix.
    """
    inside, outside = checked(scores_in, "canaries in"), checked(scores_out, "canaries out")
    num_canaries = inside.size + outside.size
    _require_fair(inside.size, num_canaries)
    declared = _declared(num_guesses, num_canaries)
    significance = _significance(delta, confidence) / len(declared)
    found = []
    for number in declared:
        num_correct = _num_correct(inside, outside, number, sides)
        at_zero = _chance(num_canaries, number, num_correct, delta)(0.0)
        bound = _bound(num_canaries, number, num_correct, delta, significance)
        found.append((bound, -at_zero, number, num_correct))
    epsilon, _, number, num_correct = max(found)
    return OneRun(
        epsilon=epsilon,
        num_canaries=num_canaries,
        num_guesses=number,
        num_correct=num_correct,
        declared=declared,
        rule="fixed" if len(declared) == 1 else "bonferroni",
        sides=sides,
        delta=delta,
        confidence=confidence,
        ceiling=one_run_ceiling(num_canaries, delta, confidence, num_guesses=declared),
    )


def guessed_epsilon(
    num_canaries: int,
    num_guesses: int,
    num_correct: int,
    delta: float,
    confidence: float = 0.95,
    *,
    declared: int | Sequence[int],
) -> float:
    """Return what so many correct guesses prove: `one_run_epsilon` says the same of the scores they were made by.

    Args:
        declared: all numbers of guesses that were tried, `num_guesses` among them.

    Raises:
        ConfigError: when an argument is out of range, or SciPy is missing.
    """
    numbers = _declared(declared, num_canaries)
    if num_guesses not in numbers or not 0 <= num_correct <= num_guesses:
        told = ", ".join(str(number) for number in numbers)
        raise ConfigError(
            f"{num_correct} of {num_guesses} guesses are right, expected as many guesses as one of {told}"
        )
    significance = _significance(delta, confidence) / len(numbers)
    return _bound(num_canaries, num_guesses, num_correct, delta, significance)


def one_run_ceiling(
    num_canaries: int, delta: float, confidence: float = 0.95, *, num_guesses: int | Sequence[int] | None = None
) -> float:
    """Return the bound of an attack on so many canaries none of whose guesses is wrong: no audit can show more.

    Args:
        num_guesses: as in `one_run_epsilon`, but None for one guess about every canary.

    Raises:
        ConfigError: when an argument is out of range, or SciPy is missing.
    """
    declared = _declared(num_canaries if num_guesses is None else num_guesses, num_canaries)
    significance = _significance(delta, confidence) / len(declared)
    return max(_bound(num_canaries, number, number, delta, significance) for number in declared)


def epsilon_from_rates(
    true_positives: int,
    num_members: int,
    false_positives: int,
    num_nonmembers: int,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> float:
    """Return the epsilon that follows from the rates of an attack whose every trial is a training of its own.

    Members are then trainings with the canary and non-members trainings without it, and the threshold was settled
    before. Of many canaries in one training it is an estimate without a guarantee: their scores are not independent.

    Raises:
        ConfigError: when the numbers contradict each other, or SciPy is missing.

    Source: arXiv:2101.04535, with each of the two rates at half of 1 - confidence.
    """
    _significance(delta, confidence)  # a two-sided interval has just that half on each side
    tpr = clopper_pearson(true_positives, num_members, confidence).low
    fpr = clopper_pearson(false_positives, num_nonmembers, confidence).high
    return max(0.0, math.log((tpr - delta) / fpr)) if tpr > delta else 0.0


def _significance(delta: float, confidence: float) -> float:
    if not 0 <= delta < 1:
        raise ConfigError(f"delta {delta:g}, expected at least 0 and less than 1", hint="use the delta of the claim")
    require_confidence(confidence)
    return 1 - confidence


def _declared(num_guesses: int | Sequence[int] | None, num_canaries: int) -> tuple[int, ...]:
    """Return the numbers of guesses to try, each once, falling."""
    if num_guesses is None:
        numbers = {max(1, round(share * num_canaries)) for share in SHARES}
    else:
        numbers = {num_guesses} if isinstance(num_guesses, int) else set(num_guesses)
    wrong = [number for number in numbers if not 1 <= number <= num_canaries]
    if wrong or not numbers:
        what = ", ".join(str(number) for number in sorted(wrong)) or "no"
        raise ConfigError(f"{what} guesses about {num_canaries} canaries, expected 1 to {num_canaries}")
    return tuple(sorted(numbers, reverse=True))


def _require_fair(num_in: int, num_canaries: int) -> None:
    """Guesses about canaries most of which are in are right without any attack."""
    most = max(num_in, num_canaries - num_in)
    if 2 * special().betainc(most, num_canaries - most + 1, 0.5) < _IMPLAUSIBLE:
        raise ConfigError(
            f"{num_in} of {num_canaries} canaries are in, expected about half, as fair coins give",
            hint="draw a fair coin for every canary, and give all of them, in and out",
        )


def _num_correct(inside: NDArray[np.float64], outside: NDArray[np.float64], num_guesses: int, sides: Sides) -> int:
    if sides == "in":
        return _num_on_top(inside, outside, num_guesses)
    num_out = num_guesses // 2
    return _num_on_top(inside, outside, num_guesses - num_out) + _num_on_top(-outside, -inside, num_out)


def _num_on_top(right: NDArray[np.float64], wrong: NDArray[np.float64], num: int) -> int:
    """Return how many of the `num` highest scores are of `right`, ties going to `wrong`."""
    if num == 0:
        return 0
    last = np.sort(np.concatenate((right, wrong)))[-num]
    num_above = int((right > last).sum())
    return max(num_above, num - int((wrong >= last).sum()))


@lru_cache(maxsize=256)  # audits of one design ask for the same ceiling, and for few other bounds
def _bound(num_canaries: int, num_guesses: int, num_correct: int, delta: float, significance: float) -> float:
    return _largest_rejected(_chance(num_canaries, num_guesses, num_correct, delta), significance)


def _chance(num_canaries: int, num_guesses: int, num_correct: int, delta: float) -> Callable[[float], float]:
    """Return the function of epsilon that bounds the chance of so many correct guesses, or more, at (epsilon, delta).

    With B the number of successes in `num_guesses` trials that succeed with chance 1 / (1 + exp(-epsilon)), it is
    P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i, where v are the correct guesses and m the canaries.
    """
    below = np.arange(num_correct - 1, -1, -1)  # v - 1 down to 0
    gammaln = special().gammaln
    log_ways = gammaln(num_guesses + 1) - gammaln(below + 1) - gammaln(num_guesses - below + 1)

    def chance(epsilon: float) -> float:
        if num_correct == 0:
            return 1.0
        log_right, log_wrong = -np.logaddexp(0, -epsilon), -np.logaddexp(0, epsilon)
        exactly = np.exp(log_ways + below * log_right + (num_guesses - below) * log_wrong)
        largest = float((exactly.cumsum() / np.arange(1, num_correct + 1)).max())
        at_least = float(special().betainc(num_correct, num_guesses - num_correct + 1, math.exp(log_right)))
        return min(1.0, at_least + 2 * num_canaries * delta * largest)

    return chance


def _largest_rejected(chance: Callable[[float], float], significance: float) -> float:
    """Return the largest epsilon up to which the guesses are too good to be chance; 0 where they are not.

    Below one half the bounded chance grows with epsilon: while B's mode is under v - 2 m delta, the maximum is at an
    i of at least 2 m delta, and the derivative is not negative; from there on the bound is about a half or more. So
    the epsilons that are rejected are an interval, and it can be halved.
    """
    if chance(0.0) > significance:
        return 0.0
    low, high = 0.0, 1.0
    while chance(high) <= significance:
        low, high = high, 2 * high
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) <= significance else (low, middle)
    return low
