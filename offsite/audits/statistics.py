"""Statistics of membership attacks: ROC curves and rates with intervals, and the exposure of a planted secret.

An attack gives every text a score; a higher one means that it takes the text for a member, one that was trained on.
Members and non-members must be exchangeable but for that: split by chance, never old text against new. Scores are 1-d
arrays of float64; infinities are ordered as numbers. Only the order of scores counts, and ties never favour the attack,
but for the area under the curve, where they count half. What this proves about epsilon is in
`offsite.audits.lowerbound`.

Source: low false-positive rates, arXiv:2112.03570; exposure, arXiv:1802.08232.
"""

from __future__ import annotations

import importlib
import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offsite.errors import ConfigError, RunFailed

FEWEST_FALSE_POSITIVES = 10
"""So many non-members must be expected above a threshold before a rate is told at it."""

_ROUNDING = 1 + 1e-12  # 0.29 * 100 is meant to be 29


class Points(NamedTuple):
    """A ROC curve: false-positive and true-positive rates, both (points,) float64, from (0, 0) up to (1, 1)."""

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]


class Estimate(NamedTuple):
    """A figure and its two-sided confidence interval."""

    value: float
    low: float
    high: float


def require_extra() -> None:
    """Return only if SciPy, which comes with the extra ``privacy``, is installed.

    Raises:
        ConfigError: when it is missing.
    """
    special()


def special() -> Any:
    """Return SciPy's special functions, imported at the first call.

    Raises:
        ConfigError: when SciPy is not installed.
    """
    try:
        return importlib.import_module("scipy.special")
    except ImportError:
        raise ConfigError(
            "audits need the library 'scipy', which is not installed", hint="pip install 'offsite-tuning[privacy]'"
        ) from None


def checked(scores: ArrayLike, what: str) -> NDArray[np.float64]:
    """Return the scores as (scores,) float64; storage may be shared.

    Args:
        what: whose scores they are, for messages.

    Raises:
        ConfigError: when there are none, or they do not lie in one row.
        RunFailed: when one is NaN.
    """
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim != 1 or not found.size:
        raise ConfigError(f"scores of {what}: shape {found.shape}, expected one score or more in one dimension")
    if np.isnan(found).any():
        raise RunFailed(
            f"scores of {what}: {int(np.isnan(found).sum())} of {found.size} are NaN, expected numbers",
            hint="the audited weights may hold NaN; nothing can be said about them",
        )
    return found


def require_confidence(confidence: float) -> None:
    """Return only if the confidence lies in [0.5, 1).

    Raises:
        ConfigError: when it does not.
    """
    if not 0.5 <= confidence < 1:
        raise ConfigError(f"confidence {confidence:g}, expected at least 0.5 and less than 1", hint="0.95 is usual")


def roc(members: ArrayLike, nonmembers: ArrayLike) -> Points:
    """Return the curve of all thresholds: (0, 0), then one point for every distinct score, from the highest down.

    Scores that are equal pass the threshold together, so the curve holds no point that order alone would add.

    Raises:
        ConfigError: when there are no scores.
        RunFailed: when one is NaN.
    """
    inside, outside = np.sort(checked(members, "members")), np.sort(checked(nonmembers, "non-members"))
    thresholds = np.union1d(inside, outside)[::-1]
    return Points(*(np.concatenate(([0.0], _share_from(scores, thresholds))) for scores in (outside, inside)))


def _share_from(ordered: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((ordered.size - np.searchsorted(ordered, thresholds, side="left")) / ordered.size)


def thinned(points: Points, num: int) -> Points:
    """Return at most `num` of the points: both ends, the best one without a false positive, and an even choice of the
    others by the logarithm of their false-positive rate.

    Each that is kept is the highest of its false-positive rate, so the true-positive rate at a drawn rate is exact.

    Raises:
        ConfigError: when `num` is less than 3.
    """
    if num < 3:
        raise ConfigError(f"{num} points of a curve, expected at least 3")
    if points.fpr.size <= num:
        return points
    smallest = points.fpr[points.fpr > 0][0]
    rates = np.concatenate(([0.0], np.geomspace(smallest, 1.0, num - 2)))
    rates[-1] = 1.0
    kept = np.union1d([0], np.searchsorted(points.fpr, rates * _ROUNDING, side="right") - 1)
    return Points(points.fpr[kept], points.tpr[kept])


def auc(members: ArrayLike, nonmembers: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the area under the ROC curve: the chance that a member scores higher than a non-member, ties counted half.

    The interval is DeLong's on the logit scale, which holds about as often as stated up to areas of 0.98. Where its
    variance is zero or undefined - perfect separation, scores all equal, a single score - members and non-members are
    taken in disjoint pairs, which are independent trials that succeed with just this chance, and the interval is
    Clopper and Pearson's for the smaller of the two numbers of them. Wide, but never of width zero.

    Raises:
        ConfigError: when there are no scores, or the confidence is out of range.
        RunFailed: when a score is NaN.

    Source: DeLong, DeLong and Clarke-Pearson 1988; the logit scale, Pepe 2003.
    """
    require_confidence(confidence)
    inside, outside = checked(members, "members"), checked(nonmembers, "non-members")
    beaten = _share_below(inside, outside)  # by each member
    beating = 1 - _share_below(outside, inside)  # each non-member
    area = float(beaten.mean())
    num_pairs = min(inside.size, outside.size)
    error = 0.0
    if num_pairs > 1:
        error = math.sqrt(beaten.var(ddof=1) / inside.size + beating.var(ddof=1) / outside.size)
    if error < 1e-12 or not 0 < area < 1:
        return Estimate(area, *_binomial_interval(area * num_pairs, num_pairs, confidence))
    middle = math.log(area / (1 - area))
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error / (area * (1 - area))
    return Estimate(area, _logistic(middle - reach), _logistic(middle + reach))


def _share_below(scores: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each score the share of the others that lie below it, those equal counted half."""
    ordered = np.sort(others)
    below, not_above = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    return np.asarray((below + not_above) / (2 * others.size))


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def tpr_at_fpr(members: ArrayLike, nonmembers: ArrayLike, fpr: float, confidence: float = 0.95) -> Estimate | None:
    """Return the share of members above the smallest threshold that at most `fpr` of the non-members exceed.

    The threshold is a non-member's score, and "above" is strict for both: of non-members with equal scores all pass or
    none, and a member that only equals the threshold is not counted. The interval is Clopper and Pearson's over the
    members at this threshold; that another draw of non-members would have set another is not in it.

    Args:
        fpr: the largest false-positive rate, in (0, 1].

    Returns:
        The rate, or None with fewer than `10 / fpr` non-members, 1,000 for 1%: too few to know the threshold by.

    Raises:
        ConfigError: when there are no scores, or rate or confidence are out of range.
        RunFailed: when a score is NaN.
    """
    inside, outside = checked(members, "members"), checked(nonmembers, "non-members")
    if not 0 < fpr <= 1:
        raise ConfigError(f"false-positive rate {fpr:g}, expected more than 0 and at most 1")
    allowed = math.floor(fpr * outside.size * _ROUNDING)
    if allowed < FEWEST_FALSE_POSITIVES:
        require_confidence(confidence)
        return None
    num_above = inside.size  # where all non-members may pass
    if allowed < outside.size:
        num_above = int((inside > np.sort(outside)[outside.size - 1 - allowed]).sum())
    return clopper_pearson(num_above, inside.size, confidence)


def balanced_accuracy(members: ArrayLike, nonmembers: ArrayLike) -> float:
    """Return the mean of true-positive and true-negative rate at the best of all thresholds, 0.5 or more.

    The threshold is chosen on the same scores, so of scores that mean nothing it is a little above 0.5, the more so the
    fewer they are.

    Raises:
        ConfigError: when there are no scores.
        RunFailed: when one is NaN.
    """
    fpr, tpr = roc(members, nonmembers)
    return float((1 + tpr - fpr).max() / 2)


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """Return the share of successes, and the interval that holds the chance of one at least as often as stated.

    Raises:
        ConfigError: when the numbers contradict each other, or SciPy is missing.

    Source: Clopper and Pearson 1934.
    """
    require_confidence(confidence)
    if not (0 <= successes <= trials and trials > 0):
        raise ConfigError(
            f"{successes} successes in {trials} trials, expected at least one trial and no more successes"
        )
    return Estimate(successes / trials, *_binomial_interval(successes, trials, confidence))


def _binomial_interval(successes: float, trials: int, confidence: float) -> tuple[float, float]:
    """Successes need not be whole: the bounds grow with them."""
    quantile, tail = special().betaincinv, (1 - confidence) / 2
    low = 0.0 if successes <= 0 else float(quantile(successes, trials - successes + 1, tail))
    high = 1.0 if successes >= trials else float(quantile(successes + 1, trials - successes, 1 - tail))
    return low, high


def rank_of(score: float, candidates: ArrayLike) -> int:
    """Return the place of a planted secret among the other candidates, 1 for the one that the model likes best.

    A candidate with an equal score comes before the secret: a model that gives all the same score exposes nothing.

    Args:
        candidates: scores of candidates from the secret's space that were not planted, without the secret's own.

    Returns:
        A number from 1 to `len(candidates) + 1`, which is the number of candidates that `exposure` expects.

    Raises:
        ConfigError: when there are no candidates.
        RunFailed: when a score is NaN.
    """
    others = checked(candidates, "candidates")
    (secret,) = checked([score], "the secret")
    return 1 + int((others >= secret).sum())


def exposure(rank: int, num_candidates: int) -> float:
    """Return how many bits of the secret the model gave away: log2 of the number of candidates less that of the rank.

    The most that so many candidates can show is `exposure(1, num_candidates)`. Of a secret that was not learned it is
    at least b with chance 2^-b.

    Args:
        num_candidates: including the secret itself.

    Raises:
        ConfigError: when the rank is not among so many.
    """
    if not 1 <= rank <= num_candidates:
        raise ConfigError(f"rank {rank} among {num_candidates} candidates, expected 1 to {num_candidates}")
    return math.log2(num_candidates) - math.log2(rank)
