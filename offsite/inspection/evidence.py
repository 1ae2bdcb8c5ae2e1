"""What was measured and what was let go, in words: audits, privacy reports, results, records of runs and releases."""

from __future__ import annotations

from offsite.audits.gates import bundle_gates, passed, plugged_gates
from offsite.audits.record import (
    BundleAudit,
    CanaryAudit,
    Membership,
    PackageAudit,
    PluggedAudit,
    Retuned,
    Verbatim,
    read_audit,
)
from offsite.audits.retunings import area, hits
from offsite.audits.runs import Claim, Run, read_run
from offsite.console import say
from offsite.evaluation.results import ROWS, read_results
from offsite.inspection.thing import Thing
from offsite.inspection.words import adapter_words, facts, gates, rows, shown, when
from offsite.privacyreport.record import REPORT_NAME, SIGNATURES_NAME, read_file, read_form
from offsite.sealed.release import read_release

_FORM = "its form alone; it is not signed"


_OF = {"bundle": "a bundle", "plugged-in": "an adapter plugged in", "package": "a package"}


def show_audit(thing: Thing) -> dict[str, object]:
    """An audit is told: what it is of, and what its figures come to.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    audit, digest = read_audit(thing.path)
    say(f"audit {thing.name} of {_OF[audit.kind]}; checked: {_FORM}")
    told = {"kind": "audit", "of": audit.kind, "digest": digest}
    if isinstance(audit, BundleAudit):
        found = _bundle_audit(audit)
    else:
        found = _plugged_audit(audit) if isinstance(audit, PluggedAudit) else _package_audit(audit)
    return {**told, **found, "verified": False, "checked": _FORM}


def _bundle_audit(audit: BundleAudit) -> dict[str, object]:
    run = audit.run
    facts(
        {
            "bundle": run.bundle_digest,
            "package": run.package_digest,
            "job": run.job_id,
            "run": f"{adapter_words(run.adapter)}, {run.steps:,} steps{_averaged(run)}",
            **({} if audit.objective is None else {"objective": audit.objective.loss}),
            "privacy": _claim(run.claim),
            "not trained": audit.nonmembers,
            "came back": _verbatim(audit.verbatim),
        }
    )
    _attacks("membership", audit.membership)
    _retunings(audit.retuned)
    _canaries(audit.canaries)
    return {
        "bundle_digest": run.bundle_digest,
        "package_digest": run.package_digest,
        "gates": gates(bundle_gates(audit)),
    }


def _plugged_audit(audit: PluggedAudit) -> dict[str, object]:
    facts({"bundle": audit.bundle_digest, "package": audit.package_digest, "base model": audit.base_digest})
    facts({"plugged in": audit.way or None, "corrected": "yes" if audit.corrected else None})
    _canaries(audit.canaries)
    found = gates(plugged_gates(audit, None))
    return {"bundle_digest": audit.bundle_digest, "package_digest": audit.package_digest, "gates": found}


def _part(scale: float, way: str) -> str:
    return f"plugged in as {way}" if way else f"{scale:g} of the update"


def _package_audit(audit: PackageAudit) -> dict[str, object]:
    similar, union = audit.similarity, audit.union
    share = audit.emulator_parameters / audit.middle_parameters
    together = None
    if union is not None:
        single = f"this one {union.share_single:.1%}"
        together = f"{union.num_packages} packages hold {union.share_union:.1%} of the middle, {single}"
    facts(
        {
            "package": audit.package_digest,
            "base model": audit.base_digest,
            "middle": f"{audit.method.name}: {share:.1%} of its {audit.middle_parameters:,} parameters",
            "word for word": f"{similar.num_verbatim:,} of {similar.num_parameters:,} parameters by tensors, "
            f"{similar.num_verbatim_by_row:,} by rows",
            "together": together,
        }
    )
    rows("skill that the emulator has", ["what", "rows", "kept"], [
        [f"{one.name} ({one.metric})", f"{one.num_rows:,}", f"{one.kept:.1%}"] for one in audit.capabilities
    ])  # fmt: skip
    if audit.withheld:
        rows("withheld after tuning, nats per token", ["by", "withheld", "how"], [
            [one.way, f"{one.nats:.3f}", one.told] for one in audit.withheld
        ])  # fmt: skip
    if audit.recovery:
        rows("attacks that rebuild the model", ["attack", "most regained"], [
            [one.attack, f"{one.best:.1%}"] for one in audit.recovery
        ])  # fmt: skip
    kept = {one.name: one.kept for one in audit.capabilities}
    regained = {one.attack: one.best for one in audit.recovery}
    left = {one.way.replace(" ", "_"): one.nats for one in audit.withheld}
    told: dict[str, object] = {"package_digest": audit.package_digest, "kept": kept, "regained": regained}
    return told | ({"withheld": left} if left else {})


def _attacks(title: str, found: tuple[Membership, ...]) -> None:
    if found:
        rows(f"{title}: 0.5 is a guess", ["attack", "AUC", "95% interval", "rows in", "rows out"], [
            [
                one.signal, f"{one.auc.value:.3f}", f"{one.auc.low:.3f} to {one.auc.high:.3f}",
                f"{one.num_members:,}", f"{one.num_nonmembers:,}",
            ]
            for one in found
        ])  # fmt: skip


def _retunings(found: Retuned | None) -> None:
    if found is None:
        return
    title = f"{len(found.num_in)} retunings on halves of {found.num_rows:,} rows: 0.5 is a guess, limits at 95%"
    columns = ["attack", "AUC", "at most", "hits at 1%", "at most"]
    told = [(one.signal, area(one), hits(one)) for one in found.attacks]
    rows(title, columns, [
        [name, f"{of_all[0]:.3f}", f"{of_all[1]:.3f}", f"{first[0]:.1%}", f"{first[1]:.1%}"]
        for name, of_all, first in told
    ])  # fmt: skip


def _canaries(found: CanaryAudit | None) -> None:
    if found is None:
        return
    bound, secrets = found.bound, found.exposure
    out = None
    if secrets is not None:
        out = f"{secrets.num_extracted_greedy} of {secrets.num_secrets} read back out"
    facts(
        {
            "canaries": f"{found.num:,}, committed to as {found.commitment}",
            "epsilon": None
            if bound is None
            else f"at least {bound.epsilon:.3g} was shown, of {bound.ceiling:.3g} that so many could show",
            "secrets": out,
        }
    )
    _attacks("canaries", found.membership)


def _verbatim(found: Verbatim | None) -> str | None:
    if found is None:
        return None
    before = found.num_extracted_before
    return f"{found.num_extracted} of {found.num_rows} rows word for word after tuning, {before} before"


def _claim(claim: Claim | None) -> str:
    if claim is None:
        return "none claimed: nothing bounds what it may reveal"
    per = f"at delta {claim.delta:g} per {claim.unit}"
    return f"epsilon {claim.epsilon:.3g} {per} claimed, {claim.epsilon_total:.3g} of all runs"


_ATTESTED = {"none": "none", "tpm2-quote": "a TPM's quote, not verified here"}


def show_report(thing: Thing) -> dict[str, object]:
    """A privacy report is told: what its issuer says. Nothing of it is verified; ``offsite report verify`` does that.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    report, _ = read_form(read_file(thing.path, REPORT_NAME), read_file(thing.path, SIGNATURES_NAME))
    checked = f"its form alone; offsite report verify {thing.name} checks the signatures and every figure"
    say(f"privacy report {thing.name}; checked: {checked}")
    claim = None if report.privacy is None else report.privacy.claim
    released = report.accepted_leakage
    attestation = None if report.attestation is None else report.attestation.kind
    grounds = "with leakage accepted" if released else "after every gate passed"
    facts(
        {
            "it says": report.headline,
            "issuer": f"{thing.names.told(report.issuer)}, the {report.role}",
            "made": when(report.created, thing.now),
            "job": None if report.job is None else report.job.job_id,
            "bundle": report.digests.bundle,
            "package": report.digests.package,
            "base model": report.digests.base,
            "claims": _claim(claim) if report.audits.bundle is not None else None,
            "released": None if released is None else grounds,
            "attestation": None if attestation is None else _ATTESTED[attestation],
            "not claimed": f"{len(report.non_claims)} things, in {REPORT_NAME}" if report.non_claims else None,
        }
    )
    return {
        "kind": "privacy-report",
        "headline": report.headline,
        "issuer": report.issuer,
        "role": report.role,
        "created": report.created,
        "job_id": None if report.job is None else report.job.job_id,
        "bundle_digest": report.digests.bundle,
        "package_digest": report.digests.package,
        "base_digest": report.digests.base,
        "epsilon": None if claim is None else claim.epsilon,
        "accepted_leakage": released,
        "attestation": attestation,
        "gates": gates(report.gates.every),
        "verified": False,
        "checked": checked,
    }


def show_results(thing: Thing) -> dict[str, object]:
    """A results folder is told: the rows of figures.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    found = read_results(thing.path)
    say(f"results {thing.name}; checked: {_FORM}")
    data = found.data
    facts(
        {
            "model": found.model,
            "base model": found.base_digest,
            "package": found.package.digest,
            "bundles": ", ".join(found.bundles),
            "adapter": f"{adapter_words(found.adapter)}, {_part(found.scale, found.way)}",
            "text": f"{data.name}: {data.num_records:,} records, {data.num_tokens:,} tokens, {data.sha256}",
            "took": f"{found.seconds:,.0f} s on {found.device}",
        }
    )
    tasks = sorted(
        {(task, metric) for row in found.rows.values() for task, each in row.tasks.items() for metric in each}
    )
    lines = []
    for name, what in ROWS.items():
        if name in found.rows:
            row = found.rows[name]
            scores = [f"{row.tasks[task][metric].mean:.4g}" for task, metric in tasks]
            lines.append([f"{name.replace('_', ' ')}: {what}", f"{row.perplexity.mean:.4g}", *scores])
    rows("scores", ["row", "perplexity", *(shown(f"{task} {metric}", 60) for task, metric in tasks)], lines)
    figures = {name: each.mean for name, each in found.metrics.items() if each is not None}
    facts({name.replace("_", " "): f"{value:.4g}" for name, value in figures.items()})
    return {
        "kind": "results",
        "base_digest": found.base_digest,
        "package_digest": found.package.digest,
        "bundles": {name: each.digest for name, each in found.bundles.items()},
        "rows": {name: row.perplexity.mean for name, row in found.rows.items()},
        "metrics": figures,
        "verified": False,
        "checked": _FORM,
    }


def _averaged(run: Run) -> str:
    return f", in all of {len(run.averaged)} runs whose mean it is" if run.averaged else ""


def show_run(thing: Thing) -> dict[str, object]:
    """The client's record of a run is told.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    run = read_run(thing.path)
    say(f"run record {thing.name}, which stays with the client; checked: {_FORM}")
    records = f"{run.num_records:,} records" if run.num_records is not None else "an unknown number of records"
    facts(
        {
            "bundle": run.bundle_digest,
            "package": run.package_digest,
            "base model": run.base_digest,
            "job": run.job_id,
            "round": None if run.round is None else run.round.number,
            "adapter": adapter_words(run.adapter),
            "trained": f"{run.steps:,} steps of {run.batch_size} on {records}, at rate {run.learning_rate:g}"
            f"{_averaged(run)}",
            **({} if run.objective is None else {"objective": run.objective.loss}),
            "text": run.data_sha256,
            "canaries": f"{run.num_canaries:,} rows, committed to as {run.canaries}" if run.canaries else "none",
            "sealed off": "yes" if run.sealed_off else "no",
            "privacy": _claim(run.claim),
        }
    )
    return {
        "kind": "run",
        "bundle_digest": run.bundle_digest,
        "package_digest": run.package_digest,
        "base_digest": run.base_digest,
        "job_id": run.job_id,
        "steps": run.steps,
        "num_records": run.num_records,
        "epsilon": None if run.claim is None else run.claim.epsilon,
        "verified": False,
        "checked": _FORM,
    }


def show_release(thing: Thing) -> dict[str, object]:
    """The record of a release is told: what was let go, and on what grounds.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    release = read_release(thing.path)
    say(f"release record {thing.name}; checked: {_FORM}")
    if release.accepted_leakage:
        grounds = "although not every gate passed: leakage was accepted"
    else:
        grounds = "after every gate passed" if passed(release.gates) else "although not every gate passed"
    facts(
        {
            "let go": grounds,
            "bundle": release.bundle_digest,
            "sealed as": release.sealed_digest,
            "round": release.round,
            "audit": release.audit or "none",
        }
    )
    return {
        "kind": "release",
        "bundle_digest": release.bundle_digest,
        "sealed_digest": release.sealed_digest,
        "audit": release.audit,
        "round": release.round,
        "accepted_leakage": release.accepted_leakage,
        "gates": gates(release.gates),
        "verified": False,
        "checked": _FORM,
    }
