"""Membership attacks as an audit records them: from scores of rows to `offsite.audits.record.Membership`."""

from __future__ import annotations

from numpy.typing import ArrayLike

from offsite.audits import statistics as auditing
from offsite.audits.record import (
    MAX_POINTS,
    Estimate,
    Membership,
    SignalName,
)
from offsite.audits.statistics import auc, balanced_accuracy, roc, thinned, tpr_at_fpr


def membership_of(
    signal: SignalName, members: ArrayLike, nonmembers: ArrayLike, confidence: float = 0.95
) -> Membership:
    """Return how well the signal's scores tell members from non-members.

    Args:
        members: scores of rows that were trained on, higher for more likely so; at least one.
        nonmembers: scores of rows that were not; at least one.

    Raises:
        ConfigError: when there are no scores, the confidence is out of range, or SciPy is missing.
        RunFailed: when a score is NaN.
    """
    points = thinned(roc(members, nonmembers), MAX_POINTS)
    return Membership(
        signal=signal,
        num_members=len(auditing.checked(members, "members")),
        num_nonmembers=len(auditing.checked(nonmembers, "non-members")),
        auc=_estimate(auc(members, nonmembers, confidence), confidence),
        balanced_accuracy=balanced_accuracy(members, nonmembers),
        tpr_at_1=_hits(members, nonmembers, 0.01, confidence),
        tpr_at_01=_hits(members, nonmembers, 0.001, confidence),
        roc=tuple((float(false), float(true)) for false, true in zip(points.fpr, points.tpr, strict=True)),
    )


def _hits(members: ArrayLike, nonmembers: ArrayLike, fpr: float, confidence: float) -> Estimate | None:
    found = tpr_at_fpr(members, nonmembers, fpr, confidence)
    return None if found is None else _estimate(found, confidence)


def _estimate(found: auditing.Estimate, confidence: float) -> Estimate:
    low, high = min(found.low, found.value), max(found.high, found.value)  # but for rounding, they are
    return Estimate(value=found.value, low=low, high=high, confidence=confidence)
