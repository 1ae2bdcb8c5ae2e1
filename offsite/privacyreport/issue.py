"""``offsite report privacy``: one signed report of what audits found, with a page to read it by."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from offsite import __version__
from offsite.artefacts.job import read_job
from offsite.attestation.evidence import NoAttestation
from offsite.audits.gates import Gate
from offsite.audits.keptscores import read_scores
from offsite.audits.record import BundleAudit, PackageAudit, PluggedAudit, read_audit
from offsite.config import flag_name
from offsite.console import say
from offsite.digests import sha256_bytes
from offsite.errors import BadSchema, ConfigError, WrongBinding
from offsite.keys.identity import Identity, open_identity
from offsite.privacyreport.board import BOARD_NAME, board
from offsite.privacyreport.config import PrivacyReportConfig
from offsite.privacyreport.page import page
from offsite.privacyreport.recompute import Recomputed, recompute, require_claim
from offsite.privacyreport.record import (
    PAGE_NAME,
    REPORT_NAME,
    SIGN_PURPOSE,
    SIGNATURES_NAME,
    Audits,
    JobFacts,
    Limits,
    PrivacyReport,
    audit_digest,
    conclude,
    report_raw,
)
from offsite.privacyreport.sacro import READ_NAME, sacro_files
from offsite.privacyreport.words import released
from offsite.sealed.manifest import write_signatures
from offsite.sealed.release import read_release
from offsite.staging import refuse_existing, staged_folder

REPORT_FOLDER = "report"
"""Where the signed report stands in a folder that holds more than that."""


def run(config: PrivacyReportConfig) -> dict[str, object]:
    """Carry out ``offsite report privacy``.

    Raises:
        ConfigError: when the output exists, two audits are of one kind, or epsilon cannot be recomputed here.
        ArtefactError: when an input is unsound, they are not about the same, or a claim does not follow from its
            constants; nothing is written then.
        BadKey: when the keys do not open.
    """
    refuse_existing(config.output)
    audits = _audits(config.audit)
    release = None if config.release is None else read_release(config.release)
    job = None if config.job is None else _job(config.job, audits)
    limits = _limits(config, audits.package)
    identity = open_identity(config)
    issuer = identity.public.fingerprint
    recomputed = _recomputed(audits.bundle)
    report = conclude(
        issuer=issuer,
        created=int(time.time()),
        audits=audits,
        release=release,
        job=job,
        limits=limits,
        recomputed=recomputed,
        versions={"offsite": __version__},
        attestation=NoAttestation(),
    )
    beside = _beside(config, report, sha256_bytes(report_raw(report)))
    with staged_folder(config.output) as stage:
        folder = stage / REPORT_FOLDER if beside else stage
        folder.mkdir(exist_ok=True)
        raw = write_report(folder, report, identity)
        for name, content in beside.items():
            (stage / name).write_bytes(content)
        if config.format == "sacro":  # scores of rows, which stay with who wrote them, as the file they come from does
            for path in (stage, *(stage / name for name in beside)):
                path.chmod(0o700 if path.is_dir() else 0o600)
    show(report)
    _say_where(config, beside)
    return {**told(report, sha256_bytes(raw)), "report": config.output.name, "files": sorted(beside)}


def write_report(folder: Path, report: PrivacyReport, identity: Identity) -> bytes:
    """The report, its signatures and its page stand in `folder`; return the bytes that were signed."""
    raw = report_raw(report)
    (folder / REPORT_NAME).write_bytes(raw)
    signatures = write_signatures(identity.public.fingerprint, identity.sign(SIGN_PURPOSE, raw))
    (folder / SIGNATURES_NAME).write_bytes(signatures)
    (folder / PAGE_NAME).write_text(page(report), encoding="utf-8")
    return raw


def _beside(config: PrivacyReportConfig, report: PrivacyReport, digest: str) -> dict[str, bytes]:
    """Return the files that stand beside the signed report's own folder; none where it is all that is written."""
    if config.format == "board":
        return {BOARD_NAME: board(report, digest).encode()}
    if config.scores is None:
        return {}
    audit = report.audits.bundle
    if audit is None:
        raise ConfigError("--format sacro: no audit of a bundle is among --audit", hint="offsite audit bundle makes it")
    return sacro_files(report, audit, read_scores(config.scores, audit, report.digests.audits["bundle"]))


def _say_where(config: PrivacyReportConfig, beside: Mapping[str, bytes]) -> None:
    name = config.output.name
    if not beside:
        say(f"{name}: signed; open {PAGE_NAME} in a browser, or send the folder with offsite seal")
        return
    say(f"{name}: {', '.join(sorted(beside))}")
    say(f"{name}/{REPORT_FOLDER}: signed, as ever; offsite report verify and offsite seal take this folder")
    if config.format == "sacro":
        say(f"{READ_NAME} says what stays with the output checker: all but {REPORT_FOLDER}")


def show(report: PrivacyReport) -> None:
    """The first line, the gates and the grounds of the release are on stderr."""
    say(report.headline)
    if report.release is not None:
        say(released(report.release, report.digests.audits.get("bundle")))
    kinds = {"bundle": report.gates.bundle, "plugged in": report.gates.plugged_in, "package": report.gates.package}
    for kind, gates in kinds.items():
        for gate in gates:
            say(f"  {gate.verdict:<15} {kind}, {gate.name}: {gate.told}")


def told(report: PrivacyReport, digest: str) -> dict[str, object]:
    """Return what both verbs say of a report on stdout."""
    claim = report.privacy.claim if report.privacy is not None else None
    figures = ("epsilon", "epsilon_rdp", "delta", "epsilon_total", "delta_total", "budget", "num_runs", "unit")
    return {
        "accepted_leakage": report.accepted_leakage,
        "attestation": None if report.attestation is None else report.attestation.kind,
        "claim": None if claim is None else {name: getattr(claim, name) for name in figures},
        "created": report.created,
        "digest": digest,
        "gates": {
            "bundle": _verdicts(report.gates.bundle),
            "package": _verdicts(report.gates.package),
            "plugged_in": _verdicts(report.gates.plugged_in),
        },
        "headline": report.headline,
        "issuer": report.issuer,
        "role": report.role,
    }


def _verdicts(gates: tuple[Gate, ...]) -> dict[str, str]:
    return {gate.name: gate.verdict for gate in gates}


def _audits(folders: tuple[Path, ...]) -> Audits:
    bundle: BundleAudit | None = None
    plugged: PluggedAudit | None = None
    package: PackageAudit | None = None
    seen: set[str] = set()
    for folder in folders:
        audit, digest = read_audit(folder)
        if audit.kind in seen:
            raise ConfigError(f"--audit: two audits are of kind {audit.kind!r}", hint="give one of each kind at most")
        seen.add(audit.kind)
        if audit_digest(audit) != digest:
            raise BadSchema(f"audit {folder.name!r} is not written in the one form it has", hint="audit anew")
        if isinstance(audit, BundleAudit):
            bundle = audit
        elif isinstance(audit, PluggedAudit):
            plugged = audit
        else:
            package = audit
    return Audits(bundle=bundle, plugged_in=plugged, package=package)


def _job(folder: Path, audits: Audits) -> JobFacts:
    opened = read_job(folder)
    job = opened.job
    for kind, about in audits.about.items():
        if about != (job.package_digest, job.base_digest):
            raise WrongBinding(f"the {kind} audit is of another package or base model than job {job.job_id[:12]}")
    return JobFacts(job_id=job.job_id, digest=opened.digest, owner=job.owner, client=job.client)


def _limits(config: PrivacyReportConfig, package: PackageAudit | None) -> Limits:
    given = {name: getattr(config, name) for name in Limits.model_fields}
    if package is None and any(limit is not None for limit in given.values()):
        flags = ", ".join(map(flag_name, given))
        raise ConfigError(f"{flags}: no package audit is among --audit")
    return Limits(**given)


def _recomputed(bundle: BundleAudit | None) -> Recomputed | None:
    claim = bundle.run.claim if bundle is not None else None
    if claim is None:
        return None
    say("recomputing epsilon from the run's constants")
    found = recompute(claim)
    require_claim(claim, found)
    return found
