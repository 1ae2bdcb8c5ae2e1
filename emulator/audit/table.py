"""What people read of a package's audit, and the figures for programs."""

from __future__ import annotations

from collections.abc import Sequence

from offsite.audits.gates import Gate
from offsite.audits.record import PackageAudit
from offsite.console import say, table


def show(audit: PackageAudit, gates: Sequence[Gate]) -> None:
    """The audit stands on stderr as tables that people read."""
    rows = [
        [f"{one.name}, {one.metric}", *(f"{value:.3f}" for value in (one.chance, one.full, one.emulator, one.kept))]
        for one in audit.capabilities
    ]
    table("capability kept by the emulator as sent", ["", "chance", "full model", "emulator", "kept"], rows)
    _show_withheld(audit)
    alike, total = audit.similarity, audit.similarity.num_parameters
    whole, rows_too = alike.num_verbatim / total, alike.num_verbatim_by_row / total
    say(f"verbatim: {whole:.3f} of the model's parameters by whole tensors, {rows_too:.3f} with rows and columns")
    if alike.num_within_rounding is not None:
        say(f"within rounding: {alike.num_within_rounding / total:.3f} of them, as a mark leaves them")
    rows = [[one.block, f"{one.cosine:.3f}", f"{one.cka:.3f}"] for one in alike.blocks]
    table("best likeness of each block to one of the full model's", ["", "cosine", "cka"], rows)
    if audit.recovery:
        curves = [
            [
                one.attack,
                f"{one.trained_parameters:,}",
                "  ".join(f"{point.num_tokens:,}: {point.regained:.3f}" for point in one.points),
            ]
            for one in audit.recovery
        ]
        table("share of what was lost that an attack regained, by tokens", ["attack", "trained", "tokens"], curves)
    if audit.union is not None:
        union = audit.union
        say(
            f"union: {union.num_packages} packages hold {union.share_union:.3f} of the middle together, this one "
            f"{union.share_single:.3f}"
        )
    for gate in gates:
        say(f"{gate.name}: {gate.verdict}: {gate.told}, limit {gate.limit}")


def _show_withheld(audit: PackageAudit) -> None:
    as_sent = (
        f"{audit.withheld_zero_shot or 0:.3f} nats per token as sent, which is no measure of what a client is left with"
    )
    if not audit.withheld:
        say(f"withheld after tuning: not measured; {as_sent}")
        return
    rows = [
        [
            one.way,
            f"{one.nats:.3f}",
            f"{one.perplexity:,.2f}",
            "" if one.num_tokens is None else f"{one.num_tokens:,}",
            one.told,
        ]
        for one in audit.withheld
    ]
    table("withheld after tuning, nats per token", ["by", "withheld", "perplexity", "tokens", "how"], rows)
    say(f"withheld zero-shot: {as_sent}")


def figures(audit: PackageAudit, gates: Sequence[Gate]) -> dict[str, object]:
    """Return the audit's main figures and the verdicts, as JSON takes them.

    ``gap`` is emulator-tuned less plugged in, in nats per token; None without ``--results``. ``withheld`` has the nats
    per token by way of tuning, ``withheld_after_tuning`` the least of them.
    """
    alike, text = audit.similarity, audit.capabilities[0]
    tuned, plugged = text.emulator_tuned, text.plugged_in
    least = audit.least_withheld
    return {
        "package_digest": audit.package_digest,
        "kept": text.kept,
        "full": text.full,
        "emulator": text.emulator,
        "chance": text.chance,
        "gap": None if tuned is None or plugged is None else tuned - plugged,
        "withheld": {one.way.replace(" ", "_"): one.nats for one in audit.withheld},
        "withheld_after_tuning": None if least is None else least.nats,
        "withheld_zero_shot": audit.withheld_zero_shot,
        "verbatim": alike.num_verbatim / alike.num_parameters,
        "verbatim_by_row": alike.num_verbatim_by_row / alike.num_parameters,
        "within_rounding": None
        if alike.num_within_rounding is None
        else alike.num_within_rounding / alike.num_parameters,
        "regained": max((one.best for one in audit.recovery), default=None),
        "union": None if audit.union is None else audit.union.share_union,
        "gates": [gate.model_dump(mode="json") for gate in gates],
    }
