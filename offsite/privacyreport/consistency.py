"""Consistency of an audit's figures: those that follow from others are worked out again and must agree.

Curves rise from nothing to all; areas, accuracies and hit rates lie within what the curves allow, which are thinned;
intervals of hit rates, bounds on epsilon and kept capabilities are those of the counts and scores stated; guesses about
retunings are as many as their coins give; no count is above its total. What a figure was measured on cannot be checked
here: a made-up audit that agrees with itself passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from offsite.audits.lowerbound import guessed_epsilon, one_run_ceiling
from offsite.audits.record import (
    DECLARED_SIGNAL,
    MAX_POINTS,
    Audit,
    BundleAudit,
    CanaryAudit,
    Capability,
    EpsilonBound,
    Estimate,
    Exposure,
    Membership,
    PackageAudit,
    Retuned,
    Verbatim,
    Way,
)
from offsite.audits.retunings import num_guessed
from offsite.audits.statistics import FEWEST_FALSE_POSITIVES, clopper_pearson
from offsite.errors import ArtefactError, ConfigError

LARGEST = 1e15
"""No figure of an audit is larger: none measures anything of that size."""
SAME = 1e-6
"""How far a figure may be from what it is worked out to be, as a share of it or, below one, as such."""


_FAR_OFF = 6
"""How many standard deviations the number of a retuning's rows may be from a half of them; coins reach 6 never."""


class _Gap(NamedTuple):
    """Two points of a curve, one after the other, and the first false-positive rate at which one may be left out."""

    fpr: float
    tpr: float
    next_fpr: float
    next_tpr: float
    first: float


def require_sound(kind: str, audit: Audit) -> None:
    """Return only if the audit's numbers are of a size that is measured, and those that follow from others do.

    Args:
        kind: what it is of, for messages.

    Raises:
        ArtefactError: naming what is not.
        ConfigError: when the extra ``privacy``, by which some are worked out, is not installed.
    """
    if told := next(_unsound(audit), None):
        raise ArtefactError(f"audit of the {kind}: {told}", hint="do not rely on it; audit anew")


def _unsound(audit: Audit) -> Iterator[str]:
    """Yield, in words, what cannot be."""
    yield from _numbers(audit.model_dump())
    if isinstance(audit, PackageAudit):
        yield from _package(audit)
        return
    if isinstance(audit, BundleAudit):
        for one in audit.membership:
            yield from _attack(one)
        if audit.retuned is not None:
            yield from _retuned(audit.retuned)
        if audit.verbatim is not None:
            yield from _verbatim(audit.verbatim)
    if audit.canaries is not None:
        yield from _canaries(audit.canaries)


def _numbers(found: object) -> Iterator[str]:
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    for part in parts:
        yield from _numbers(part)
    if isinstance(found, int | float) and abs(found) > LARGEST:
        yield f"it holds a figure beyond {LARGEST:g}"


def _differs(what: str, stated: float, expected: float) -> Iterator[str]:
    if not abs(stated - expected) <= SAME * max(1.0, abs(expected)):
        yield f"{what} is stated as {stated:.9g}, its own figures give {expected:.9g}"


def _beyond(what: str, stated: float, most: float) -> Iterator[str]:
    if stated > most + SAME:
        yield f"{what} is {stated:.9g}, above the {most:.9g} that it is of"


# --- attacks


def _attack(one: Membership) -> Iterator[str]:
    """Everything that the counts and the curve of one attack tell of its figures."""
    name = f"{one.signal!r}"
    yield from _curve(one, name)
    gaps = _gaps(one)
    yield from _within(f"the area of {name}", one.auc.value, *_areas(gaps))
    best = max((1 + tpr - fpr) / 2 for fpr, tpr in one.roc)
    most = max((1 + gap.next_tpr - gap.first) / 2 for gap in gaps)
    yield from _within(f"the balanced accuracy of {name}", one.balanced_accuracy, best, max(best, most))
    for rate, found in ((0.01, one.tpr_at_1), (0.001, one.tpr_at_01)):
        yield from _hits(f"the hit rate of {name} at {rate:.1%}", one, gaps, rate, found)


def _curve(one: Membership, name: str) -> Iterator[str]:
    if one.roc[0] != (0, 0) or one.roc[-1] != (1, 1):
        yield f"the curve of {name} does not go from (0, 0) to (1, 1)"
    if any(later[0] < now[0] or later[1] < now[1] for now, later in pairwise(one.roc)):
        yield f"the curve of {name} does not rise"
    for point in one.roc:
        for share, num in zip(point, (one.num_nonmembers, one.num_members), strict=True):
            if not _is_whole(share * num):
                yield f"the curve of {name} has a point at {share:.9g}, which is no share of {num} rows"


def _gaps(one: Membership) -> list[_Gap]:
    """Return the steps of the curve, each with where `offsite.audits.statistics.thinned` may have left points out of
    it.

    It keeps the last point up to each of its rates, the lowest of which is the curve's first above zero. So whatever it
    leaves out between two points has a false-positive rate above every one of its rates below the second's.
    """
    smallest = next(fpr for fpr, _ in one.roc if fpr > 0)
    num_rates = MAX_POINTS - 2
    rates = [smallest ** (1 - place / (num_rates - 1)) for place in range(num_rates)]
    found, place, below = [], 0, 0.0
    for (fpr, tpr), (next_fpr, next_tpr) in pairwise(one.roc):
        while place < num_rates and rates[place] < next_fpr * (1 - 1e-9):
            below = rates[place]
            place += 1
        first = next_fpr if next_fpr <= smallest else max(below, fpr + 1 / one.num_nonmembers)
        found.append(_Gap(fpr, tpr, next_fpr, next_tpr, max(fpr, min(first, next_fpr))))
    return found


def _areas(gaps: list[_Gap]) -> tuple[float, float]:
    """Return the least and the most that the area under the whole curve may be."""
    least = math.fsum((gap.next_fpr - gap.fpr) * gap.tpr for gap in gaps)
    most = math.fsum(
        (gap.first - gap.fpr) * (gap.tpr + gap.next_tpr) / 2 + (gap.next_fpr - gap.first) * gap.next_tpr for gap in gaps
    )
    return least, most


def _hits(what: str, one: Membership, gaps: list[_Gap], rate: float, found: Estimate | None) -> Iterator[str]:
    """The rate is told exactly where there are others enough, lies in the step of the curve, and has its interval."""
    allowed = math.floor(rate * one.num_nonmembers * (1 + 1e-12))
    if (found is None) != (allowed < FEWEST_FALSE_POSITIVES):
        yield f"{what} is told of {one.num_nonmembers} others" if found else f"{what} is missing"
    if found is None:
        return
    share = allowed / one.num_nonmembers * (1 + 1e-12)
    step = next(gap for gap in gaps if gap.next_fpr > share)
    most = step.next_tpr if step.first <= share else step.tpr
    yield from _within(what, found.value, step.tpr, most)
    num = found.value * one.num_members
    if not _is_whole(num):
        yield f"{what} is no share of {one.num_members} rows"
        return
    try:
        expected = clopper_pearson(round(num), one.num_members, found.confidence)
    except ConfigError as error:
        _require_installed(error)
        yield f"{what}: {error}"
        return
    yield from _differs(f"the lower end of {what}", found.low, min(expected.low, found.value))
    yield from _differs(f"the upper end of {what}", found.high, max(expected.high, found.value))


def _within(what: str, stated: float, least: float, most: float) -> Iterator[str]:
    if not least - SAME <= stated <= most + SAME:
        yield f"{what} is stated as {stated:.9g}, its curve allows {least:.9g} to {most:.9g}"


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) <= SAME * max(1.0, abs(number))


# --- retunings


def _retuned(found: Retuned) -> Iterator[str]:
    """Every number of guesses follows from the coins, and these can have been fair."""
    num = found.num_rows
    if len(found.steps) != len(found.num_in):
        yield f"{len(found.num_in)} retunings have {len(found.steps)} numbers of steps"
    yield from _beyond("the number of retunings", len(found.num_in), found.num_asked)
    for num_in in found.num_in:
        if not 0 < num_in < num or abs(num_in - num / 2) > _FAR_OFF * math.sqrt(num) / 2:
            yield f"a retuning was on {num_in} of {num} rows, fair coins do not fall so"
    signals = [one.signal for one in found.attacks]
    if len(signals) != len(set(signals)):
        yield "two attacks on retunings have one signal"
    num_pairs = sum(min(num_in, num - num_in) for num_in in found.num_in)
    num_guesses = num_guessed(num) * len(found.num_in)
    for one in found.attacks:
        if (one.num_pairs, one.num_guesses) != (num_pairs, num_guesses):
            told = f"{one.num_pairs} pairs and {one.num_guesses} rows, the coins give {num_pairs} and {num_guesses}"
            yield f"{one.signal!r} guessed of retunings about {told}"
        yield from _beyond(
            f"the number of pairs that {one.signal!r} told apart", one.num_right + one.num_tied, num_pairs
        )
        yield from _beyond(f"the number of right guesses by {one.signal!r}", one.num_correct, num_guesses)


# --- canaries and rows


def _canaries(found: CanaryAudit) -> Iterator[str]:
    yield from _beyond("the number of canaries trained on", found.num_included, found.num)
    signals = [one.signal for one in found.membership]
    if len(signals) != len(set(signals)):
        yield "two attacks on canaries have one signal"
    for one in found.membership:
        if (one.num_members, one.num_nonmembers) != (found.num_included, found.num - found.num_included):
            yield f"the attack by {one.signal!r} is on other canaries than those {found.num}"
        yield from _attack(one)
    if found.bound is not None:
        yield from _beyond("the number of canaries guessed about", found.bound.num_canaries, found.num)
        yield from _bound(found.bound)
    if found.exposure is not None:
        yield from _exposure(found.exposure)


def _bound(bound: EpsilonBound) -> Iterator[str]:
    if bound.signal != DECLARED_SIGNAL:
        yield f"the bound on epsilon goes by {bound.signal!r}, declared is {DECLARED_SIGNAL!r}"
    if list(bound.declared) != sorted(set(bound.declared), reverse=True):
        yield "the declared numbers of guesses are not each once, falling"
    try:
        epsilon = guessed_epsilon(
            bound.num_canaries,
            bound.num_guesses,
            bound.num_correct,
            bound.delta,
            bound.confidence,
            declared=bound.declared,
        )
        ceiling = one_run_ceiling(bound.num_canaries, bound.delta, bound.confidence, num_guesses=bound.declared)
    except ConfigError as error:
        _require_installed(error)
        yield f"the bound on epsilon: {error}"
        return
    yield from _differs("the bound on epsilon", bound.epsilon, epsilon)
    yield from _differs("the ceiling of the bound on epsilon", bound.ceiling, ceiling)


def _require_installed(error: ConfigError) -> None:
    """A figure that is out of range speaks against the audit, a library that is missing does not."""
    if isinstance(error.__context__, ImportError):
        raise error


def _exposure(found: Exposure) -> Iterator[str]:
    for what, num in (("greedily", found.num_extracted_greedy), ("by draws", found.num_extracted_top_k)):
        yield from _beyond(f"the number of secrets read out {what}", num, found.num_secrets)
    if found.num_extracted_top_k and not found.num_samples:
        yield "secrets were read out by draws, and none were made"
    most = math.log2(found.num_candidates)
    yield from _differs("the most bits of exposure", found.most_bits, most)
    for when, bits in (("after", found.bits), ("before", found.bits_before)):
        if not 1 <= len(bits) <= found.num_secrets:
            yield f"exposures {when} tuning are {len(bits)}, of {found.num_secrets} secrets"
        if any(not -SAME <= one <= most + SAME for one in bits):
            yield f"an exposure {when} tuning is not among the {most:.9g} bits that there are"


def _verbatim(found: Verbatim) -> Iterator[str]:
    for when, num in (("after", found.num_extracted), ("before", found.num_extracted_before)):
        yield from _beyond(f"the number of rows that came back {when} tuning", num, found.num_rows)
    if found.num_new is not None:
        least = found.num_extracted - found.num_extracted_before
        if not max(0, least) <= found.num_new <= found.num_extracted:
            yield f"{found.num_new} rows are new of those that came back, {found.num_extracted}"


# --- packages


def _package(audit: PackageAudit) -> Iterator[str]:
    for one in audit.capabilities:
        yield from _differs(f"the share kept of {one.name!r}", one.kept, _kept(one))
    similar = audit.similarity
    for what, num in (("tensors", similar.num_verbatim), ("rows", similar.num_verbatim_by_row)):
        yield from _beyond(f"the number of parameters sent as they are, by {what},", num, similar.num_parameters)
    if audit.union is not None:
        yield from _beyond("the share that one package holds", audit.union.share_single, audit.union.share_union)
    yield from _withheld(audit)


def _withheld(audit: PackageAudit) -> Iterator[str]:
    """What is withheld after tuning follows from the tuned emulator's figure, and that from where it was measured."""
    if not audit.withheld:
        return
    known: dict[Way, list[float]] = {"client": [], "recovery attack": []}
    for text in (one for one in audit.capabilities if one.name == "perplexity"):
        for one in audit.withheld:
            yield from _differs(
                f"what is withheld after tuning by a {one.way}", one.nats, math.log(one.perplexity) - text.full
            )
        known["client"] = [] if text.emulator_tuned is None else [text.emulator_tuned]
    points = [point for one in audit.recovery for point in one.points]
    if any(point.num_tokens for point in points):
        known["recovery attack"] = [math.log(min(point.perplexity for point in points))]
    found = {one.way: math.log(one.perplexity) for one in audit.withheld}
    for way, losses in known.items():
        if (way in found) != bool(losses):
            yield f"what is withheld after tuning by a {way} and its figures do not go together"
        for loss in losses:
            if way in found:
                yield from _differs(f"the loss after tuning by a {way}", found[way], loss)


def _kept(one: Capability) -> float:
    """Return the share of the full model's skill above chance; 1 where it has none. Of perplexity, less is better."""
    skill = one.chance - one.full if one.name == "perplexity" else one.full - one.chance
    if skill <= 0:
        return 1.0
    return (one.chance - one.emulator) / (one.chance - one.full)
