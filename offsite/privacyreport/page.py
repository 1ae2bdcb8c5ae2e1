"""The page of a privacy report, made of ``report.json`` alone: the same report, the same bytes.

It says what was measured and what was not, and no more: neither that something is safe nor that it could not be found
out. It refers to nothing outside itself and runs no script. ``report/templates/privacy/page.html.jinja`` lays it out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from offsite.audits.gates import Gate
from offsite.audits.runs import Claim
from offsite.privacyreport.charts import spent
from offsite.privacyreport.data import attacks, plugged_in
from offsite.privacyreport.model import package
from offsite.privacyreport.record import PrivacyReport
from offsite.privacyreport.tiles import tiles
from offsite.privacyreport.words import released, unit, upper, upper_delta
from offsite.report.drawing import Drawing
from offsite.report.engine import render
from offsite.report.numbers import NONE, number

_SCOPES = {"bundle": "the bundle", "plugged_in": "plugged in", "package": "the package"}
_ROLES = {
    "client": "The client reports on the adapter that it tuned on text of its own",
    "owner": "The owner of the model reports on what it sent or received",
}

_ATTESTATIONS = {
    "none": "none: whose keys signed is known, not on which machine or by which program",
    "tpm2-quote": "a TPM 2.0 quote about this report; it counts once it is verified against a policy of the reader's",
}


@dataclass(frozen=True)
class Head:
    """The head of the page: what kind of first line it is, the grounds of the release, and the tiles.

    ``accepted`` are the grounds where leakage was accepted, ``released`` where it was not; one of them is empty.
    """

    is_claim: bool
    date: str
    about: str
    accepted: str
    released: str
    tiles: list[tuple[str, str]]
    css: str


@dataclass(frozen=True)
class GateRow:
    """A line of the table of gates."""

    name: str
    scope: str
    verdict: str
    css: str
    found: str
    limit: str
    told: str


@dataclass(frozen=True)
class GateTable:
    """Every gate, and those that the bundle was let go on where they are not among them."""

    rows: tuple[GateRow, ...]
    when_sealed: str


@dataclass(frozen=True)
class Fact:
    """A line of a table of facts: a digest, words that somebody else said, or words of the report's own."""

    name: str
    told: str
    form: Literal["own", "digest", "said"] = "own"


@dataclass(frozen=True)
class Private:
    """The facts that NIST SP 800-226 asks for, and epsilon over steps."""

    facts: tuple[Fact, ...]
    drawing: Drawing
    delta: str
    accountant: str


def page(report: PrivacyReport) -> str:
    """Return the whole page as one HTML document that refers to nothing outside itself."""
    values = {
        "about": _about(report),
        "attacks": attacks(report.audits.bundle),
        "gates": _gates(report),
        "head": _head(report),
        "limits": report.limits,
        "package": package(report.audits.package, report.limits),
        "plugged_in": plugged_in(report.audits.plugged_in),
        "private": _private(report),
        "report": report,
        "unmeasured": list(unmeasured(report)),
    }
    return render("privacy/page.html.jinja", values)


def _head(report: PrivacyReport) -> Head:
    grounds = released(report.release, report.digests.audits.get("bundle"))
    accepted = report.accepted_leakage is True
    found = tiles(report)
    return Head(
        is_claim=report.headline.startswith(("Differentially private", "What a package")),
        date=_date(report.created),
        about=_ROLES[report.role],
        accepted=grounds if accepted else "",
        released=grounds if not accepted and report.digests.bundle is not None else "",
        tiles=found,
        css="tiles four" if len(found) <= 4 else "tiles",
    )


def _gates(report: PrivacyReport) -> GateTable:
    scopes = {"bundle": report.gates.bundle, "plugged_in": report.gates.plugged_in, "package": report.gates.package}
    rows = tuple(_gate(_SCOPES[scope], gate) for scope, gates in scopes.items() for gate in gates)
    release = report.release
    if release is None or release.gates == report.gates.bundle:
        return GateTable(rows, "")
    told = "; ".join(f"{gate.name} {gate.verdict} ({gate.told})" for gate in release.gates)
    return GateTable(rows, told)


def _gate(scope: str, gate: Gate) -> GateRow:
    return GateRow(
        name=gate.name,
        scope=scope,
        verdict=gate.verdict,
        css={"passed": "passed", "failed": "failed"}.get(gate.verdict, "open"),
        found=_figure(gate.found),
        limit=_figure(gate.limit),
        told=gate.told,
    )


def _figure(value: float | None) -> str:
    """Return a gate's figure; whole numbers, which count something, without decimals."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value == int(value) and value < 1e6 else number(value)


def _private(report: PrivacyReport) -> Private | None:
    if report.privacy is None:
        return None
    claim, found = report.privacy.claim, report.privacy.recomputed
    points = [(float(point.steps), point.epsilon) for point in found.over_steps]
    drawing = spent(
        points, claimed=claim.epsilon, budget=claim.budget, total=claim.epsilon_total, title="epsilon spent over steps"
    )
    facts = tuple(Fact(name, told) for name, told in _constants(claim, report.privacy.not_accounted))
    return Private(facts, drawing, upper_delta(claim.delta), found.accountant)


def _constants(claim: Claim, not_accounted: str) -> list[tuple[str, str]]:
    runs = "this run alone" if claim.num_runs == 1 else f"{claim.num_runs} runs that share a record with this one"
    return [
        ("unit of privacy", f"one {unit(claim)}"),
        ("neighbouring data", claim.neighbours),
        ("number of units", "public" if claim.number_of_units_public else "not public"),
        ("mechanism", claim.mechanism),
        ("sampler", f"{claim.sampler}, each unit at rate {claim.sample_rate:.6g} in each step"),
        ("steps", f"{claim.steps:,}"),
        ("clipping norm", f"{claim.clip:g}"),
        ("noise", f"{claim.noise_multiplier:.6g} times the clipping norm; {claim.noise}"),
        ("divisor of a step's sum", f"{claim.divisor:,}, fixed"),
        ("epsilon by PLD", f"{upper(claim.epsilon)} at delta {upper_delta(claim.delta)} ({claim.accountant})"),
        ("epsilon by PRV", upper(claim.epsilon_prv)),
        ("epsilon by RDP", upper(claim.epsilon_rdp)),
        ("epsilon of all runs", f"{upper(claim.epsilon_total)} at delta {upper_delta(claim.delta_total)}, of {runs}"),
        ("budget", f"{claim.budget:.3f}, for all runs on any of these records"),
        ("resumed, released", f"{claim.num_resumes} and {claim.num_releases} times"),
        ("released", claim.released),
        ("engine", claim.engine or "not stated"),
        ("not accounted for", not_accounted),
    ]


def unmeasured(report: PrivacyReport) -> Iterator[str]:
    """What no audit in the report measured, a sentence each."""
    bundle, plugged, sent = report.audits.bundle, report.audits.plugged_in, report.audits.package
    if bundle is None and (plugged is not None or report.release is not None):
        yield "The bundle itself: no audit of it is quoted."
    if bundle is not None:
        if not bundle.membership:
            yield "Membership of rows: no attack was run."
        elif bundle.retuned is None and any(one.tpr_at_1 is None for one in bundle.membership):
            yield "Hits at 1% false alarms: too few rows that were not trained on (1,000 are needed)."
        if bundle.canaries is None:
            yield "Canaries: none were planted, so no lower bound on epsilon and no exposure of made-up secrets."
        else:
            if bundle.canaries.bound is None:
                yield "A lower bound on epsilon: none was worked out from the canaries."
            if bundle.canaries.exposure is None:
                yield "Exposure: no made-up secret was planted."
        if bundle.verbatim is None or not bundle.verbatim.num_rows:
            yield "Reading rows back word for word: not tried."
        if plugged is None:
            yield "The adapter in the full model: only its owner can attack it there, and no such audit is quoted."
    if sent is None:
        yield "What the package gives away of the full model: no audit of it is quoted."
        return
    if not sent.recovery:
        yield "Recovery of the full model from the package: no attack was run."
    if sent.union is None:
        yield "What several packages of this model hold together: not measured."
    if all(one.plugged_in is None for one in sent.capabilities):
        if sent.withheld:
            yield "Capability with the client's own adapter, and of the full model with it: not measured."
        else:
            yield "Capability with an adapter: the emulator was measured as it was sent only."


def _about(report: PrivacyReport) -> list[Fact]:
    """What the report is about: parties, digests and versions."""
    digests, job, release = report.digests, report.job, report.release
    facts = [Fact("issuer", report.issuer, "digest"), Fact("role", report.role)]
    if job is not None:
        facts += [Fact("job", job.job_id, "digest"), Fact("job, digest", job.digest, "digest")]
        facts += [Fact("owner", job.owner, "digest"), Fact("client", job.client, "digest")]
    if digests.bundle:
        facts.append(Fact("bundle", digests.bundle, "digest"))
    if release is not None:
        facts.append(Fact("sealed bundle", release.sealed_digest, "digest"))
    facts += [Fact("package", digests.package, "digest"), Fact("full model", digests.base, "digest")]
    facts += [Fact(f"audit: {_SCOPES[kind]}", digest, "digest") for kind, digest in digests.audits.items()]
    for kind, audit in report.audits.given.items():
        facts.append(Fact(f"software, audit: {_SCOPES[kind]}", _versions(audit.versions), "said"))
    if report.attestation is not None:
        facts.append(Fact("attestation", _ATTESTATIONS[report.attestation.kind]))
    return [*facts, Fact("software, this report", _versions(report.versions), "said")]


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items()) or "not stated"


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
