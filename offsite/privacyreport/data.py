"""The privacy report's sections on the data: attacks on rows and canaries, by the emulator and by the full model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from offsite.audits.gates import MAX_TPR_AT_1, WEAK_EPSILON
from offsite.audits.record import (
    BundleAudit,
    CanaryAudit,
    Estimate,
    Exposure,
    Membership,
    PluggedAudit,
    ScanFigures,
    Verbatim,
)
from offsite.privacyreport.charts import MOST_STEMS, exposure, roc
from offsite.privacyreport.words import upper_delta
from offsite.report.charts import Curve
from offsite.report.markup import Markup, el, join
from offsite.report.numbers import size

_EN_DASH = "\N{EN DASH}"
_SOURCES = {
    "set aside": "were set aside from the same text before tuning",
    "validation": "were held out of the same text for validation",
    "file": "come from a file of their own",
}
_TOO_FEW = el("span", "too few to tell", class_="deviation")


def attacks(audit: BundleAudit | None) -> Markup | None:
    """Return what attacks on the bundle found, by the emulator with the adapter."""
    if audit is None:
        return None
    claim = audit.run.claim
    limit = None if claim is not None and claim.epsilon <= WEAK_EPSILON else (0.01, MAX_TPR_AT_1)
    source = _SOURCES.get(audit.nonmembers or "", "are said to come from the same text")
    intro = (
        f"Each attack gives rows of up to {audit.tokens_per_row:,} tokens a score, by the emulator with the adapter, "
        "and says of those that score high that they were trained on. Members were trained on; others were "
        f"not, and {source}."
    )
    parts = [el("h2", "Attacks on the bundle: rows of the text"), el("p", intro)]
    parts += _membership(audit.membership, limit, "rows")
    if (before := audit.auc_before) is not None:
        told = f"{before.value:.3f} ({before.low:.3f}{_EN_DASH}{before.high:.3f})"
        why = "Far from 0.5, rows and others differ by more than training, and the areas above tell nothing."
        parts.append(el("p", f"Before tuning, the emulator's loss told them apart with an area of {told}. {why}"))
    parts.append(_verbatim(audit.verbatim))
    if audit.canaries is not None:
        parts.append(el("h2", "Attacks on the bundle: canaries"))
        parts += _canaries(audit.canaries, "the emulator")
    parts += [el("h2", "The bundle's bytes"), _scan(audit.scan)]
    return join(*parts)


def plugged_in(audit: PluggedAudit | None) -> Markup | None:
    """Return what canaries found of the adapter in the full model."""
    if audit is None:
        return None
    intro = (
        "The client committed to its canaries before it tuned and revealed them afterwards; the owner asked the full "
        "model, with the adapter in it, for them."
    )
    title = el("h2", "Plugged into the full model: canaries")
    return join(title, el("p", intro), *_canaries(audit.canaries, "the full model"))


def _membership(found: Sequence[Membership], limit: tuple[float, float] | None, what: str) -> list[Markup]:
    if not found:
        return [el("p", "No attack was run.")]
    titles = ("members", "others", "area under the curve", "hits at 1%", "hits at 0.1%", "balanced accuracy")
    head = el("tr", el("th", "attack"), *(el("th", title, class_="number") for title in titles))
    lines = [
        el(
            "tr",
            el("th", one.signal, scope="row"),
            el("td", f"{one.num_members:,}", class_="number"),
            el("td", f"{one.num_nonmembers:,}", class_="number"),
            el("td", _estimate(one.auc, "{:.3f}"), class_="number"),
            el("td", _estimate(one.tpr_at_1, "{:.1%}"), class_="number"),
            el("td", _estimate(one.tpr_at_01, "{:.2%}"), class_="number"),
            el("td", f"{one.balanced_accuracy:.3f}", class_="number"),
        )
        for one in found
    ]
    most = max(one.num_nonmembers for one in found)
    floor = 10.0 ** -min(5, max(3, math.floor(math.log10(most))))
    curves = [Curve(one.signal, one.roc, f"s{number % 5 + 1}") for number, one in enumerate(found)]
    chart = roc(curves, title=f"hits against false alarms, {what}", floor=floor, limit=limit)
    caption = (
        "Hits (trained on, and said to be) against false alarms (not trained on, and said to be), both on logarithmic "
        "axes, because an attack that is right about a few rows and wrong about hardly any does harm already. The "
        "diagonal is chance, the dashed line marks 1% false alarms"
        f"{'' if limit is None else f', the cross the most that the gate lets pass there ({limit[1]:.0%})'}. "
        "What lies below the axes is drawn on their edge."
    )
    legend = [el("span", curve.name, class_=curve.css) for curve in curves] + [el("span", "chance", class_="chance")]
    confidences = sorted({f"{one.auc.confidence:.0%}" for one in found})
    note = f"0.5 is chance, 1 is always right. In brackets: intervals at {', '.join(confidences)} confidence."
    return [
        el("div", el("table", el("thead", head), el("tbody", *lines)), class_="scroll"),
        el("p", note, class_="note"),
        el("p", *legend, class_="note legend"),
        el("figure", chart, el("figcaption", caption)),
    ]


def _canaries(canaries: CanaryAudit, where: str) -> list[Markup]:
    told = (
        f"{canaries.num:,} rows were made up before tuning, and a fair coin for each said whether it was trained on: "
        f"{canaries.num_included:,} were. Scores are by {where} with the adapter."
    )
    parts = [el("p", told)]
    if canaries.membership:
        parts += _membership(canaries.membership, None, f"canaries, {where}")
    if (bound := canaries.bound) is not None:
        shown = (
            f"{bound.num_correct:,} of {bound.num_guesses:,} guesses about {bound.num_canaries:,} canaries were right "
            f"(by {bound.signal}; guesses: {bound.rule}): at {bound.confidence:.0%} confidence, whatever made this "
            f"adapter has epsilon of at least {bound.epsilon:.3f} at delta {_delta(bound.delta)}. A perfect attack "
            f"with as many canaries would have shown {bound.ceiling:.3f}. A small value confirms nothing."
        )
        parts += [el("h3", "What the guesses prove about epsilon"), el("p", shown)]
    if canaries.exposure is not None:
        parts += _exposure(canaries.exposure, where)
    return parts


def _exposure(found: Exposure, where: str) -> list[Markup]:
    told = (
        f"{found.num_secrets:,} made-up secrets were planted, {_times(found.repeats)}. Exposure is how many bits "
        f"of one {where} gives away when all {found.num_candidates:,} candidates are ranked; {found.most_bits:.1f} is "
        f"rank 1. Asked for them, {where} said {found.num_extracted_greedy} greedily, and {found.num_extracted_top_k} "
        f"in {found.num_samples:,} samples."
    )
    parts = [el("h3", "How far made-up secrets stand out"), el("p", told)]
    if found.bits:
        chart = exposure(found.bits, found.bits_before, most=found.most_bits, title=f"exposure of secrets, {where}")
        caption = (
            "Bits of exposure of each secret that was trained on; dashed is the most there could be. Of a secret that "
            "was not learned it is at least b bits once in 2^b."
        )
        few = len(found.bits) <= MOST_STEMS and len(found.bits_before) in (0, len(found.bits))
        legend = [el("span", "after tuning", class_="spot" if few else "s2")]
        legend += [el("span", "before", class_="ring" if few else "before")] if found.bits_before else []
        parts += [el("p", *legend, class_="note legend"), el("figure", chart, el("figcaption", caption))]
    return parts


def _delta(delta: float) -> str:
    return upper_delta(delta) if delta > 0 else "0"


def _times(repeats: int) -> str:
    return "each once" if repeats == 1 else f"each {repeats:,} times"


def _verbatim(found: Verbatim | None) -> Markup:
    title = el("h3", "Rows read back word for word")
    if found is None or not found.num_rows:
        return join(title, el("p", "Not tried."))
    told = (
        f"From its first {found.prefix_tokens} tokens, {found.num_extracted:,} of {found.num_rows:,} rows went on for "
        f"{found.continuation_tokens} tokens as in the text; before tuning {found.num_extracted_before:,} did."
        f"{'' if found.num_new is None else f' New are {found.num_new:,}.'}"
    )
    return join(title, el("p", told))


def _scan(found: ScanFigures) -> Markup:
    listed = ", ".join(f"{name.replace('_', ' ')} {num:,}" for name, num in found.found.items()) or "nothing"
    told = (
        f"{size(found.num_bytes)} were searched for {found.num_ngrams_compared:,} pieces of the text, and for what "
        f"else is not meant to be in them. Found: {listed}."
    )
    return el("p", told)


def _estimate(found: Estimate | None, form: str) -> Markup:
    if found is None:
        return _TOO_FEW
    interval = f"{form.format(found.low)}{_EN_DASH}{form.format(found.high)}"
    return join(form.format(found.value), el("small", f"({interval})", class_="deviation"))
