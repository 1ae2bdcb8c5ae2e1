"""The page for a board or an ethics committee: one sheet in plain words, made of ``report.json`` alone.

What left, what bounds it, what was tried, what nobody knows. Verdicts, sentences and figures are the record's own; the
page adds words around them and no figure. It refers to nothing outside itself and runs no script.
``report/templates/privacy/board.html.jinja`` lays it out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from offsite.audits.gates import Gate
from offsite.privacyreport.page import unmeasured
from offsite.privacyreport.record import PrivacyReport
from offsite.privacyreport.words import not_accounted, released, unit, upper, upper_delta
from offsite.report.engine import render
from offsite.report.numbers import whole

BOARD_NAME = "board.html"
MANY = 8
"""So many gates stand on the sheet as large as its other words; more of them, and all of it is a little smaller."""

_QUESTIONS = {
    "audit": "Was the adapter examined before it left?",
    "auc": "Can one tell whose rows it was tuned on?",
    "budget": "Is the agreed privacy budget kept?",
    "canaries": "Are rows planted as a test recognised?",
    "capability": "How much of the model's skill went out with the copy?",
    "epsilon": "Does an attack contradict the stated bound?",
    "inversion": "Was it tuned on enough rows, for long enough, that single rows are mixed with others?",
    "recovery": "How much of the model can be rebuilt from the copy?",
    "scan": "Are pieces of the text in its bytes?",
    "secrets": "Can secrets planted as a test be read back?",
    "tpr_at_1": "Are a few rows recognised with near certainty?",
    "union": "How much of the model do all copies hold together?",
    "verbatim": "Do rows come back word for word?",
    "withheld": "How far does the copy stay behind the model after tuning?",
}
_SCOPES = {"bundle": "", "plugged_in": "in the full model", "package": ""}


@dataclass(frozen=True)
class Tried:
    """A line of the table: the question in plain words, where it was asked, the verdict, and what was found."""

    question: str
    scope: str
    verdict: str
    css: str
    told: str


@dataclass(frozen=True)
class Sheet:
    """What the page says beside the record's own sentences."""

    is_claim: bool
    date: str
    left: tuple[str, ...]
    grounds: str
    is_accepted: bool
    bounds: tuple[str, ...]
    tried: tuple[Tried, ...]
    counts: str
    is_dense: bool


def board(report: PrivacyReport, digest: str) -> str:
    """Return the whole page as one HTML document.

    Args:
        digest: of ``report.json``, as verified or as just written.
    """
    tried = tuple(_tried(report))
    sheet = Sheet(
        is_claim=report.headline.startswith(("Differentially private", "What a package")),
        date=time.strftime("%Y-%m-%d", time.gmtime(report.created)),
        left=tuple(_left(report)),
        grounds="" if report.digests.bundle is None else released(report.release, report.digests.audits.get("bundle")),
        is_accepted=report.accepted_leakage is True,
        bounds=tuple(_bounds(report)),
        tried=tried,
        counts=_counts(tried),
        is_dense=len(tried) > MANY,
    )
    values = {"digest": digest, "report": report, "sheet": sheet, "unmeasured": list(unmeasured(report))}
    return render("privacy/board.html.jinja", values)


def _left(report: PrivacyReport) -> list[str]:
    """What went to the other party, in words."""
    bundle, sent = report.audits.bundle, report.audits.package
    found = []
    if bundle is not None:
        rows = "rows" if bundle.run.num_records is None else f"{whole(bundle.run.num_records)} rows"
        found.append(
            f"An adapter ({bundle.run.adapter.kind}): numbers that change how a model answers, learnt from {rows} in "
            f"{whole(bundle.run.steps)} steps. Its form has no place for text. It has to be treated as derived from "
            "the data."
        )
    elif report.digests.bundle is not None:
        found.append(
            "An adapter: numbers that change how a model answers. What it was learnt from is not in this report."
        )
    if sent is not None:
        found.append(
            f"A copy of the model with a smaller middle: {whole(sent.emulator_parameters)} parameters stand in for "
            f"{whole(sent.middle_parameters)}."
        )
    return found


def _bounds(report: PrivacyReport) -> list[str]:
    """What limits, by proof and not by trial, what one unit of the data may have changed."""
    if report.audits.bundle is None:
        return ["Nothing of the data is bounded here: this report quotes no run on it."]
    if report.privacy is None:
        return [
            "Nothing. The adapter was tuned without the clipping and the noise that would bound what one row may have "
            "changed. All that stands here was found by trying."
        ]
    claim = report.privacy.claim
    runs = "this run" if claim.num_runs == 1 else f"all {claim.num_runs} runs on any of the same rows"
    return [
        "Differential privacy, as claimed: what anybody can conclude from the adapter is nearly the same whether or "
        f"not any one {unit(claim)} was in the data. How nearly is epsilon, {upper(claim.epsilon)} at delta "
        f"{upper_delta(claim.delta)}; smaller is better, and above 10 it promises next to nothing.",
        f"Spent by {runs}: {upper(claim.epsilon_total)} of a budget of {claim.budget:.3f}. The figure follows from "
        "constants in the report and can be worked out anew; that the software kept to them cannot be seen from it.",
        not_accounted(claim),
    ]


def _tried(report: PrivacyReport) -> list[Tried]:
    scopes = {"bundle": report.gates.bundle, "plugged_in": report.gates.plugged_in, "package": report.gates.package}
    return [_row(_SCOPES[scope], gate) for scope, gates in scopes.items() for gate in gates]


def _row(scope: str, gate: Gate) -> Tried:
    return Tried(
        question=_QUESTIONS.get(gate.name, gate.name),
        scope=scope,
        verdict=gate.verdict,
        css={"passed": "passed", "failed": "failed"}.get(gate.verdict, "open"),
        told=gate.told,
    )


def _counts(tried: tuple[Tried, ...]) -> str:
    """Return how many gates there are of each verdict, in words."""
    if not tried:
        return "No limit was set, so none was held against anything."
    told = []
    for verdict in ("passed", "failed", "not measurable"):
        num = sum(one.verdict == verdict for one in tried)
        if num:
            told.append(f"{num} {verdict}")
    return f"{len(tried)} gates: {', '.join(told)}. Not measurable counts as not passed."
