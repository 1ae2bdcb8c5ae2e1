"""Figures of membership attacks under the names that output checkers' tools give them (SACRO-ML's), from scores alone.

Scores are first *placed*: only their order is kept, and 0.5 is put where one threshold tells the two sides apart best,
because those tools take accuracy and advantage at 0.5 and nowhere else. Areas and hit rates depend on the order alone
and stay what the audit says. Rows with equal scores never favour an order: where so many highest or lowest rows are
counted, those that tie at the edge count by their share.

Source: names and definitions as `sacroml.metrics.get_metrics` of SACRO-ML 2.0.1; arXiv:2212.01233.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offsite.audits.statistics import auc, roc

Floats = NDArray[np.float64]
HALF = 0.5
_MOST_SURPRISE = 115.13
"""What is told in place of -ln(p) where p is too small to be told, as those tools do."""
_RATES = (0.5, 0.2, 0.1, 0.01, 0.001, 0.00001)
_SHARES = {"01": 0.1, "02": 0.2, "001": 0.01}


class Placed(NamedTuple):
    """Scores between 0 and 1, in the order of those given: above 0.5 is what the best threshold takes for a member."""

    members: Floats
    nonmembers: Floats


def placed(members: ArrayLike, nonmembers: ArrayLike) -> Placed:
    """Return the scores with nothing but their order kept, the best threshold at 0.5; equal scores stay equal."""
    inside, outside = np.asarray(members, dtype=np.float64), np.asarray(nonmembers, dtype=np.float64)
    distinct = np.unique(np.concatenate([inside, outside]))
    points = roc(inside, outside)
    num_above = int((points.tpr - points.fpr).argmax())  # so many distinct scores, from the highest down
    num_below = distinct.size - num_above
    below = HALF * np.arange(1, num_below + 1) / (num_below + 1)
    above = HALF + HALF * np.arange(1, num_above + 1) / (num_above + 1)
    places = np.concatenate([below, above])
    return Placed(places[np.searchsorted(distinct, inside)], places[np.searchsorted(distinct, outside)])


def figures(scores: Placed, curve: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return the figures of one attack.

    Args:
        curve: (false alarms, hits), as the audit states them.
    """
    inside, outside = scores
    hits, alarms = int((inside > HALF).sum()), int((outside > HALF).sum())
    missed, cleared = inside.size - hits, outside.size - alarms
    precision, recall = _share(hits, hits + alarms), hits / inside.size
    found: dict[str, Any] = {
        "TPR": recall,
        "FPR": alarms / outside.size,
        "FAR": _share(alarms, hits + alarms),
        "TNR": cleared / outside.size,
        "PPV": precision,
        "NPV": _share(cleared, cleared + missed),
        "FNR": missed / inside.size,
        "ACC": (hits + cleared) / (inside.size + outside.size),
        "F1score": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "Advantage": abs(recall - alarms / outside.size),
        "AUC": auc(inside, outside).value,
    }
    found["P_HIGHER_AUC"] = _chance_of((found["AUC"] - HALF) / null_deviation(inside.size, outside.size))
    for name, share in _SHARES.items():
        found |= _ends(scores, share, name)
    found["pred_prob_var"] = float(np.concatenate(scores).var())
    points = roc(inside, outside)
    for rate in _RATES:  # in percent
        found[f"TPR@{rate:g}%"] = float(points.tpr[points.fpr <= rate / 100].max())
    return found | {
        "fpr": [rate for rate, _ in curve],
        "tpr": [rate for _, rate in curve],
        "n_pos_test_examples": inside.size,
        "n_neg_test_examples": outside.size,
    }


def null_deviation(num_members: int, num_nonmembers: int) -> float:
    """Return the standard deviation of the area where scores mean nothing: Mann and Whitney's."""
    return math.sqrt((num_members + num_nonmembers + 1) / (12 * num_members * num_nonmembers))


def _ends(scores: Placed, share: float, name: str) -> dict[str, float]:
    """How often the rows with the highest scores are members, and those with the lowest; how surprising the gap is."""
    ordered = np.concatenate(scores)
    is_member = np.concatenate([np.ones(scores.members.size), np.zeros(scores.nonmembers.size)])
    num = math.ceil(ordered.size * share)
    highest, lowest = _mean_of_highest(ordered, is_member, num), _mean_of_highest(-ordered, is_member, num)
    members = float(is_member.mean())
    deviation = math.sqrt(2 * members * (1 - members) / num)
    chance = _chance_of((highest - lowest) / deviation)
    return {
        f"FMAX{name}": highest,
        f"FMIN{name}": lowest,
        f"FDIF{name}": highest - lowest,
        f"PDIF{name}": _MOST_SURPRISE if chance < 1e-50 else max(0.0, -math.log(chance)),
    }


def _mean_of_highest(scores: Floats, values: Floats, num: int) -> float:
    """Return the mean of the values of the `num` highest scores; those that tie for the last place count in part."""
    last = np.partition(scores, scores.size - num)[scores.size - num]
    above, tied = scores > last, scores == last
    rest = num - int(above.sum())
    return float((values[above].sum() + rest * values[tied].mean()) / num)


def _chance_of(deviations: float) -> float:
    """Return the chance of a normal variable that is at least so many standard deviations above its mean."""
    return math.erfc(deviations / math.sqrt(2)) / 2


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
