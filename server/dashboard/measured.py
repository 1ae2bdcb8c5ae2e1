"""Figures as pages show them: of a package's audit, of an evaluation, of an update, of a client's gates."""

from __future__ import annotations

import json

from offsite.artefacts.job import Job
from offsite.audits.gates import Gate
from offsite.audits.record import Membership, PackageAudit
from offsite.evaluation.results import Results, whole_figure
from offsite.inspection.words import shown
from offsite.report.figures import Refusals
from offsite.report.numbers import number, percent
from server.dashboard.shapes import LINE_CHARACTERS, NAME_CHARACTERS, Fact, Measured
from server.registry.rows import Entry


def gives_away(audit: PackageAudit) -> str:
    """Return in a line what an audit says that a package gives away: what counts comes first."""
    least = audit.least_withheld
    kept = [one.kept for one in audit.capabilities if one.name == "perplexity"]
    told = f"{percent(kept[0])} of your model's skill as sent" if kept else ""
    withheld = f"{number(least.nats)} nats a token withheld after tuning" if least else "not measured after tuning"
    return "; ".join(one for one in (withheld, told) if one)


def audit_tables(audit: PackageAudit) -> list[Measured]:
    """Return the tables of an audit, those that were measured."""
    similar = audit.similarity
    found = [
        Measured(
            "Withheld after tuning",
            "How far a client's own tuned copy stays above your full model as it was, in nats per token of held-out "
            "text. At 0 or below nothing is withheld. This counts; the skill as sent flatters what tuning heals.",
            ("tuned by", "withheld", "how"),
            tuple((one.way, number(one.nats), shown(one.told, LINE_CHARACTERS)) for one in audit.withheld),
        ),
        Measured(
            "Skill as sent",
            "How much of your model's skill above chance the package has before anybody tunes it.",
            ("what", "full model", "package", "kept"),
            tuple((shown(f"{one.name} ({one.metric})", NAME_CHARACTERS), number(one.full), number(one.emulator),
                   percent(one.kept)) for one in audit.capabilities),
        ),
        Measured(
            "Attacks that rebuild the model",
            "What an attacker regained of the lost skill with the package and public text alone.",
            ("attack", "most regained"),
            tuple((shown(one.attack, NAME_CHARACTERS), percent(one.best)) for one in audit.recovery),
        ),
        Measured(
            "Your parameters, word for word",
            "Parameters of your model that stand in the package bit for bit, of all that your model has.",
            ("by whole tensors", "by rows", "of"),
            ((f"{similar.num_verbatim:,}", f"{similar.num_verbatim_by_row:,}", f"{similar.num_parameters:,}"),),
        ),
    ]  # fmt: skip
    return [one for one in found if one.lines]


_ROWS = {
    "zero_shot": "your model as it was (before)",
    "emulator_zero_shot": "the package as sent",
    "emulator_tuned": "the client's copy, tuned",
    "plugged_in": "your model with the adapter (after)",
}


def results_tables(name: str, results: Results) -> list[Measured]:
    """Return what an evaluation found before and after, and of refusals where they were measured.

    Args:
        name: its folder's.
    """
    refusals = Refusals.of(results)
    return [_rows_table(name, results, refusals), *([] if refusals is None else [_refusals_table(name, refusals)])]


def _rows_table(name: str, results: Results, refusals: Refusals | None) -> Measured:
    figure = "root mean squared error" if whole_figure(results) == "rmse" else "perplexity"
    tasks = [(task, metric) for task, row in results.rows["zero_shot"].tasks.items() for metric in row]
    warning = "" if refusals is None else refusals.warning
    lines = tuple(
        (_ROWS.get(key, shown(key, NAME_CHARACTERS).replace("_", " ")), number(row.perplexity.mean),
         *(number(row.tasks[task][metric].mean) for task, metric in tasks))
        for key, row in results.rows.items()
    )  # fmt: skip
    return Measured(
        f"On held-out text: {shown(name, NAME_CHARACTERS)}",
        f"Measured by offsite evaluate on {results.data.num_tokens:,} tokens of "
        f"{shown(results.data.name, NAME_CHARACTERS)}. "
        f"Of {figure} lower is better. If the client's copy comes close to your model with the adapter, the package "
        "gave away too much.",
        ("model", figure, *(shown(f"{task} {metric}", NAME_CHARACTERS) for task, metric in tasks)),
        lines,
        warning,
    )


def _refusals_table(name: str, refusals: Refusals) -> Measured:
    return Measured(
        f"Requests refused: {shown(name, NAME_CHARACTERS)}",
        f"What plugging in changed. {refusals.about}",
        ("plugged in less as it was", "change", "interval, 95%", "no longer refused", "newly refused"),
        tuple(tuple(shown(cell, NAME_CHARACTERS) for cell in line) for line in refusals.lines),
    )


def update_figures(entry: Entry, job: Job) -> list[Fact]:
    """Return what intake found of the update, beside the caps of its job."""
    found = json.loads(entry.figures) if entry.figures else {}
    policy, facts = job.policy, []
    told = {
        "max_relative_frobenius": ("largest update", policy.max_relative_frobenius,
            "Frobenius norm of the update that one module gets, over that of the module's weight: how far it goes."),
        "max_relative_spectral": ("largest in one direction", policy.max_relative_spectral,
            "Largest singular value of a module's update over the weight's: an update may be small and yet steep."),
        "head_norm": ("head", policy.max_head_norm, "Frobenius norm of the head, which began at zero."),
    }  # fmt: skip
    for name, (title, cap, about) in told.items():
        if name in found:
            facts.append(Fact(title, f"{number(found[name])}, cap {cap:g}", about))
    if "largest_module" in found:
        facts.append(
            Fact("where", shown(found["largest_module"], LINE_CHARACTERS), "The module with the largest update.")
        )
    if "num_modules" in found:
        facts.append(Fact("modules changed", str(found["num_modules"])))
    return facts


def membership_table(found: tuple[Membership, ...]) -> list[Measured]:
    """Return the table of attacks that tell rows that were trained on from others; none where none was run."""
    if not found:
        return []
    lines = tuple(
        (
            shown(one.signal, NAME_CHARACTERS),
            number(one.auc.value),
            f"{number(one.auc.low)} to {number(one.auc.high)}",
            f"{one.num_members:,} and {one.num_nonmembers:,}",
        )
        for one in found
    )
    about = (
        "How well an attack tells rows that were trained on from others: 0.5 is a guess, 1 is every row. "
        "The interval covers 95%."
    )
    return [Measured("Who was in the data", about, ("attack by", "AUC", "interval", "rows in and out"), lines)]


def gate_fact(gate: Gate) -> Fact:
    """Return one gate of a client's audit, with its verdict."""
    css = {"passed": "passed", "failed": "failed"}.get(gate.verdict, "open")
    named = {"found": gate.found, "limit": gate.limit}
    figures = [f"{name} {number(value) if value else 0}" for name, value in named.items() if value is not None]
    told = f"{gate.verdict} ({', '.join(figures)})" if figures else gate.verdict
    return Fact(shown(gate.name, NAME_CHARACTERS).replace("_", " "), told, shown(gate.told, LINE_CHARACTERS), css)
