"""``offsite seal``, ``open`` and ``rewrap``: the verbs that both parties use on everything that crosses.

Sealing checks that the artefact is sound, belongs to the job and goes to the job's other party. Opening does the same
from the other side and, before anything is published, asks the ledger whether it is new. Whatever is refused leaves no
file and no trace in the ledger.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offsite.artefacts.bundle import Bundle
from offsite.artefacts.inspect import inspect_artefact
from offsite.artefacts.job import JOB_NAME, Job, OpenedJob, read_job
from offsite.artefacts.manifest import MANIFEST_NAME
from offsite.artefacts.package import Package
from offsite.artefacts.round import Round
from offsite.console import say, utc
from offsite.digests import sha256_bytes
from offsite.errors import ArtefactError, BadDigest, ConfigError, Expired, WrongBinding, WrongNames
from offsite.evaluation.results import RESULTS_NAME, parse_results
from offsite.folders import kind_of, listed, names_in, opened_plain, read_plain
from offsite.keys.files import read_passphrase
from offsite.keys.identity import Identity, load_identity, open_identity
from offsite.keys.trust import TrustStore
from offsite.privacyreport.record import PAGE_NAME, read_form
from offsite.privacyreport.record import SIGNATURES_NAME as REPORT_SIGNATURES
from offsite.sealed.config import OpenConfig, RewrapConfig, SealConfig
from offsite.sealed.encryption import decrypt_files, encrypt_files, write_sealed
from offsite.sealed.folder import KEYS_FILE, copy_sealed, read_sealed, require_recipient
from offsite.sealed.ledger import Admission, Ledger
from offsite.sealed.manifest import (
    NOTE_NAME,
    NUMBERED,
    REPORT_LIMIT_BYTES,
    Kind,
    SealedManifest,
    bind,
    senders,
    verify_sealed,
)
from offsite.sealed.recipients import read_keys, rotate, unwrap_keys, wrap_keys, write_keys
from offsite.sealed.release import require_gates, write_release
from offsite.staging import is_same, refuse_existing, staged_folder, staged_handle
from offsite.strictjson import parse_object

REPORT_NAME = "report.json"


@dataclass(frozen=True)
class Content:
    """What a plain folder holds, checked as its kind: its files, and its digest where it has one.

    `digests` are of the files' bytes as they were checked.
    """

    kind: Kind
    files: Mapping[str, Path]
    digests: Mapping[str, str]
    digest: str | None
    artefact: OpenedJob | Package | Round | Bundle | None


@dataclass(frozen=True)
class Opened:
    """What was sealed, and whether it was new here; the content's paths are those before it was published."""

    manifest: SealedManifest
    sealed_digest: str
    content: Content
    admission: Admission


def seal_run(config: SealConfig, *, identity: Identity | None = None) -> dict[str, object]:
    """Run ``offsite seal``.

    Args:
        identity: these keys, when they are open already.

    A bundle goes only if its gates (`offsite.audits.gates`) passed or leakage is accepted, and what it went on is
    written beside the output, as ``OUTPUT.release.json``. A package goes only within the limits that were given.

    Raises:
        ConfigError: when the output exists, a job is missing, or the round is not one of the job's.
        PolicyError: when a gate did not pass; nothing is written.
        ArtefactError: when the input is unsound, not the job's, or these keys have no such part in the job.
        Untrusted: when the other party is not pinned here, or no longer.
    """
    refuse_existing(config.output)
    content = read_content(config.input)
    opened = _job_of(config, content)
    job, now, round_ = opened.job, int(time.time()), _round(config.round, content, opened.job)
    identity = identity or open_identity(config)
    own = identity.public.fingerprint
    if own not in senders(content.kind, job):
        raise WrongBinding(
            f"the key {own[:9]} may not seal a {content.kind} of job {job.job_id[:12]}", hint="give the right --keys"
        )
    if now > job.expires:
        raise Expired(f"job {job.job_id[:12]} expired on {utc(job.expires)}", hint="agree on a new job")
    check_content(content, job)
    grounds = require_gates(config, content.kind, content.digest)
    recipient = TrustStore(config.keys).require(str(job.other_party(own)), now=now)
    with Ledger(config.keys) as ledger, staged_folder(config.output) as stage:
        if content.kind == "job":
            ledger.remember(opened)
        elif ledger.job(job.job_id).digest != opened.digest:
            raise WrongBinding(f"{opened.job.job_id[:12]} is known here with other terms than those of --job")
        encrypted = encrypt_files(content.files, stage, kind=content.kind, job_id=job.job_id, digests=content.digests)
        with ledger.sending(job.job_id, content.kind) as slot:
            manifest = SealedManifest(
                kind=content.kind,
                job_id=job.job_id,
                issuer=own,
                recipients=(recipient.fingerprint,),
                created=now,
                expires=job.expires,
                sequence=slot.sequence,
                round=round_,
                previous=slot.previous,
                base_digest=job.base_digest,
                package_digest=job.package_digest,
                files=encrypted.files,
            )
            slot.round, slot.digest = round_, write_sealed(stage, manifest, encrypted, identity, [recipient])
        if grounds is not None:
            write_release(config.output, grounds, sealed_digest=slot.digest, round=round_)
    say(f"sealed {content.kind} {config.input.name!r} for {recipient.name}, who alone can open {config.output.name!r}")
    return _told(manifest, slot.digest, content.digest, config.output)


def open_run(config: OpenConfig) -> dict[str, object]:
    """Run ``offsite open``.

    Raises:
        ConfigError: when the output exists.
        ArtefactError: with the subclass of the check that failed; nothing is written then.
    """
    refuse_existing(config.output)
    trust, identity, now = TrustStore(config.keys), open_identity(config), int(time.time())
    with Ledger(config.keys) as ledger:
        opened = open_sealed(config.sealed, config.output, identity=identity, trust=trust, ledger=ledger, now=now)
    manifest = opened.manifest
    issuer, seen = trust.require(manifest.issuer, now=now).name, opened.admission
    newness = "new here" if seen == "new" else "the same as opened before"
    say(f"{manifest.kind} from {issuer}: signed, for this key, of this job, {newness}, every byte as signed")
    told = _told(manifest, opened.sealed_digest, opened.content.digest, config.output)
    return {**told, "admission": seen, "verified": True}


def open_sealed(sealed: Path, out: Path, *, identity: Identity, trust: TrustStore, ledger: Ledger, now: int) -> Opened:
    """Publish at `out` what the sealed folder holds, once every check has passed and the ledger has admitted it.

    Args:
        now: seconds since 1970.

    Raises:
        ConfigError: when `out` exists.
        ArtefactError: with the subclass of the check that failed; nothing is written then. What the issuer signed and
            was refused for what it says is remembered as seen; of anything else nothing is.
    """
    raw = read_sealed(sealed)
    require_recipient(raw, identity.public.fingerprint)
    manifest = verify_sealed(
        raw.manifest_raw, raw.signatures_raw, lambda fingerprint: trust.require(fingerprint, now=now), now=now
    )
    ledger.check(manifest, raw.digest)
    known = None if manifest.kind == "job" else ledger.job(manifest.job_id)
    if known is not None:
        bind(manifest, known.job)
    with staged_handle(out) as (stage, handle), _named(stage.name, out.name):
        os.fchmod(handle, 0o700)
        decrypt_files(sealed, raw, manifest, identity, stage, handle=handle)
        try:
            content, fresh = _judged(stage, manifest, known)
        except ArtefactError as error:
            if is_same(stage, handle):  # otherwise it was not what had been decrypted
                ledger.refuse(manifest, raw.digest, error)
            raise
        if content.digests != {file.name: file.sha256 for file in manifest.files}:
            raise BadDigest("what was checked is not what was decrypted", hint="open it again")
        admission = ledger.admit(manifest, raw.digest, fresh)
    return Opened(manifest, raw.digest, content, admission)


def _judged(stage: Path, manifest: SealedManifest, known: OpenedJob | None) -> tuple[Content, OpenedJob | None]:
    """Return what was decrypted, and the job if it is one, once it is what the manifest and the job say."""
    content = read_content(stage)
    if content.kind != manifest.kind:
        raise WrongBinding(f"sealed as a {manifest.kind}, what came out is a {content.kind}")
    fresh = content.artefact if isinstance(content.artefact, OpenedJob) else None
    job = fresh or known
    if job is None:
        raise WrongBinding(f"job {manifest.job_id[:12]} is not known here")
    bind(manifest, job.job)
    check_content(content, job.job)
    if isinstance(content.artefact, Round) and content.artefact.manifest.round != manifest.round:
        raise WrongBinding(
            f"sealed as round {manifest.round}, what came out is round {content.artefact.manifest.round}"
        )
    return content, fresh


def rewrap_run(config: RewrapConfig) -> dict[str, object]:
    """Run ``offsite rewrap``: the same sealed folder, for new keys of the same recipient. Only ``keys.json`` differs.

    Raises:
        ConfigError: when the output exists.
        ArtefactError: with the subclass of the check that failed.
    """
    refuse_existing(config.output)
    trust = TrustStore(config.keys)
    old = open_identity(config)
    new = load_identity(config.to, read_passphrase(config.to_passphrase_file))
    raw, now = read_sealed(config.sealed), int(time.time())
    manifest = verify_sealed(
        raw.manifest_raw, raw.signatures_raw, lambda fingerprint: trust.require(fingerprint, now=now), now=now
    )
    found = read_keys(raw.keys_raw)
    rotation = rotate(manifest, raw.digest, old, new)
    wrap = wrap_keys(unwrap_keys(found, manifest, raw.digest, old), raw.digest, new.public, rotation)
    kept = [other for other in found.wraps if other.recipient != old.public.fingerprint]
    with staged_folder(config.output) as stage:
        copy_sealed(config.sealed, raw, manifest, stage)
        (stage / KEYS_FILE).write_bytes(write_keys([*kept, wrap]))
    say(f"{config.output.name!r} opens with the keys of {config.to.name!r}; {config.sealed.name!r} still with the old")
    return _told(manifest, raw.digest, None, config.output)


def read_content(folder: Path) -> Content:
    """Return what the plain folder holds, checked as its kind. A privacy report's page is not part of it.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    if not folder.is_dir():
        raise ArtefactError(f"no folder named {folder.name!r}", hint="check the path")
    if (folder / MANIFEST_NAME).exists():
        artefact = inspect_artefact(folder)
        names = [MANIFEST_NAME, *artefact.manifest.files]
        kind: Kind = "bundle"
        if not isinstance(artefact, Bundle):
            kind = "package" if isinstance(artefact, Package) else "round"
        digests = {name: entry.sha256 for name, entry in artefact.manifest.files.items()}
        digests[MANIFEST_NAME] = artefact.digest
        return Content(kind, {name: folder / name for name in names}, digests, artefact.digest, artefact)
    if (folder / JOB_NAME).exists():
        opened = read_job(folder)
        return Content("job", {JOB_NAME: folder / JOB_NAME}, {JOB_NAME: opened.digest}, opened.digest, opened)
    found = {name: folder / name for name in names_in(folder)}
    if found.keys() == {NOTE_NAME}:
        with opened_plain(found[NOTE_NAME]) as handle, open(handle, "rb", closefd=False) as file:
            digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        return Content("note", found, {NOTE_NAME: digest}, None, None)
    is_privacy = found.keys() >= {REPORT_NAME, REPORT_SIGNATURES}
    if is_privacy:
        found.pop(PAGE_NAME, None)  # no HTML crosses: the receiver makes the page anew, from what was signed
    if not found or not found.keys() <= ({REPORT_NAME, RESULTS_NAME} | ({REPORT_SIGNATURES} if is_privacy else set())):
        raise _no_content(folder, found.keys())
    raw = {name: read_plain(path, REPORT_LIMIT_BYTES, f"{name} of {folder.name!r}") for name, path in found.items()}
    for name, content in raw.items():
        parse_object(content, f"{name} of {folder.name!r}")
    if is_privacy:
        read_form(raw[REPORT_NAME], raw[REPORT_SIGNATURES])
    if RESULTS_NAME in raw:
        parse_results(raw[RESULTS_NAME], folder.name)
    return Content("report", found, {name: sha256_bytes(content) for name, content in raw.items()}, None, None)


def _no_content(folder: Path, names: Iterable[str]) -> ArtefactError:
    """Return the error for a folder that is nothing that could be sealed, told as far as it can be."""
    looks = kind_of(folder)
    if looks is not None and looks.startswith("a sealed"):
        return ArtefactError(f"folder {folder.name!r} is {looks} already", hint="offsite open opens it")
    of_report = {REPORT_NAME, RESULTS_NAME, REPORT_SIGNATURES}
    if of_report & set(names):
        return WrongNames(f"{folder.name!r}: a report does not hold {listed(set(names) - of_report)}")
    what = "" if looks is None else f": it is {looks}"
    return ArtefactError(
        f"folder {folder.name!r} is no job, package, round, bundle or report{what}",
        hint=f"a report is a folder with {RESULTS_NAME} or {REPORT_NAME} and nothing else",
    )


def check_content(content: Content, job: Job) -> None:
    """Return only if the package, round or bundle is one that the job is about.

    Raises:
        WrongBinding: naming what differs.
    """
    artefact = content.artefact
    if isinstance(artefact, Package):
        if artefact.digest != job.package_digest:
            raise WrongBinding(f"this is package {artefact.digest[:19]}, the job is about {job.package_digest[:19]}")
        if artefact.manifest.base_digest != job.base_digest:
            raise WrongBinding("this package belongs to another base model than the job")
    elif isinstance(artefact, Round):
        artefact.bind(job)
    elif isinstance(artefact, Bundle):
        artefact.bind(package_digest=job.package_digest, base_digest=job.base_digest)
        if artefact.manifest.adapter != job.adapter:
            raise WrongBinding("this bundle holds another adapter than the job asks for")


def _job_of(config: SealConfig, content: Content) -> OpenedJob:
    given = read_job(config.job) if config.job is not None else None
    if isinstance(content.artefact, OpenedJob):
        if given is not None and given != content.artefact:
            raise ConfigError("--job names another job than the one to seal")
        return content.artefact
    if given is None:
        raise ConfigError(f"--job is missing: a {content.kind} is sealed for a job")
    return given


def _round(given: int | None, content: Content, job: Job) -> int:
    kind = content.kind
    own = content.artefact.manifest.round if isinstance(content.artefact, Round) else None
    if own is not None and given not in (None, own):
        raise ConfigError(f"--round {given}: this is round {own}")
    found = given if given is not None else own or int(kind in NUMBERED)
    first, last = {"report": (0, job.rounds), **dict.fromkeys(NUMBERED, (1, job.rounds))}.get(kind, (0, 0))
    if not first <= found <= last:
        raise ConfigError(f"--round: a {kind} of this job has rounds {first} to {last}, found {found}")
    return found


def _told(manifest: SealedManifest, sealed_digest: str, digest: str | None, out: Path) -> dict[str, object]:
    return {
        "bytes": sum(file.sealed_bytes for file in manifest.files),
        "digest": digest,
        "expires": manifest.expires,
        "job_id": manifest.job_id,
        "kind": manifest.kind,
        "output": out.name,
        "round": manifest.round,
        "sealed_digest": sealed_digest,
        "sequence": manifest.sequence,
    }


@contextmanager
def _named(staged: str, final: str) -> Iterator[None]:
    """A refusal speaks of the output's name, not of the temporary one."""
    try:
        yield
    except ArtefactError as error:
        raise type(error)(str(error).replace(staged, final), hint=error.hint) from None
