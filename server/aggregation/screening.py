"""A signal of updates that are unlike the others, such as those of an adapter trained with a trigger.

It is a signal and no guarantee. What it can see is how one update of a round differs from the others; it does not know
what any of them does. A trojan that is trained mildly, or made to look like an honest update, is not seen: see
``benchmarks/screening/README.md`` for how often, measured on a toy. An honest client whose data are unlike the others'
is seen. So a flag is a reason to look, not one to refuse: nothing here leaves an update out.

Four figures per update, each held against the same figure of all updates of the round by a robust z-score (deviation
from the median, in units of 1.4826 times the median absolute deviation):

- ``distance``: from the coordinate-wise median of the updates, over that median's norm, as a logarithm; suspicious when
  large.
- ``cosine``: of the angle to the mean of the others; suspicious when small.
- ``concentration``: share of the energy that lies in the first singular direction of each matrix; suspicious when
  large, as few directions are enough for a trigger.
- ``size``: logarithm of the norm; suspicious when large: a trojan is scaled up to survive averaging.

Source: robust z-scores and their limit, Iglewicz and Hoaglin 1993; scaled-up trojans, arXiv:1807.00459; spectral
concentration of trojan adapters, arXiv:2602.15195.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from adapters.norms import spectral
from adapters.updates import LowRank, Part, Update, combined, dense, norm, require_finite, squared_distance
from offsite.errors import ConfigError
from server.aggregation.aggregate import Contribution, by_value, form_of, require_form

FEWEST = 4
LIMIT = 3.5

# which way each figure is suspicious, and a spread that is nothing to speak of: smaller ones count as this
_SIGNALS = {"distance": (1, 0.05), "cosine": (-1, 0.02), "concentration": (1, 0.02), "size": (1, 0.05)}
_TOTALLY = -40.0  # logarithm of what counts as no length at all


@dataclass(frozen=True)
class Screened:
    """The figures of a round's updates, and who stands out.

    Attributes:
        signals: client -> figure by name.
        scores: client -> robust z-score by name; positive is towards suspicious.
        flags: client -> what stands out, for scores above the limit.
    """

    signals: dict[str, dict[str, float]]
    scores: dict[str, dict[str, float]]
    flags: dict[str, str]


def screen(contributions: Sequence[Contribution], *, limit: float = LIMIT) -> Screened:
    """Return how far each update is from the others; weights do not matter, nor does the order.

    Args:
        limit: robust z-score above which a client is flagged.

    Raises:
        ConfigError: with fewer than `FEWEST` updates, where nobody can stand out, a client twice or no positive limit.
        WrongNames, WrongShape, NotFinite: when the updates are not all sound and of one form (`aggregate` leaves such
            ones out).
    """
    updates = {one.client: one.update for one in sorted(contributions, key=lambda one: one.client)}
    if len(updates) != len(contributions) or len(updates) < FEWEST:
        raise ConfigError(f"screening compares {len(updates)} clients, expected at least {FEWEST}, each once")
    if not limit > 0:
        raise ConfigError(f"screening limit {limit:g} is not positive")
    expected = form_of(next(iter(updates.values())))
    for client, update in updates.items():
        require_form(update, expected)
        require_finite(f"the update of client {client!r}", update)
    signals = _signals(updates)
    scores: dict[str, dict[str, float]] = {client: {} for client in updates}
    for name, (direction, least_spread) in _SIGNALS.items():
        values = {client: direction * found[name] for client, found in signals.items()}
        for client, score in robust_scores(values, least_spread).items():
            scores[client][name] = score
    flags = {client: reason for client, found in scores.items() if (reason := _reason(found, limit))}
    return Screened(signals, scores, flags)


def robust_scores(values: Mapping[str, float], least_spread: float) -> dict[str, float]:
    """Return how far each value is from the median, in units of a spread that a few outliers do not move."""
    middle = median(values.values())
    spread = max(1.4826 * median(abs(value - middle) for value in values.values()), least_spread)
    return {name: (value - middle) / spread for name, value in values.items()}


def concentration(update: Update) -> float:
    """Return the share of the matrices' energy that lies in the first singular direction of each, 0 to 1."""
    matrices = {name: part for name, part in update.items() if isinstance(part, LowRank) or part.dim() == 2}
    energy = norm(matrices) ** 2
    return sum(_largest(part) ** 2 for part in matrices.values()) / energy if energy else 0.0


def _signals(updates: Mapping[str, Update]) -> dict[str, dict[str, float]]:
    from_median, of_median = _from_median(updates)
    found = {}
    for client, update in updates.items():
        size = norm(update)
        others = [other for name, other in updates.items() if name != client]
        mean = combined(others, [1 / len(others)] * len(others))
        length = norm(mean)
        inner = (size**2 + length**2 - squared_distance(update, mean)) / 2
        found[client] = {
            "distance": _logarithm(from_median[client] / of_median if of_median else from_median[client]),
            "cosine": inner / (size * length) if size and length else 0.0,
            "concentration": concentration(update),
            "size": _logarithm(size),
        }
    return found


def _from_median(updates: Mapping[str, Update]) -> tuple[dict[str, float], float]:
    """Return each update's distance from the coordinate-wise median, and the median's norm; one tensor at a time."""
    squares, of_median = dict.fromkeys(updates, 0.0), 0.0
    for name, middle in by_value(list(updates.values()), (len(updates) - 1) // 2):
        of_median += float(middle.double().square().sum())
        for client, update in updates.items():
            squares[client] += float((dense(update[name]).double() - middle).square().sum())
    return {client: math.sqrt(square) for client, square in squares.items()}, math.sqrt(of_median)


def _largest(part: Part) -> float:
    """Return the largest singular value, of factors through their QR decompositions."""
    if isinstance(part, LowRank):
        r_b, r_a = (torch.linalg.qr(one.double(), mode="r").R for one in (part.b, part.a.T))
        return spectral(r_b @ r_a.T)
    return spectral(part.double())


def _logarithm(value: float) -> float:
    return math.log(value) if value > math.exp(_TOTALLY) else _TOTALLY


def _reason(scores: Mapping[str, float], limit: float) -> str:
    beyond = {name: score for name, score in scores.items() if score > limit}
    return ", ".join(f"{name} {score:.1f}" for name, score in sorted(beyond.items(), key=lambda one: -one[1]))
