"""Privacy accounting: epsilon of a Poisson-subsampled Gaussian mechanism, by accountants that must agree.

The number of record is PLD (dp-accounting); PRV (Opacus) is faster and calibrates; RDP is told beside them because
other reports use it, and is never used to decide. Neighbouring data sets differ by one unit added or removed.

Source: PLD, arXiv:2207.04380; PRV, arXiv:2106.02848; RDP of the sampled Gaussian, arXiv:1908.10530.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from typing import NamedTuple

from offsite.errors import ConfigError, RunFailed

SMALLEST_SIGMA = 0.2
"""Below this noise multiplier no guarantee is worth the name, and accountants take minutes to say so."""

_LARGEST_SIGMA = 128.0
_DISAGREE_SHARE = 0.02
_NEGLIGIBLE = 1e-3  # of epsilon: discretisation errors of this size are no disagreement


class Mechanism(NamedTuple):
    """`steps` releases, each of units drawn at `rate` with noise of `sigma` times the clipping norm."""

    sigma: float
    rate: float
    steps: int


class Spent(NamedTuple):
    """Epsilon at `delta`, by three accountants; `epsilon` (PLD) is the number of record."""

    epsilon: float
    epsilon_prv: float
    epsilon_rdp: float
    delta: float


def require_extra() -> None:
    """Return only if the libraries of the extra ``privacy`` are installed.

    Raises:
        ConfigError: naming the one that is missing.
    """
    try:
        with _quiet():
            import dp_accounting  # noqa: F401
            import opacus  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--dp needs the library {(error.name or 'opacus').split('.')[0]!r}, which is not installed",
            hint="pip install 'offsite-tuning[privacy]'",
        ) from None


def accountant() -> str:
    """Return the accountant of record and its version, as reports quote it."""
    return f"PLD, dp-accounting {version('dp-accounting')}"


def account(mechanism: Mechanism, delta: float) -> Spent:
    """Return what one run of the mechanism spends at `delta`.

    Raises:
        ConfigError: when there is too little noise for a guarantee.
        RunFailed: when PLD and PRV differ by more than 2%; then no epsilon can be stated.
    """
    if mechanism.sigma < SMALLEST_SIGMA:
        raise _meaningless(f"--dp: noise multiplier {mechanism.sigma:g}")
    spent = Spent(
        epsilon=pld_epsilon([mechanism], delta),
        epsilon_prv=_prv_epsilon(mechanism, delta),
        epsilon_rdp=_rdp_epsilon(mechanism, delta),
        delta=delta,
    )
    require_agreement(spent)
    return spent


def require_agreement(spent: Spent) -> None:
    """Return only if the accountant of record and the one that calibrates say the same.

    Raises:
        RunFailed: when they differ by more than 2%.
    """
    difference = abs(spent.epsilon - spent.epsilon_prv)
    if not difference <= max(_DISAGREE_SHARE * spent.epsilon, _NEGLIGIBLE):
        raise RunFailed(
            f"accountants disagree: epsilon {spent.epsilon:.4g} by PLD, {spent.epsilon_prv:.4g} by PRV",
            hint="other versions of opacus or dp-accounting may be at fault; nothing was trained",
        )


def calibrate(epsilon: float, delta: float, *, rate: float, steps: int) -> float:
    """Return the least noise multiplier, to about 0.2%, whose run spends at most `epsilon` by PLD.

    Raises:
        ConfigError: when that is less noise than gives a guarantee, or more than can be searched for.
    """

    def enough(sigma: float) -> bool:
        return _prv_epsilon(Mechanism(sigma, rate, steps), delta, scale=epsilon) <= epsilon

    high = 1.0
    while not enough(high):
        high *= 2
        if high > _LARGEST_SIGMA:
            raise ConfigError(
                f"--dp: epsilon {epsilon:g} needs more noise than {_LARGEST_SIGMA:g} times the clipping norm",
                hint="use a larger epsilon, a smaller sampling rate or fewer steps",
            )
    low = high / 2
    while low >= SMALLEST_SIGMA and enough(low):
        low, high = low / 2, low
    if low < SMALLEST_SIGMA and enough(SMALLEST_SIGMA):
        raise _meaningless(f"--dp: epsilon {epsilon:g} over {steps} steps at rate {rate:.4g}")
    low = max(low, SMALLEST_SIGMA)
    while high - low > 0.001 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    while pld_epsilon([Mechanism(high, rate, steps)], delta) > epsilon:
        high *= 1.001
    return high


def pld_epsilon(runs: Iterable[Mechanism], delta: float) -> float:
    """Return the epsilon at `delta` of all these runs together on the same data, by PLD."""
    merged: Counter[tuple[float, float]] = Counter()
    for run in runs:
        merged[run.sigma, run.rate] += run.steps
    return _pld_epsilon(tuple(sorted(merged.items())), delta)


@lru_cache(maxsize=64)
def _pld_epsilon(merged: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    with _quiet():
        import dp_accounting
        from dp_accounting.pld import PLDAccountant

        found = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        for (sigma, rate), steps in merged:
            event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
            found.compose(dp_accounting.SelfComposedDpEvent(event, steps))
        return float(found.get_epsilon(delta))


@lru_cache(maxsize=64)
def _rdp_epsilon(mechanism: Mechanism, delta: float) -> float:
    with _quiet():
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant

        found = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        event = dp_accounting.PoissonSampledDpEvent(mechanism.rate, dp_accounting.GaussianDpEvent(mechanism.sigma))
        found.compose(dp_accounting.SelfComposedDpEvent(event, mechanism.steps))
        return float(found.get_epsilon(delta))


@lru_cache(maxsize=64)  # a federation asks the same of every round
def _prv_epsilon(mechanism: Mechanism, delta: float, *, scale: float | None = None) -> float:
    """Return Opacus' upper bound, its grid as fine as epsilon (about `scale`) asks."""
    with _quiet():
        from opacus.accountants import PRVAccountant

        found = PRVAccountant()
        found.history = [(mechanism.sigma, mechanism.rate, mechanism.steps)]
        error = 0.002 * (_rdp_epsilon(mechanism, delta) if scale is None else scale)
        return max(0.0, float(found.get_epsilon(delta, eps_error=min(0.05, max(2e-4, error)))))


def _meaningless(what: str) -> ConfigError:
    return ConfigError(
        f"{what}: less noise than {SMALLEST_SIGMA:g} times the clipping norm is no meaningful guarantee",
        hint="use a smaller epsilon, or a larger sampling rate or more steps that need more noise",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the accountants say about orders of RDP that they leave out; their bounds stay valid."""
    logger = logging.getLogger("absl")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
