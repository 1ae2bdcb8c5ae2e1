"""What attacks found of the data, as plain data for the page: by the emulator, and by the full model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offsite.audits.gates import MAX_TPR_AT_1, WEAK_EPSILON
from offsite.audits.record import (
    BundleAudit,
    CanaryAudit,
    EpsilonBound,
    Estimate,
    Exposure,
    Membership,
    PluggedAudit,
)
from offsite.privacyreport.charts import MOST_STEMS, exposure, roc
from offsite.privacyreport.words import upper_delta
from offsite.report.charts import Curve
from offsite.report.drawing import Drawing
from offsite.report.numbers import fixed, percent

_SOURCES = {
    "set aside": "were set aside from the same text before tuning",
    "validation": "were held out of the same text for validation",
    "file": "come from a file of their own",
}
_VALIDATED_ON = "were validated on, in files of their own"

Legend = tuple[tuple[str, str], ...]
"""What the lines of a drawing stand for: (name, class) of each."""


@dataclass(frozen=True)
class Shown:
    """An estimate in digits, and its interval."""

    shown: str
    interval: str


@dataclass(frozen=True)
class AttackRow:
    """A line of the table of attacks; None where rows were too few to tell."""

    signal: str
    num_members: int
    num_others: int
    area: Shown
    hits_at_1: Shown | None
    hits_at_01: Shown | None
    balanced_accuracy: float


@dataclass(frozen=True)
class Attacked:
    """Attacks on rows that were trained on or were not, as a table and drawn.

    ``limit`` is the share of hits that a gate lets pass at 1% false alarms, None where none is held against them.
    """

    attacks: tuple[AttackRow, ...]
    confidences: str
    legend: Legend
    drawing: Drawing
    limit: float | None


@dataclass(frozen=True)
class Bits:
    """The bits of exposure of each secret, drawn."""

    legend: Legend
    drawing: Drawing


@dataclass(frozen=True)
class Canaries:
    """What canaries showed, by the emulator or the full model: ``where``."""

    where: str
    num: int
    num_included: int
    membership: Attacked | None
    bound: EpsilonBound | None
    delta: str
    exposure: Exposure | None
    bits: Bits | None


@dataclass(frozen=True)
class Attacks:
    """What attacks on the bundle found, by the emulator with the adapter."""

    audit: BundleAudit
    source: str
    membership: Attacked | None
    before: Shown | None
    canaries: Canaries | None
    scanned: str


def attacks(audit: BundleAudit | None) -> Attacks | None:
    """Return what attacks on the bundle found, by the emulator with the adapter."""
    if audit is None:
        return None
    claim, before = audit.run.claim, audit.auc_before
    limit = None if claim is not None and claim.epsilon <= WEAK_EPSILON else MAX_TPR_AT_1
    scanned = ", ".join(f"{name.replace('_', ' ')} {num:,}" for name, num in audit.scan.found.items())
    return Attacks(
        audit=audit,
        source=_source(audit),
        membership=_attacked(audit.membership, limit, "rows"),
        before=None if before is None else _digits(before, 3),
        canaries=None if audit.canaries is None else _canaries(audit.canaries, "the emulator"),
        scanned=scanned or "nothing",
    )


def _source(audit: BundleAudit) -> str:
    """Return in words where the rows that were not trained on come from."""
    if audit.nonmembers == "validation" and not audit.run.text.validation:
        return _VALIDATED_ON
    return _SOURCES.get(audit.nonmembers or "", "are said to come from the same text")


def plugged_in(audit: PluggedAudit | None) -> Canaries | None:
    """Return what canaries found of the adapter in the full model."""
    return None if audit is None else _canaries(audit.canaries, "the full model")


def _attacked(found: Sequence[Membership], limit: float | None, what: str) -> Attacked | None:
    if not found:
        return None
    most = max(one.num_nonmembers for one in found)
    floor = 10.0 ** -min(5, max(3, math.floor(math.log10(most))))
    curves = [Curve(one.signal, one.roc, f"s{number % 5 + 1}") for number, one in enumerate(found)]
    mark = None if limit is None else (0.01, limit)
    return Attacked(
        attacks=tuple(_attack(one) for one in found),
        confidences=", ".join(sorted({percent(one.auc.confidence) for one in found})),
        legend=(*((curve.name, curve.css) for curve in curves), ("chance", "chance")),
        drawing=roc(curves, title=f"hits against false alarms, {what}", floor=floor, limit=mark),
        limit=limit,
    )


def _attack(found: Membership) -> AttackRow:
    return AttackRow(
        signal=found.signal,
        num_members=found.num_members,
        num_others=found.num_nonmembers,
        area=_digits(found.auc, 3),
        hits_at_1=None if found.tpr_at_1 is None else _percents(found.tpr_at_1, 1),
        hits_at_01=None if found.tpr_at_01 is None else _percents(found.tpr_at_01, 2),
        balanced_accuracy=found.balanced_accuracy,
    )


def _canaries(found: CanaryAudit, where: str) -> Canaries:
    return Canaries(
        where=where,
        num=found.num,
        num_included=found.num_included,
        membership=_attacked(found.membership, None, f"canaries, {where}"),
        bound=found.bound,
        delta="" if found.bound is None else _delta(found.bound.delta),
        exposure=found.exposure,
        bits=None if found.exposure is None or not found.exposure.bits else _bits(found.exposure, where),
    )


def _bits(found: Exposure, where: str) -> Bits:
    few = len(found.bits) <= MOST_STEMS and len(found.bits_before) in (0, len(found.bits))
    legend = [("after tuning", "spot" if few else "s2")]
    if found.bits_before:
        legend.append(("before", "ring" if few else "before"))
    drawing = exposure(found.bits, found.bits_before, most=found.most_bits, title=f"exposure of secrets, {where}")
    return Bits(tuple(legend), drawing)


def _delta(delta: float) -> str:
    return upper_delta(delta) if delta > 0 else "0"


def _digits(found: Estimate, digits: int) -> Shown:
    low, high = (fixed(end, digits) for end in (found.low, found.high))
    return Shown(fixed(found.value, digits), f"{low}\N{EN DASH}{high}")


def _percents(found: Estimate, digits: int) -> Shown:
    low, high = (percent(end, digits) for end in (found.low, found.high))
    return Shown(percent(found.value, digits), f"{low}\N{EN DASH}{high}")
