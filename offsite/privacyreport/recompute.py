"""Epsilon of a claim of differential privacy, worked out again from the constants that the claim states.

Nothing here trusts the epsilon that is claimed. It needs the extra ``privacy``, and refuses to go on without it.
"""

from __future__ import annotations

import math

from pydantic import Field

from offsite.artefacts.layout import Line
from offsite.audits.accounting import Mechanism, account, accountant, pld_epsilon, require_extra
from offsite.audits.runs import MAX_STEPS, Claim
from offsite.errors import ArtefactError, ConfigError
from offsite.strictjson import Strict

NUM_POINTS = 12
SAME_SHARE = 1e-6
"""How far two figures by one version of an accountant may differ, as a share of the figure."""
OTHER_SHARE = 0.01
"""The same, of two versions; and of PRV, whose version no claim states."""

_NEGLIGIBLE = 1e-9


class SpentPoint(Strict):
    """What the first steps of a run spend, at the run's delta."""

    steps: int = Field(ge=1)
    epsilon: float = Field(ge=0)


class Recomputed(Strict):
    """Epsilon from a claim's constants: of the run by three accountants, of its first steps, at the total's delta."""

    accountant: Line
    epsilon: float = Field(ge=0)
    epsilon_prv: float = Field(ge=0)
    epsilon_rdp: float = Field(ge=0)
    epsilon_at_delta_total: float = Field(ge=0)
    over_steps: tuple[SpentPoint, ...] = Field(min_length=1, max_length=NUM_POINTS)


def recompute(claim: Claim) -> Recomputed:
    """Return what the claim's constants come to by the accountants that are installed here; it takes seconds.

    Raises:
        ConfigError: when the extra ``privacy`` is not installed.
        ArtefactError: when there are too many steps or too little noise, or no finite epsilon at these deltas.
        RunFailed: when the accountants here disagree with each other.
    """
    _require_extra()
    if claim.steps > MAX_STEPS:
        raise ArtefactError(f"the claim's {claim.steps:,} steps are more than the {MAX_STEPS:,} that are accounted for")
    mechanism = Mechanism(claim.noise_multiplier, claim.sample_rate, claim.steps)
    try:
        spent = account(mechanism, claim.delta)
    except ConfigError:
        raise ArtefactError(
            f"the claim's noise multiplier of {claim.noise_multiplier:g} gives no meaningful guarantee"
        ) from None
    except MemoryError:
        raise ArtefactError(f"the claim's {claim.steps:,} steps are more than an accountant can hold here") from None
    steps = sorted({max(1, round(claim.steps * part / NUM_POINTS)) for part in range(1, NUM_POINTS + 1)})
    points = [(num, pld_epsilon([mechanism._replace(steps=num)], claim.delta)) for num in steps]
    at_total = pld_epsilon([mechanism], claim.delta_total)
    if not all(map(math.isfinite, [spent.epsilon_rdp, at_total, *(epsilon for _, epsilon in points)])):
        raise ArtefactError(f"the claim's constants give no finite epsilon at delta {claim.delta_total:.2g}")
    return Recomputed(
        accountant=accountant(),
        epsilon=spent.epsilon,
        epsilon_prv=spent.epsilon_prv,
        epsilon_rdp=spent.epsilon_rdp,
        epsilon_at_delta_total=at_total,
        over_steps=tuple(SpentPoint(steps=num, epsilon=epsilon) for num, epsilon in points),
    )


def require_claim(claim: Claim, found: Recomputed) -> None:
    """Return only if what is claimed is what its constants come to, and all runs together spent no less than this one.

    Raises:
        ArtefactError: naming the figure that does not follow.
    """
    share = SAME_SHARE if claim.accountant == found.accountant else OTHER_SHARE
    _require("epsilon", claim.epsilon, found.epsilon, share)
    _require("epsilon_prv", claim.epsilon_prv, found.epsilon_prv, OTHER_SHARE)
    _require("epsilon_rdp", claim.epsilon_rdp, found.epsilon_rdp, share)
    if claim.delta_total > claim.delta:
        raise ArtefactError(f"delta_total {claim.delta_total:.3g} of all runs is above this run's {claim.delta:.3g}")
    least = found.epsilon_at_delta_total
    if claim.epsilon_total < least * (1 - share) - _NEGLIGIBLE:
        raise ArtefactError(f"epsilon_total {claim.epsilon_total:.6g} of all runs is below {least:.6g} of this one")
    if claim.num_runs == 1:
        _require("epsilon_total of the only run", claim.epsilon_total, least, share)


def require_same(stated: Recomputed, found: Recomputed) -> None:
    """Return only if what a report says it recomputed is what is found here.

    Raises:
        ArtefactError: naming the figure that differs.
    """
    share = SAME_SHARE if stated.accountant == found.accountant else OTHER_SHARE
    if [point.steps for point in stated.over_steps] != [point.steps for point in found.over_steps]:
        raise ArtefactError("recomputed.over_steps is at other steps than the claim's have")
    _require("recomputed.epsilon_prv", stated.epsilon_prv, found.epsilon_prv, OTHER_SHARE)
    for name in ("epsilon", "epsilon_rdp", "epsilon_at_delta_total"):
        _require(f"recomputed.{name}", getattr(stated, name), getattr(found, name), share)
    for one, other in zip(stated.over_steps, found.over_steps, strict=True):
        _require(f"recomputed.over_steps at step {one.steps}", one.epsilon, other.epsilon, share)


def _require(name: str, stated: float, found: float, share: float) -> None:
    if not abs(stated - found) <= share * found + _NEGLIGIBLE:
        raise ArtefactError(
            f"{name} is stated as {stated:.9g}, the claim's own constants give {found:.9g}",
            hint="do not rely on this report; ask its issuer for the run's record",
        )


def _require_extra() -> None:
    try:
        require_extra()
    except ConfigError as error:
        raise ConfigError(
            f"epsilon cannot be recomputed here: {str(error).removeprefix('--dp needs the ')}", hint=error.hint
        ) from None
