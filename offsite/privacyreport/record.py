"""The signed privacy report, ``report.json``. Read this file to know what it may say, and what it is held to.

A party makes one of its audits. What follows from their figures (first line, gates, digests, what is not claimed) is
worked out by `conclude`; a verifier does so again and accepts nothing else. ``report.html`` is made from
``report.json`` alone. Published schema: ``docs/schema/privacy-report-1.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from offsite.artefacts.job import JOB_ID_PATTERN
from offsite.artefacts.layout import Key, Line
from offsite.attestation.evidence import Attestation, TpmQuote, nonce_for
from offsite.attestation.policy import require_bound
from offsite.audits.gates import Gate, Release, bundle_gates, package_gates, passed, plugged_gates, unmeasured
from offsite.audits.record import (
    AUDIT_NAME,
    Audit,
    BundleAudit,
    PackageAudit,
    PluggedAudit,
)
from offsite.audits.runs import Claim, Digest
from offsite.digests import sha256_bytes
from offsite.errors import ArtefactError, BadSchema, BadSignature, WrongBinding
from offsite.keys.identity import Signatures
from offsite.privacyreport.consistency import require_sound
from offsite.privacyreport.recompute import Recomputed
from offsite.privacyreport.words import headline, non_claims, not_accounted
from offsite.sealed.manifest import REPORT_LIMIT_BYTES, SIGNATURES_LIMIT_BYTES, Fingerprint, Second, read_signatures
from offsite.strictjson import SHOWN, Sparse, Strict, parse_strict, require_seen

PRIVACY_FORMAT: Final = "offsite/privacy-report/1"
SIGN_PURPOSE = "privacy-report"
REPORT_NAME = "report.json"
SIGNATURES_NAME = "report.signatures.json"
PAGE_NAME = "report.html"

Sentence = Annotated[str, Field(max_length=1000, pattern=rf"^{SHOWN}*$"), AfterValidator(require_seen)]
AuditKind = Literal["bundle", "plugged_in", "package"]


class JobFacts(Strict):
    """The job that the report belongs to, and its two parties."""

    job_id: str = Field(pattern=JOB_ID_PATTERN)
    digest: Digest
    owner: Fingerprint
    client: Fingerprint


class Audits(Strict):
    """The audits, whole: the client's of its bundle, the owner's of it plugged in and of the package."""

    bundle: BundleAudit | None
    plugged_in: PluggedAudit | None
    package: PackageAudit | None

    @model_validator(mode="after")
    def _some(self) -> Audits:
        if not self.given:
            raise ValueError("no audit")
        return self

    @property
    def given(self) -> dict[AuditKind, Audit]:
        """Those that there are, by kind."""
        found: dict[AuditKind, Audit | None] = {
            "bundle": self.bundle,
            "plugged_in": self.plugged_in,
            "package": self.package,
        }
        return {kind: audit for kind, audit in found.items() if audit is not None}

    @property
    def about(self) -> dict[AuditKind, tuple[str, str]]:
        """Digests of the package and the base model that each is about."""
        found: dict[AuditKind, tuple[str, str]] = {}
        for kind, audit in self.given.items():
            stated = audit.run if isinstance(audit, BundleAudit) else audit
            found[kind] = (stated.package_digest, stated.base_digest)
        return found


class Gates(Strict):
    """The gates of each audit, as worked out; those of a bundle that was not audited say so."""

    bundle: tuple[Gate, ...]
    plugged_in: tuple[Gate, ...]
    package: tuple[Gate, ...]

    @property
    def every(self) -> tuple[Gate, ...]:
        """All of them."""
        return (*self.bundle, *self.plugged_in, *self.package)


class Limits(Sparse):
    """The limits that a package is held to, where its owner set any, as `offsite.audits.gates` defines them.

    Shares, and ``min_withheld`` in nats per token.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"min_withheld"})

    max_capability: float | None = None
    max_recovery: float | None = None
    max_union: float | None = None
    min_withheld: float | None = None


class Digests(Strict):
    """What the report is about, and the ``audit.json`` files that it quotes."""

    bundle: Digest | None
    package: Digest
    base: Digest
    audits: dict[AuditKind, Digest]


class Privacy(Strict):
    """What a differentially private run states after NIST SP 800-226, and what its constants come to.

    ``claim`` holds mechanism, neighbouring relation, unit, whether the number of units is public, sampler and rate,
    steps, clip, noise, accountant, epsilon by PLD, PRV and RDP at delta, and the budget over all runs.
    """

    claim: Claim
    recomputed: Recomputed
    not_accounted: Sentence


class PrivacyReport(Sparse):
    """The content of ``report.json``. Times are seconds since 1970, UTC.

    ``accepted_leakage`` is None where no release record was given; ``privacy`` is None where no run with a claim is
    quoted. ``attestation`` says nothing of the machine that issued the report, or quotes evidence about this very
    report; it is None in reports of earlier versions.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"attestation"})

    headline: Sentence
    format: Literal["offsite/privacy-report/1"]
    issuer: Fingerprint
    role: Literal["client", "owner"]
    created: Second
    job: JobFacts | None
    digests: Digests
    accepted_leakage: bool | None
    gates: Gates
    limits: Limits
    release: Release | None
    privacy: Privacy | None
    non_claims: tuple[Sentence, ...]
    audits: Audits
    versions: dict[Key, Line]
    attestation: Attestation | None = None


def conclude(
    *,
    issuer: str,
    created: int,
    audits: Audits,
    release: Release | None,
    job: JobFacts | None,
    limits: Limits,
    recomputed: Recomputed | None,
    versions: Mapping[str, str],
    attestation: Attestation | None = None,
) -> PrivacyReport:
    """Return the report that these audits make: everything in it that follows from the rest is worked out here.

    Args:
        created: seconds since 1970.
        recomputed: what the claim comes to; not None exactly where the audited run has a claim.

    Raises:
        WrongBinding: when audits, release record and job are not about the same, or the issuer has another part.
        ArtefactError: when an audit contradicts itself.
        ConfigError: when the extra ``privacy``, by which bounds are worked out, is not installed.
    """
    for kind, audit in audits.given.items():
        require_sound(kind, audit)
    _require_one_set(audits)
    digests = _digests(audits, release)
    gates = _gates(audits, release, limits)
    role: Literal["client", "owner"] = "owner" if audits.plugged_in or audits.package else "client"
    _require_job(job, issuer, role, audits.bundle)
    _require_release(release, digests, gates)
    claim = audits.bundle.run.claim if audits.bundle is not None else None
    if (claim is None) != (recomputed is None):
        raise BadSchema(f"{REPORT_NAME}: privacy and the audited run's claim belong together")
    private = None
    if claim is not None and recomputed is not None:
        private = Privacy(claim=claim, recomputed=recomputed, not_accounted=not_accounted(claim))
    return PrivacyReport(
        headline=headline(audits.bundle, audits.plugged_in, audits.package, gates.every),
        format=PRIVACY_FORMAT,
        issuer=issuer,
        role=role,
        created=created,
        job=job,
        digests=digests,
        accepted_leakage=None if release is None else release.accepted_leakage,
        gates=gates,
        limits=limits,
        release=release,
        privacy=private,
        non_claims=non_claims(
            audits.bundle, audits.plugged_in, audits.package, attested=isinstance(attestation, TpmQuote)
        ),
        audits=audits,
        versions=dict(versions),
        attestation=attestation,
    )


def with_quote(report: PrivacyReport, quote: TpmQuote) -> PrivacyReport:
    """Return the report with evidence in place of what it stated of attestation, and with what it then does not say."""
    return report.model_copy(update={"attestation": quote, "non_claims": _attested(report)})


def nonce_of(report: PrivacyReport) -> bytes:
    """Return what evidence about this report must hold: a digest of all it says when it has that evidence, but for it.

    It is the same before the evidence is there and afterwards.
    """
    body = report.model_copy(update={"attestation": None, "non_claims": _attested(report)})
    return nonce_for(report_raw(body))


def require_about(report: PrivacyReport) -> None:
    """Return only if the evidence in the report, where there is any, is about this report. It is not verified by that.

    Raises:
        BadSchema, WrongBinding: when it is not.
    """
    require_bound(report.attestation, nonce_of(report))


def _attested(report: PrivacyReport) -> tuple[str, ...]:
    audits = report.audits
    return non_claims(audits.bundle, audits.plugged_in, audits.package, attested=True)


def audit_digest(audit: Audit) -> str:
    """Return the digest of the ``audit.json`` that `offsite.audits.record` writes of it."""
    raw = json.dumps(audit.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False).encode("ascii") + b"\n"
    return sha256_bytes(raw)


def report_raw(report: PrivacyReport) -> bytes:
    """Return the bytes of ``report.json``: ASCII, in the order of the schema, the first line first."""
    return json.dumps(report.model_dump(mode="json"), indent=1, allow_nan=False).encode("ascii") + b"\n"


def parse_report(raw: bytes) -> PrivacyReport:
    """Return the report that `raw` states; the caller has limited its size. Nothing is worked out here.

    Raises:
        BadSchema, WrongBinding: when it has another form or format.
    """
    return parse_strict(raw, PrivacyReport, REPORT_NAME, {"format": PRIVACY_FORMAT})


def read_form(report_raw: bytes, signatures_raw: bytes) -> tuple[PrivacyReport, Signatures]:
    """Return a report and its signatures, known to have their forms and to name one issuer. Nothing is verified.

    Raises:
        BadSchema, WrongBinding, BadSignature: when they do not.
    """
    issuer, signatures = read_signatures(signatures_raw)
    report = parse_report(report_raw)
    if report.issuer != issuer:
        raise BadSignature(f"{REPORT_NAME} names another issuer than the one who signed it")
    return report, signatures


def schema() -> dict[str, Any]:
    """Return the JSON schema of ``report.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **PrivacyReport.model_json_schema()}


LIMITS_BYTES: dict[str, int] = {
    REPORT_NAME: REPORT_LIMIT_BYTES,
    SIGNATURES_NAME: SIGNATURES_LIMIT_BYTES,
    PAGE_NAME: REPORT_LIMIT_BYTES,
}
"""Every file that a privacy report's folder may hold, and how large it may be. The page may be missing."""


def read_file(folder: Path, name: str) -> bytes:
    """Return the bytes of one of the report's files.

    Raises:
        ArtefactError: when it is missing, not a plain file, or over its limit.
    """
    path, limit = folder / name, LIMITS_BYTES[name]
    if path.is_symlink() or not path.is_file():
        raise ArtefactError(f"folder {folder.name!r} holds no {name}", hint="offsite report privacy writes it")
    with path.open("rb") as handle:
        raw = handle.read(limit + 1)
    if len(raw) > limit:
        raise ArtefactError(f"{name} of {folder.name!r}: over {limit} bytes")
    return raw


def _digests(audits: Audits, release: Release | None) -> Digests:
    bundle, plugged = audits.bundle, audits.plugged_in
    bundles = [*([bundle.run.bundle_digest] if bundle else []), *([plugged.bundle_digest] if plugged else [])]
    if bundles and release is not None:
        bundles.append(release.bundle_digest)
    packages, bases = [about[0] for about in audits.about.values()], [about[1] for about in audits.about.values()]
    for what, found in (("bundles", bundles), ("packages", packages), ("base models", bases)):
        if len(set(found)) > 1:
            raise WrongBinding(f"the audits are about different {what}", hint="report on one bundle of one package")
    return Digests(
        bundle=bundles[0] if bundles else release.bundle_digest if release else None,
        package=packages[0],
        base=bases[0],
        audits={kind: audit_digest(audit) for kind, audit in audits.given.items()},
    )


def _require_one_set(audits: Audits) -> None:
    """All canaries are those of one commitment, the run's own where it has any."""
    bundle, plugged = audits.bundle, audits.plugged_in
    stated = [bundle.run.canaries if bundle else None]
    stated += [
        one.commitment for one in (bundle.canaries if bundle else None, plugged.canaries if plugged else None) if one
    ]
    if len({one for one in stated if one is not None}) > 1:
        raise WrongBinding(
            "the audits are of different canaries than each other or the run",
            hint="reveal the canaries that were committed to for this run, and audit by them",
        )


def _gates(audits: Audits, release: Release | None, limits: Limits) -> Gates:
    bundle, plugged, package = audits.bundle, audits.plugged_in, audits.package
    claim = bundle.run.claim if bundle is not None else None
    given = limits.model_dump(exclude_none=True)
    if given and package is None:
        raise BadSchema(f"{REPORT_NAME}: limits of a package, and no audit of one")
    num = 0 if package is None else sum(one.name == "perplexity" for one in package.capabilities)
    if limits.max_capability is not None and num != 1:
        raise BadSchema(f"{AUDIT_NAME}: {num} capabilities named 'perplexity', expected 1 to hold a limit against")
    of_bundle = bundle_gates(bundle) if bundle else unmeasured() if plugged or release else ()
    of_plugged: tuple[Gate, ...] = ()
    if plugged is not None:
        stated = (None, None) if claim is None else (claim.epsilon, claim.delta)
        of_plugged = plugged_gates(plugged, stated[0], claimed_delta=stated[1])
    return Gates(
        bundle=of_bundle,
        plugged_in=of_plugged,
        package=package_gates(package, **given) if package else (),
    )


def _require_job(job: JobFacts | None, issuer: str, role: str, bundle: BundleAudit | None) -> None:
    if job is None:
        return
    if issuer != (job.owner if role == "owner" else job.client):
        raise WrongBinding(
            f"the key {issuer[:9]} is not the {role} of job {job.job_id[:12]}",
            hint="the client reports on its bundle, the owner on that plugged in and on its package",
        )
    stated = bundle.run.job_id if bundle is not None else None
    if stated not in (None, job.job_id):
        raise WrongBinding(f"the audited run was of job {stated[:12] if stated else ''}, not {job.job_id[:12]}")


def _require_release(release: Release | None, digests: Digests, gates: Gates) -> None:
    """The record is of this bundle, rests on the audit quoted or on none, and says no more than its gates."""
    if release is None:
        return
    stated = digests.audits.get("bundle")
    if release.audit is not None and stated is not None and release.audit != stated:
        raise WrongBinding("the bundle was let go on another audit than the one quoted")
    if release.accepted_leakage == passed(release.gates):
        raise WrongBinding("the release record says of its own gates what they do not")
    expected = gates.bundle if release.audit is not None else unmeasured()
    if (release.audit is None or stated is not None) and release.gates != expected:
        raise WrongBinding("the release record's gates are not those of the audit that it rests on")
