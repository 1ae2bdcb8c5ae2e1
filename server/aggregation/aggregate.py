"""One update made of several clients' updates, by a rule that the owner chose.

What is combined are effective updates (`adapters.updates`), never the factors of adapters. Weights are the owner's:
nothing that a client says about itself has a say here. An update that is not finite, or is not of the form that all
must have, is left out with its reason before any rule sees it: it is never averaged. The others are then held to the
rule with the same f, so that f clients who send nothing sound stop a round of Krum unless there are 3 f + 3 of them.

===============  ===========================================  =================================
rule             what it makes of n updates, f of them bad    holds for
===============  ===========================================  =================================
mean             the weighted mean, exact, in factors         f = 0
trimmed-mean     per value, the mean without the k outermost  f <= k < n / 2
median           per value, the median                        f < n / 2, n >= 3
krum             the one update that is nearest to its        n >= 2 f + 3
                 n - f - 2 nearest others
multi-krum       the mean of the `keep` best by that score    n >= 2 f + 3, keep <= n - f - 2
===============  ===========================================  =================================

"Holds" says that the bad ones cannot drag the result arbitrarily far. It does not say that they have no influence: an
update that lies among the others is not told from theirs by any rule. `server/aggregation/screening.py` gives a signal,
no more.

Rules that look at several clients to decide about one are not differentially private: with
`server/aggregation/privacy.py` they may come neither before nor after the clipping.

Source: Krum and Multi-Krum, Blanchard et al. 2017 (arXiv:1703.02757); median and trimmed mean, Yin et al. 2018
(arXiv:1803.01498).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from adapters.updates import Part, Update, combined, dense, norm, require_finite, scaled, shape_of, squared_distance
from offsite.errors import ConfigError, NotFinite, RunFailed, WrongNames, WrongShape
from offsite.strictjson import Strict

_VALUES_AT_ONCE = 1 << 20

Form = frozenset[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Contribution:
    """One client's update in one round. The weight is the owner's, never the client's."""

    client: str
    update: Update = field(repr=False)
    weight: float = 1.0


class Rule(Strict):
    """How updates become one."""

    name: Literal["mean", "trimmed-mean", "median", "krum", "multi-krum"] = "mean"
    num_byzantine: int = Field(0, ge=0, description="f, how many bad clients the rule has to bear")
    trim: float = Field(0.2, gt=0, lt=0.5, description="trimmed-mean: share of the clients cut at each end, rounded up")
    keep: int = Field(1, ge=1, description="multi-krum: how many are averaged; fewer where some are left out")
    max_norm: float | None = Field(None, gt=0, description="Frobenius norm to which every whole update is clipped")

    def num_trimmed(self, num_clients: int) -> int:
        """Return how many values are cut at each end. Rounded up: a share that cuts nobody would protect nobody."""
        return math.ceil(self.trim * num_clients - 1e-9)

    def require(self, num_clients: int) -> None:
        """Return only if the rule can be carried out on so many clients and bears what it is asked to bear.

        Raises:
            ConfigError: with the one condition that is not met.
        """
        n, f = num_clients, self.num_byzantine
        cut = self.num_trimmed(n)
        problems = {
            "mean": [(f == 0, "a mean bears no bad client, --num-byzantine must be 0")],
            "trimmed-mean": [
                (2 * cut < n, f"cutting {cut} values at each end leaves none of {n}"),
                (f <= cut, f"cutting {cut} values at each end does not bear {f} bad clients"),
            ],
            "median": [
                (n >= 3, f"a median needs at least 3 clients, there are {n}"),
                (2 * f < n, f"a median of {n} clients bears fewer than {n / 2:g} bad ones, not {f}"),
            ],
        }
        krum = [(n >= 2 * f + 3, f"{self.name} with {f} bad clients needs at least {2 * f + 3} clients, there are {n}")]
        if self.name == "multi-krum":
            krum.append(
                (self.keep <= n - f - 2, f"multi-krum of {n} with {f} bad may keep {n - f - 2}, not {self.keep}")
            )
        for met, problem in problems.get(self.name, krum):
            if not met:
                raise ConfigError(f"rule {self.name!r}: {problem}")


@dataclass(frozen=True)
class Aggregated:
    """What came of a round.

    Attributes:
        update: the one update; after a mean or Krum it still has factors where the clients' have.
        used: clients whose update is in it, sorted.
        left_out: the other clients, each with the reason; for the owner's eyes, not for the clients'.
        figures: numbers about the round.
    """

    update: dict[str, Part] = field(repr=False)
    used: tuple[str, ...]
    left_out: dict[str, str]
    figures: dict[str, float]


def aggregate(
    contributions: Sequence[Contribution],
    rule: Rule,
    *,
    min_survivors: int,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Aggregated:
    """Return the one update that the rule makes of the contributions; their order does not matter.

    Args:
        min_survivors: how many sound updates there must be.
        shapes: the exact tensors that every update must change, with their shapes; None to take the form that more
            than half of the contributions have.

    Raises:
        ConfigError: when a client contributes twice, a weight is not a positive number, weights differ under a rule
            that knows none, or `min_survivors` is not positive.
        RunFailed: when too few sound updates are left for `min_survivors` or for the rule.
    """
    ordered = sorted(contributions, key=lambda one: one.client)
    _require_weights(ordered, rule, min_survivors)
    left_out = dict(_unfit(ordered, shapes))
    sound = {one.client: one for one in ordered if one.client not in left_out}
    _require_survivors(len(sound), len(ordered), left_out, rule, min_survivors)
    norms = {client: norm(one.update) for client, one in sound.items()}
    updates = {client: clipped(one.update, norms[client], rule.max_norm) for client, one in sound.items()}
    if rule.name in {"krum", "multi-krum"}:
        update, worse = _krum(updates, rule)
        left_out.update(worse)
    elif rule.name == "mean":
        update = combined(list(updates.values()), shares([one.weight for one in sound.values()]))
    else:
        update = dict(by_value(list(updates.values()), _cut(rule, len(updates))))
    used = tuple(client for client in updates if client not in left_out)
    figures = {
        "num_contributions": float(len(ordered)),
        "num_sound": float(len(sound)),
        "num_used": float(len(used)),
        "num_clipped": float(sum(value > (rule.max_norm or math.inf) for value in norms.values())),
        "norm_median": median(norms.values()),
        "norm_largest": max(norms.values()),
        "norm_update": norm(update),
    }
    return Aggregated(update, used, dict(sorted(left_out.items())), figures)


def clipped(update: Update, size: float, max_norm: float | None) -> Update:
    """Return the update, of norm `size`, scaled down to `max_norm` where it is larger.

    Raises:
        NotFinite: when `size` is not finite: nothing is scaled by what is no number.
    """
    if not math.isfinite(size):
        raise NotFinite("the norm of an update is not finite")
    return update if max_norm is None or size <= max_norm else scaled(update, max_norm / size)


def shares(weights: Sequence[float]) -> list[float]:
    """Return positive weights as shares of their sum, however large they are."""
    largest = max(weights)
    total = math.fsum(weight / largest for weight in weights)
    return [weight / largest / total for weight in weights]


def form_of(update: Update) -> Form:
    """Return the names and shapes of what the update changes."""
    return frozenset((name, shape_of(part)) for name, part in update.items())


def _require_weights(ordered: Sequence[Contribution], rule: Rule, min_survivors: int) -> None:
    if min_survivors < 1:
        raise ConfigError(f"--min-survivors is {min_survivors}, expected at least 1")
    for client, count in Counter(one.client for one in ordered).items():
        if count > 1:
            raise ConfigError(f"client {client!r} contributes {count} updates to one round, expected one")
    for one in ordered:
        if isinstance(one.weight, bool) or not math.isfinite(one.weight) or one.weight <= 0:
            raise ConfigError(f"weight {one.weight!r} of client {one.client!r} is not a positive number")
    if rule.name != "mean" and len({one.weight for one in ordered}) > 1:
        raise ConfigError(
            f"rule {rule.name!r} counts every client once, the weights differ", hint="give equal weights, or use mean"
        )


def _unfit(ordered: Sequence[Contribution], shapes: Mapping[str, tuple[int, ...]] | None) -> Iterator[tuple[str, str]]:
    """Yield each client whose update is not to be used, with the reason."""
    if not ordered:
        return
    if shapes is None:
        expected, count = Counter(form_of(one.update) for one in ordered).most_common(1)[0]
        if 2 * count <= len(ordered):
            raise RunFailed(f"{len(ordered)} updates have no common form: at most {count} change the same tensors")
    else:
        expected = frozenset((name, tuple(shape)) for name, shape in shapes.items())
    for one in ordered:
        try:
            require_form(one.update, expected)
            require_finite("the update", one.update)
        except (WrongNames, WrongShape, NotFinite) as error:
            yield one.client, str(error)


def require_form(update: Update, expected: Form) -> None:
    """Return only if the update changes exactly these tensors, in these shapes, in float32.

    Raises:
        WrongNames, WrongShape: naming the first that differs.
    """
    found, wanted = {name: shape_of(part) for name, part in update.items()}, dict(expected)
    if differing := found.keys() ^ wanted.keys():
        name = min(differing)
        raise WrongNames(f"{'no tensor' if name in wanted else 'a tensor'} {name[:80]!r}")
    for name, part in update.items():
        if found[name] != wanted[name]:
            raise WrongShape(f"tensor {name!r} has shape {found[name]}, expected {wanted[name]}")
        if isinstance(part, Tensor) and part.dtype != torch.float32:
            raise WrongShape(f"tensor {name!r} is {part.dtype}, expected float32")


def _require_survivors(num: int, num_all: int, left_out: Mapping[str, str], rule: Rule, min_survivors: int) -> None:
    first = "".join(f"; {client}: {reason}" for client, reason in sorted(left_out.items())[:3])
    if num < min_survivors:
        raise RunFailed(f"{num} of {num_all} updates are sound, at least {min_survivors} are needed{first}")
    try:
        rule.model_copy(update={"keep": min(rule.keep, max(1, num - rule.num_byzantine - 2))}).require(num)
    except ConfigError as error:
        raise RunFailed(f"{num} of {num_all} updates are sound: {error}{first}") from None


def _cut(rule: Rule, num: int) -> int:
    """Return how many of the sorted values are left away at each end: for a median all but the middle one or two."""
    return (num - 1) // 2 if rule.name == "median" else rule.num_trimmed(num)


def by_value(updates: Sequence[Update], cut: int) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor's mean, value by value, without the outermost `cut` at each end; one tensor is in memory."""
    for name in updates[0]:
        values_NW = torch.stack([dense(update[name]).flatten() for update in updates])
        inner = [
            some.sort(dim=0).values[cut : len(updates) - cut].double().mean(dim=0).float()
            for some in values_NW.split(_VALUES_AT_ONCE, dim=1)
        ]
        yield name, torch.cat(inner).reshape(shape_of(updates[0][name]))


def _krum(updates: Mapping[str, Update], rule: Rule) -> tuple[dict[str, Part], dict[str, str]]:
    """Return what Krum makes of the updates, and who is not in it; equal scores are decided by name."""
    num_near = len(updates) - rule.num_byzantine - 2
    apart = pairwise_distances(updates)
    scores = {
        one: math.fsum(sorted(apart[one, other] for other in updates if other != one)[:num_near]) for one in updates
    }
    num_kept = min(rule.keep, num_near) if rule.name == "multi-krum" else 1
    best = sorted(scores, key=lambda client: (scores[client], client))[:num_kept]
    update = combined([updates[client] for client in sorted(best)], [1 / len(best)] * len(best))
    worst = scores[best[-1]]
    worse = {client: f"score {score:.4g}, {worst:.4g} was enough" for client, score in scores.items()}
    return update, {client: reason for client, reason in worse.items() if client not in best}


def pairwise_distances(updates: Mapping[str, Update]) -> dict[tuple[str, str], float]:
    """Return the squared Frobenius distance of every two clients' updates, both ways."""
    found = {(one, other): squared_distance(updates[one], updates[other]) for one, other in combinations(updates, 2)}
    return found | {(other, one): value for (one, other), value in found.items()}
