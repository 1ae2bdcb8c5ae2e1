"""The page of a privacy report, made of ``report.json`` alone: the same report, the same bytes.

It says what was measured and what was not, and no more: neither that something is safe nor that it could not be found
out. It refers to nothing outside itself and runs no script.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from importlib.resources import files

from offsite.audits.gates import Gate
from offsite.privacyreport.charts import spent
from offsite.privacyreport.data import attacks, plugged_in
from offsite.privacyreport.model import package
from offsite.privacyreport.record import PrivacyReport
from offsite.privacyreport.tiles import tiles
from offsite.privacyreport.words import released, unit, upper, upper_delta
from offsite.report.markup import Markup, el, join
from offsite.report.numbers import NONE, number

_SCOPES = {"bundle": "the bundle", "plugged_in": "plugged in", "package": "the package"}


def page(report: PrivacyReport) -> str:
    """Return the whole page as one HTML document that refers to nothing outside itself."""
    styles = [(files("offsite") / name).read_text(encoding="utf-8") for name in ("report.css", "privacy.css")]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        el("title", report.headline),
        el("style", Markup("".join(styles))),
    )
    body = el(
        "main",
        _header(report),
        _gates(report),
        _privacy(report),
        attacks(report.audits.bundle),
        plugged_in(report.audits.plugged_in),
        package(report.audits.package, report.limits),
        _unmeasured(report),
        el("h2", "What this report does not say"),
        el("ul", *(el("li", sentence) for sentence in report.non_claims)),
        _digests(report),
        el("footer", "Made from report.json alone. This page loads nothing and runs no script."),
    )
    return f"<!doctype html>\n{el('html', head, el('body', body), lang='en')}\n"


def _header(report: PrivacyReport) -> Markup:
    claimed = report.headline.startswith("Differentially private") or report.headline.startswith("What a package")
    accepted = report.accepted_leakage is True
    about = {
        "client": "The client reports on the adapter that it tuned on text of its own",
        "owner": "The owner of the model reports on what it sent or received",
    }[report.role]
    lead = (
        f"{about}. Every figure was measured by the attacks named beside it; what they could not measure is listed "
        "further down."
    )
    return join(
        el("h1", report.headline, class_=None if claimed else "bad"),
        el("div", f"offsite · privacy report of {_date(report.created)}", class_="kicker"),
        el("p", el("b", released(report.release, report.digests.audits.get("bundle"))), class_="accepted")
        if accepted
        else None,
        el("p", lead, class_="lead"),
        tiles(report),
        el("p", released(report.release, report.digests.audits.get("bundle")))
        if not accepted and report.digests.bundle is not None
        else None,
    )


def _gates(report: PrivacyReport) -> Markup:
    scopes = {"bundle": report.gates.bundle, "plugged_in": report.gates.plugged_in, "package": report.gates.package}
    lines = [_gate(_SCOPES[scope], gate) for scope, gates in scopes.items() for gate in gates]
    title = el("h2", "Gates")
    if not lines:
        return join(title, el("p", "No limit was set for this package, so none was held against it."))
    intro = "A gate is a limit on what an attack may have found. Not measurable counts as not passed."
    columns = (
        el("th", "gate"),
        el("th", "verdict"),
        el("th", "found", class_="number"),
        el("th", "limit", class_="number"),
        el("th", ""),
    )
    table = el("table", el("thead", el("tr", *columns)), el("tbody", *lines))
    before = _before(report)
    return join(title, el("p", intro, class_="note"), el("div", table, class_="scroll"), before)


def _gate(scope: str, gate: Gate) -> Markup:
    css = {"passed": "passed", "failed": "failed"}.get(gate.verdict, "open")
    return el(
        "tr",
        el("th", gate.name, el("small", scope, class_="scope"), scope="row", class_="kind"),
        el("td", gate.verdict, class_=f"verdict {css}"),
        el("td", _figure(gate.found), class_="number"),
        el("td", _figure(gate.limit), class_="number"),
        el("td", gate.told, class_="told"),
    )


def _figure(value: float | None) -> str:
    """Return a gate's figure; whole numbers, which count something, without decimals."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value == int(value) and value < 1e6 else number(value)


def _before(report: PrivacyReport) -> Markup | None:
    """The gates that the bundle was let go on, where they are not those above."""
    release = report.release
    if release is None or release.gates == report.gates.bundle:
        return None
    told = "; ".join(f"{gate.name} {gate.verdict} ({gate.told})" for gate in release.gates)
    return el("p", el("b", "When the bundle was sealed: "), f"{told}.")


def _privacy(report: PrivacyReport) -> Markup | None:
    """The facts that NIST SP 800-226 asks for, and epsilon over steps; or that there is no such claim."""
    title = el("h2", "Differential privacy")
    if report.privacy is None:
        if report.audits.bundle is None:
            return None
        run = report.audits.bundle.run
        rows = "rows" if run.num_records is None else f"{run.num_records:,} rows"
        told = (
            f"None. The adapter was tuned in {run.steps:,} steps on {rows} without clipping and "
            "noise that would bound what one row may change. What follows is what attacks found."
        )
        return join(title, el("p", told))
    claim, found = report.privacy.claim, report.privacy.recomputed
    runs = "this run alone" if claim.num_runs == 1 else f"{claim.num_runs} runs that share a record with this one"
    facts = [
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
        ("not accounted for", report.privacy.not_accounted),
    ]
    points = [(float(point.steps), point.epsilon) for point in found.over_steps]
    chart = spent(
        points, claimed=claim.epsilon, budget=claim.budget, total=claim.epsilon_total, title="epsilon spent over steps"
    )
    caption = (
        f"Epsilon spent by the first steps of this run at delta {upper_delta(claim.delta)}, recomputed from the "
        f"constants above by {found.accountant}. Dashed: claimed, spent by all runs together, and their budget."
    )
    return join(title, _facts(facts), el("figure", chart, el("figcaption", caption)))


def _unmeasured(report: PrivacyReport) -> Markup:
    texts = list(_missing(report))
    listed = [el("ul", *(el("li", text) for text in texts))] if texts else [el("p", "Everything listed above was.")]
    return join(el("h2", "What was not measured"), *listed)


def _missing(report: PrivacyReport) -> Iterable[str]:
    bundle, plugged, sent = report.audits.bundle, report.audits.plugged_in, report.audits.package
    if bundle is None and (plugged is not None or report.release is not None):
        yield "The bundle itself: no audit of it is quoted."
    if bundle is not None:
        if not bundle.membership:
            yield "Membership of rows: no attack was run."
        elif any(one.tpr_at_1 is None for one in bundle.membership):
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
        yield "Capability with an adapter: the emulator was measured as it was sent only."


def _digests(report: PrivacyReport) -> Markup:
    digests, job, release = report.digests, report.job, report.release
    lines: list[tuple[str, object]] = [("issuer", _mono(report.issuer)), ("role", report.role)]
    if job is not None:
        lines += [("job", _mono(job.job_id)), ("job, digest", _mono(job.digest))]
        lines += [("owner", _mono(job.owner)), ("client", _mono(job.client))]
    lines += [("bundle", _mono(digests.bundle))] if digests.bundle else []
    lines += [("sealed bundle", _mono(release.sealed_digest))] if release is not None else []
    lines += [("package", _mono(digests.package)), ("full model", _mono(digests.base))]
    lines += [(f"audit: {_SCOPES[kind]}", _mono(digest)) for kind, digest in digests.audits.items()]
    for kind, audit in report.audits.given.items():
        found = ", ".join(f"{name} {version}" for name, version in audit.versions.items())
        lines.append((f"software, audit: {_SCOPES[kind]}", _said(found or "not stated")))
    stated = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines.append(("software, this report", _said(stated or "not stated")))
    return join(
        el("h2", "What it is about, and how to check it"),
        el("p", "With the issuer's card pinned in a keys folder; it prints every check that it makes:"),
        el("pre", "offsite report verify REPORT --bundle BUNDLE --package PACKAGE --keys KEYS"),
        _facts(lines),
    )


def _facts(facts: Sequence[tuple[str, object]]) -> Markup:
    lines = [el("tr", el("th", name, scope="row"), el("td", value)) for name, value in facts]
    return el("div", el("table", el("tbody", *lines), class_="facts"), class_="scroll")


def _mono(text: str) -> Markup:
    return el("span", text, class_="digest")


def _said(text: str) -> Markup:
    """Words that somebody else chose, which may not turn the direction of what stands beside them."""
    return el("bdi", text)


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
