"""What a package gives away of its model, and what attacks regained, as plain data for the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from offsite.audits.record import Capability, PackageAudit, Recovery
from offsite.privacyreport.charts import Bar, bars, recovery
from offsite.privacyreport.record import Limits
from offsite.report.charts import Curve
from offsite.report.drawing import Drawing
from offsite.report.numbers import number


@dataclass(frozen=True)
class CapabilityRow:
    """A line of the table of capabilities: chance, full, emulator, emulator tuned, plugged in, share kept."""

    name: str
    metric: str
    figures: tuple[float | None, ...]


@dataclass(frozen=True)
class RecoveryRow:
    """A line of the table of attacks: what each trained, on how much, and what it came to."""

    name: str
    trained: int
    tokens: int
    perplexity: float
    regained: float


@dataclass(frozen=True)
class WithheldRow:
    """A line of the table of what is withheld: by which way of tuning, how, on how many tokens; None: as sent."""

    name: str
    told: str
    tokens: int | None
    perplexity: float | None
    nats: float | None


@dataclass(frozen=True)
class Recovered:
    """What attacks regained from the package, as a table and drawn; ``legend`` is (name, class) of each line."""

    attacks: tuple[RecoveryRow, ...]
    legend: tuple[tuple[str, str], ...]
    drawing: Drawing


@dataclass(frozen=True)
class Package:
    """What a package gives away of its full model; ``recovered`` is None where no attack was run.

    ``withheld`` is empty where nothing was measured after tuning, as in audits of earlier versions.
    """

    audit: PackageAudit
    method: str
    capability: Drawing
    capabilities: tuple[CapabilityRow, ...]
    withheld: tuple[WithheldRow, ...]
    recovered: Recovered | None


def package(audit: PackageAudit | None, limits: Limits) -> Package | None:
    """Return what the package gives away of its full model."""
    if audit is None:
        return None
    settings = ", ".join(f"{name} {value}" for name, value in audit.method.settings.items())
    groups = [(f"{one.name} ({_words(one.metric)}, {one.num_rows:,} rows)", _bars(one)) for one in audit.capabilities]
    return Package(
        audit=audit,
        method=f"{audit.method.name} ({settings})" if settings else audit.method.name,
        capability=bars(groups, title="capability", limit=limits.max_capability),
        capabilities=tuple(_capability(one) for one in audit.capabilities),
        withheld=_withheld(audit),
        recovered=_recovered(audit.recovery, limits) if audit.recovery else None,
    )


def _withheld(audit: PackageAudit) -> tuple[WithheldRow, ...]:
    if not audit.withheld:
        return ()
    found = [WithheldRow(one.way, one.told, one.num_tokens, one.perplexity, one.nats) for one in audit.withheld]
    as_sent = "no tuning: an upper limit, and no measure of what the client is left with"
    return (*found, WithheldRow("as sent (zero-shot)", as_sent, None, None, audit.withheld_zero_shot))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _capability(one: Capability) -> CapabilityRow:
    figures = (one.chance, one.full, one.emulator, one.emulator_tuned, one.plugged_in, one.kept)
    return CapabilityRow(one.name, _words(one.metric), figures)


def _bars(one: Capability) -> list[Bar]:
    skill = _skill(one)
    rows = [
        ("full", one.full, 1.0, "owner"),
        ("emulator", one.emulator, one.kept, "client"),
        ("emulator, tuned", one.emulator_tuned, skill(one.emulator_tuned), "client light"),
        ("plugged in", one.plugged_in, skill(one.plugged_in), "owner light"),
        ("chance", one.chance, 0.0, "reference"),
    ]
    return [
        Bar(label, share, number(value), css)
        for label, value, share, css in rows
        if value is not None and share is not None and abs(share) < _BEYOND
    ]


_BEYOND = 20  # a share that large is no bar among others; the table has it


def _skill(one: Capability) -> Callable[[float | None], float | None]:
    """Return the share of the full model's skill above chance that a figure stands for; None where there is none."""
    in_nats = one.metric == "perplexity"

    def skill(value: float | None) -> float | None:
        if value is None or (in_nats and min(value, one.full, one.chance) <= 0):
            return None
        ends = [math.log(part) if in_nats else part for part in (one.chance, value, one.full)]
        chance, reached, full = ends
        return (reached - chance) / (full - chance) if full != chance else None

    return skill


def _recovered(found: tuple[Recovery, ...], limits: Limits) -> Recovered:
    curves = [
        Curve(_words(one.attack), tuple((float(p.num_tokens), p.regained) for p in one.points), f"s{n % 5 + 1}")
        for n, one in enumerate(found)
    ]
    rows = [
        RecoveryRow(
            name=_words(one.attack),
            trained=one.trained_parameters,
            tokens=max(point.num_tokens for point in one.points),
            perplexity=min(point.perplexity for point in one.points),
            regained=one.best,
        )
        for one in found
    ]
    return Recovered(
        attacks=tuple(rows),
        legend=tuple((curve.name, curve.css) for curve in curves),
        drawing=recovery(curves, title="share regained against tokens", limit=limits.max_recovery),
    )
