"""Differential privacy added by the owner: one round's sum of clipped updates, with noise, over a fixed number.

The unit is one client's whole participation. A round draws every client by a coin of its own (`drawn`), clips each
update as a whole to norm C, sums, adds Gaussian noise of sigma * C, and divides by the expected number of clients, a
setting. Coins and noise are the operating system's. Clients have to trust the owner, who sees their updates as they
are: what is protected is what the owner gives away afterwards, against whoever reads it, the other clients among them.

Why adding or removing one client changes the sum by at most C, whatever that client sends:

- What a client adds is a function of its own update and of settings: clipped, it is no longer than C. An update that is
  not finite, or does not have the stated shapes, adds nothing (zero is no longer than C either). So does a client that
  was drawn and does not answer.
- Nothing is decided by looking at several clients. The shapes are stated, not those that most updates have; the divisor
  is not the number of those who came; no round is dropped because few came, and one that nobody came to is noise alone.
  Robust rules (`server/aggregation/aggregate.py`) and screening, which compare clients, must not choose who is summed.

Amplification by sampling holds as long as nobody but the owner knows who was drawn: `used` and `left_out` are not for
publication. Rounds add up by composition (`spent`). Between rounds anything may be chosen anew but the settings.

Source: DP-FedAvg, arXiv:1710.06963; for the accountants see `offsite/audits/accounting.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from adapters.updates import LowRank, Part, dense, norm
from offsite.audits.accounting import SMALLEST_SIGMA, Mechanism, Spent, account
from offsite.audits.accounting import calibrate as least_sigma
from offsite.audits.noise import gaussian, uniform
from offsite.errors import ConfigError, RunFailed
from offsite.strictjson import Strict
from server.aggregation.aggregate import Aggregated, Contribution

_MARGIN = 1 - 2.0**-40  # clipped to a hair less, so that rounding in float64 does not exceed the norm


class CentralPrivacy(Strict):
    """The settings of private rounds; all of them are public, and the same in every round."""

    clip: float = Field(gt=0, description="C, the largest Frobenius norm of one client's whole update")
    sigma: float = Field(ge=SMALLEST_SIGMA, description="standard deviation of the noise, in units of C")
    rate: float = Field(1.0, gt=0, le=1, description="chance of every client to be drawn in a round; 1 takes all")
    num_clients: int = Field(ge=1, description="clients of the federation, counted once and not changed")

    @property
    def divisor(self) -> float:
        """The expected number of clients in a round, whoever comes."""
        return self.rate * self.num_clients


def drawn(clients: Sequence[str], rate: float) -> tuple[str, ...]:
    """Return the clients of a round, each drawn by a coin of the operating system; possibly none.

    Raises:
        ConfigError: when a client is named twice, which would be two coins, or the rate is no chance.
    """
    if len(set(clients)) != len(clients):
        raise ConfigError("a client is named twice among those to draw from")
    if not 0 < rate <= 1:
        raise ConfigError(f"sampling rate {rate:g} is not above 0 and at most 1")
    coins = uniform(len(clients)).tolist()
    return tuple(client for client, coin in zip(clients, coins, strict=True) if coin < rate)


def spent(rounds: int, sigma: float, rate: float, delta: float) -> Spent:
    """Return what so many rounds spend at `delta`, for one client's participation in all of them.

    Raises:
        ConfigError: when there is no round, or too little noise for a guarantee.
        RunFailed: when the accountants disagree.
    """
    if rounds < 1:
        raise ConfigError(f"{rounds} rounds spend nothing, expected at least 1")
    return account(Mechanism(sigma, rate, rounds), delta)


def calibrate(epsilon: float, delta: float, *, rate: float, rounds: int) -> float:
    """Return the least noise multiplier with which so many rounds spend at most `epsilon`.

    Raises:
        ConfigError: when that is less noise than gives a guarantee, or more than can be searched for.
    """
    return least_sigma(epsilon, delta, rate=rate, steps=rounds)


def require_delta(delta: float, num_clients: int) -> None:
    """Return only if delta is small for so many clients; a mechanism may give one of them away whole at 1/N.

    Raises:
        ConfigError: when it is more than 1/N^1.1, or not positive.
    """
    largest = num_clients**-1.1
    if not 0 < delta < 1 or delta > largest:
        raise ConfigError(f"delta {delta:g} is not above 0 and at most {largest:.3g}, 1/N^1.1 of {num_clients} clients")


def privatise(
    tensors: Iterable[Mapping[str, Tensor]],
    shapes: Mapping[str, Sequence[int]],
    *,
    clip: float,
    sigma: float,
    divisor: float,
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Return the noisy mean of the clients' tensors, float32, and which of them counted as zero, with the reason.

    What is summed must be what the result is used as: dense updates, or, where all clients share one frozen A, their
    B alone. The mean of B is then the mean of the updates, and its noise the only one that is needed.

    Args:
        tensors: one mapping per client, gone through once, so that one of them is in memory at a time.
        shapes: name -> shape of what every client must give; stated beforehand, never taken from the clients.
        clip: largest norm over all tensors of one client together.
        sigma: standard deviation of the noise in units of `clip`.
        divisor: expected number of clients, fixed beforehand.

    Raises:
        ConfigError: when a setting gives no guarantee.
        RunFailed: when the result is not finite in float32, which no client can bring about.
    """
    _require_settings(clip, sigma, divisor)
    sums = {name: torch.zeros(tuple(shape), dtype=torch.float64) for name, shape in sorted(shapes.items())}
    zero: dict[int, str] = {}
    for place, given in enumerate(tensors):
        reason, size = _length(given, sums)
        if reason:
            zero[place] = reason
            continue
        scale = 1.0 if size <= clip * _MARGIN else clip * _MARGIN / size
        for name, total in sums.items():
            total += scale * given[name].double()
    found = {}
    for name, total in sums.items():
        noise = gaussian(total.numel()).view(total.shape)
        found[name] = ((total + sigma * clip * noise) / divisor).float()
        if not bool(torch.isfinite(found[name]).all()):
            raise RunFailed(f"the noisy mean of {name!r} is not finite: clip {clip:g}, noise {sigma:g}")
    return found, zero


def aggregate_privately(
    contributions: Sequence[Contribution],
    privacy: CentralPrivacy,
    shapes: Mapping[str, Sequence[int]],
    shared_a: Mapping[str, Tensor] | None = None,
) -> Aggregated:
    """Return one update, private in each client's participation; `left_out` counted as zero.

    Figures hold settings only: what is measured of the updates is not covered by the guarantee.

    Args:
        contributions: of the clients drawn for the round, possibly none.
        shapes: canonical tensor -> shape as stored, of all that may change.
        shared_a: canonical tensor -> the factor `LowRank.a` that all clients share, of as many tensors. Clip and noise
            then go by their B alone, which are fewer numbers, and the result keeps its factors; else it is dense.

    Raises:
        ConfigError: when weights are not all 1, a client contributes twice, or more come than there are clients.
        RunFailed: as `privatise`.
    """
    ordered = sorted(contributions, key=lambda one: one.client)
    if any(one.weight != 1.0 for one in ordered):
        raise ConfigError("weights are not all 1: with privacy every client counts once")
    if len({one.client for one in ordered}) != len(ordered) or len(ordered) > privacy.num_clients:
        raise ConfigError(f"{len(ordered)} updates, expected at most one from each of {privacy.num_clients} clients")
    if shared_a:
        shapes = {name: (shapes[name][0], a.shape[0]) for name, a in shared_a.items()}
    updates = ({name: _summand(part, shared_a) for name, part in one.update.items()} for one in ordered)
    mean, zero = privatise(updates, shapes, clip=privacy.clip, sigma=privacy.sigma, divisor=privacy.divisor)
    update: dict[str, Part] = {name: LowRank(shared_a[name], b) if shared_a else b for name, b in mean.items()}
    left_out = {ordered[place].client: reason for place, reason in zero.items()}
    used = tuple(one.client for one in ordered if one.client not in left_out)
    figures = {**privacy.model_dump(), "divisor": privacy.divisor, "norm_update": norm(update)}
    return Aggregated(update, used, left_out, {name: float(value) for name, value in figures.items()})


def _summand(part: Part, shared_a: Mapping[str, Tensor] | None) -> Tensor:
    """Return what of a client's part is summed up; a part without factors, where B is, has another shape."""
    return part.b if shared_a and isinstance(part, LowRank) else dense(part)


def _length(given: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> tuple[str, float]:
    """Return why a client's tensors count as zero, or "" and their norm."""
    if differing := given.keys() ^ sums.keys():
        return f"tensor {min(differing)[:80]!r} is missing or not expected", 0.0
    for name, total in sums.items():
        if given[name].shape != total.shape or not given[name].is_floating_point():
            return f"tensor {name!r} is {given[name].dtype} {tuple(given[name].shape)}, not {tuple(total.shape)}", 0.0
    size = math.sqrt(sum(float(given[name].double().square().sum()) for name in sums))
    return ("" if math.isfinite(size) else "its norm is not finite"), size


def _require_settings(clip: float, sigma: float, divisor: float) -> None:
    for name, value, least in (("clip", clip, 0.0), ("divisor", divisor, 0.0), ("sigma", sigma, SMALLEST_SIGMA)):
        if not math.isfinite(value) or value <= 0 or value < least:
            raise ConfigError(f"{name} is {value:g}: a private round needs it finite and above {least:g}")
