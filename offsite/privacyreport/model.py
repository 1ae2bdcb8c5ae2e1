"""The privacy report's section on the model: what a package gives away of it, and what attacks regained."""

from __future__ import annotations

import math
from collections.abc import Callable

from offsite.audits.record import Capability, PackageAudit, Recovery, Similarity, Union
from offsite.privacyreport.charts import Bar, bars, recovery
from offsite.privacyreport.record import Limits
from offsite.report.charts import Curve
from offsite.report.markup import Markup, el, join
from offsite.report.numbers import NONE, count, number


def package(audit: PackageAudit | None, limits: Limits) -> Markup | None:
    """Return what the package gives away of its full model."""
    if audit is None:
        return None
    settings = ", ".join(f"{name} {value}" for name, value in audit.method.settings.items())
    share = audit.emulator_parameters / audit.middle_parameters
    told = (
        f"In place of the middle's {count(audit.middle_parameters)} parameters the package holds "
        f"{count(audit.emulator_parameters)} ({share:.0%}), made by the method {audit.method.name}"
        f"{f' ({settings})' if settings else ''}."
    )
    return join(
        el("h2", "What the package gives away of the model"),
        el("p", el("bdi", told)),
        _capabilities(audit.capabilities, limits),
        _recovery(audit.recovery, audit.recovery_text, limits),
        _similarity(audit.similarity),
        _union(audit.union),
    )


def _capabilities(found: tuple[Capability, ...], limits: Limits) -> Markup:
    groups = [(f"{one.name} ({_words(one.metric)}, {one.num_rows:,} rows)", _bars(one)) for one in found]
    limit = limits.max_capability
    caption = (
        "Skill: 0 is chance, 1 is the full model; for perplexity in nats per token, against a model of single words' "
        "frequencies. At the right the figures themselves."
        f"{'' if limit is None else f' The dashed line is the limit set for perplexity, {limit:g}.'}"
    )
    head = el("tr", el("th", ""), *(el("th", title, class_="number") for title in _COLUMNS))
    lines = [
        el(
            "tr",
            el("th", el("bdi", one.name), el("small", _words(one.metric), class_="scope"), scope="row"),
            *(el("td", NONE if value is None else number(value), class_="number") for value in _values(one)),
        )
        for one in found
    ]
    return join(
        el("h3", "What the client can do with it"),
        el("figure", bars(groups, title="capability", limit=limit), el("figcaption", caption)),
        el("div", el("table", el("thead", head), el("tbody", *lines)), class_="scroll"),
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


_COLUMNS = ("chance", "full", "emulator", "emulator, tuned", "plugged in", "share kept")


def _values(one: Capability) -> tuple[float | None, ...]:
    return one.chance, one.full, one.emulator, one.emulator_tuned, one.plugged_in, one.kept


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


def _recovery(found: tuple[Recovery, ...], text: str, limits: Limits) -> Markup:
    title = el("h3", "What attacks regained from the package alone")
    if not found:
        return join(title, el("p", "No attack was run."))
    curves = [
        Curve(_words(one.attack), tuple((float(p.num_tokens), p.regained) for p in one.points), f"s{n % 5 + 1}")
        for n, one in enumerate(found)
    ]
    head = el("tr", el("th", "attack"), *(el("th", title, class_="number") for title in _RECOVERED))
    lines = [
        el(
            "tr",
            el("th", _words(one.attack), scope="row"),
            el("td", count(one.trained_parameters), class_="number"),
            el("td", f"{max(point.num_tokens for point in one.points):,}", class_="number"),
            el("td", number(min(point.perplexity for point in one.points)), class_="number"),
            el("td", f"{one.best:.3f}", class_="number"),
        )
        for one in found
    ]
    limit = limits.max_recovery
    caption = join(
        "Share of the capability lost by compressing that an attack had regained, against tokens it had trained on",
        join(" (", el("bdi", text), ")") if text else "",
        "; 0 is the package as sent, 1 the full model.",
        "" if limit is None else f" Dashed: the limit set, {limit:g}.",
    )
    return join(
        title,
        el("p", *(el("span", curve.name, class_=curve.css) for curve in curves), class_="note legend"),
        el("figure", recovery(curves, title="share regained against tokens", limit=limit), el("figcaption", caption)),
        el("div", el("table", el("thead", head), el("tbody", *lines)), class_="scroll"),
    )


_RECOVERED = ("trained", "tokens", "best perplexity", "most regained")


def _similarity(found: Similarity) -> Markup:
    whole, rows = found.num_verbatim / found.num_parameters, found.num_verbatim_by_row / found.num_parameters
    told = (
        f"Of the package's {count(found.num_parameters)} parameters, {count(found.num_verbatim)} ({whole:.1%}) are the "
        f"full model's own bit for bit, as whole tensors; {count(found.num_verbatim_by_row)} ({rows:.1%}) row by row."
    )
    if found.num_within_rounding is not None:
        near = found.num_within_rounding / found.num_parameters
        told += f" To within one step of bfloat16, as a mark moves them, {near:.1%} are."
    parts = [el("h3", "What of it is the model's own"), el("p", told)]
    if found.blocks:
        head = el("tr", el("th", "block of the package"), *(el("th", t, class_="number") for t in _ALIKE))
        lines = [
            el(
                "tr",
                el("td", el("code", one.block)),
                el("td", f"{one.cosine:.3f}", class_="number"),
                el("td", f"{one.cka:.3f}", class_="number"),
            )
            for one in found.blocks
        ]
        note = (
            "How like the block of the full model that it is most like: 1 is the same. Which one that is stays there."
        )
        table = el("table", el("thead", head), el("tbody", *lines))
        parts += [el("div", table, class_="scroll"), el("p", note, class_="note")]
    return join(*parts)


_ALIKE = ("cosine of weights", "CKA of hidden states")


def _union(found: Union | None) -> Markup | None:
    if found is None:
        return None
    told = (
        f"This package holds {found.share_single:.1%} of the middle's parameters; {found.num_packages} packages of "
        f"this model hold {found.share_union:.1%} of them together."
    )
    return join(el("h3", "Together with other packages"), el("p", told))
