"""``offsite intake``: take in what a client sealed, trusting nothing. The checks are in ``server/registry/verify.py``.

A refusal that follows from what the client signed is final: the same digest gets the same answer without work. One
that may have other causes - bytes changed on the way, a round that is taken, a clock - is recorded too, but the digest
is checked anew when it comes again: otherwise whoever carries a bundle could have it refused for good.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adapters.heads import head_norm
from adapters.norms import UpdateNorms, adapted_names, base_tensors
from adapters.rounds import grown
from offsite.artefacts.bundle import TENSOR_FILE, BundleManifest, open_bundle
from offsite.artefacts.job import Job
from offsite.artefacts.manifest import MANIFEST_NAME
from offsite.artefacts.owner import OwnerRecord, owner_record_path, read_owner_record
from offsite.artefacts.package import Package, open_package
from offsite.artefacts.round import Round, open_round
from offsite.console import say, say_next
from offsite.digests import sha256_bytes
from offsite.errors import ArtefactError, BadDigest, ConfigError, RunFailed, TooLarge, WrongBinding, WrongNames
from offsite.faults import reach
from offsite.folders import opened_plain
from offsite.keys.identity import Identity, open_identity
from offsite.keys.trust import TrustStore
from offsite.sealed.encryption import decrypt_files
from offsite.sealed.folder import RawSealed, read_sealed, require_recipient
from offsite.sealed.manifest import SealedManifest
from offsite.staging import fsync
from offsite.tensors import ADAPTER_HEADER_LIMIT_BYTES, read_tensors
from server.registry.config import IntakeConfig
from server.registry.registry import Registry
from server.registry.rows import Entry, Verdict, check_unseen, short_id
from server.registry.verify import (
    Verified,
    adapter_tensors,
    expected_tensors,
    restored,
    verify_adapter,
    verify_envelope,
    verify_sizes,
)


def run(config: IntakeConfig) -> dict[str, object]:
    """Carry out ``offsite intake``.

    Raises:
        ArtefactError: with the subclass of the check that the bundle failed, now or before.
        ConfigError: when there is no registry, or the job's package is not where it was.
        RunFailed: when the disk fails; nothing is registered then.
    """
    identity = open_identity(config)
    with Registry.open(config.registry, config.keys) as registry:
        verdict = take_in(
            registry, config.sealed, identity, TrustStore(config.keys), verify_package=config.verify_package
        )
        if verdict.error is not None:
            again = ", as before" if verdict.is_again else ""
            say(f"{verdict.id}: refused by {verdict.reason_class}{again}; the registry's log has it")
            raise verdict.error
        entry = registry.entry(verdict.id)
    if verdict.is_again:
        say(f"{verdict.id}: already {verdict.state}; nothing was done")
    else:
        say(f"{verdict.id}: signature, recipient, job, round, names, shapes, values and norms are in order")
    if verdict.state == "verified":
        accept = ["offsite", "registry", "accept", verdict.id, "--registry", config.registry]
        say_next(*accept, *config.key_words(opens=False))
    return {
        "id": verdict.id,
        "digest": verdict.digest,
        "state": verdict.state,
        "again": verdict.is_again,
        "job_id": entry.job_id,
        "client": entry.client,
        "round": entry.round,
        "bundle_digest": entry.bundle_digest,
        "figures": json.loads(entry.figures or "{}"),
    }


def take_in(
    registry: Registry,
    sealed: Path,
    identity: Identity,
    trust: TrustStore,
    *,
    now: int | None = None,
    verify_package: bool = False,
) -> Verdict:
    """Return what became of the sealed bundle; it is verified and registered now, if it never was.

    Args:
        now: seconds since 1970; by default, the clock's.
        verify_package: as for `job_package`.

    Raises:
        ArtefactError: when `sealed` is no sealed folder, so that there is no digest to answer for.
        ConfigError: when the job's package is not where it was.
        RunFailed: when the disk fails; nothing is registered then.
    """
    with _disk(registry):
        try:
            raw = read_sealed(sealed)
        except ArtefactError as error:
            registry.log("refused", digest=None, check=type(error).__name__)
            raise
        known = registry.verdict(raw.digest)
        if known is not None and known.is_final:
            return known
        with registry.one_intake():
            registry.collect_locked()
            known = registry.verdict(raw.digest)
            if known is not None and known.is_final:
                return known
            try:
                when = int(time.time()) if now is None else now
                return _examine(registry, sealed, raw, identity, trust, when, verify_package)
            finally:
                _tidy(registry, raw.digest)


def job_package(registry: Registry, job: Job, *, verify_package: bool = False) -> tuple[Package, OwnerRecord]:
    """Return the package that the job is about, and its owner's record.

    Args:
        verify_package: hash every file of it, also those that are as they were when they were hashed last.

    Raises:
        ConfigError: when it is not where it was when the job was made, or another stands there.
    """
    path = registry.package_path(job.package_digest)
    moved = "put it back, or make a job from its new place: that place is then remembered"
    if not path.is_dir() or not owner_record_path(path).is_file():
        raise ConfigError(f"package {path.name!r} of the job, or its owner's record, is not where it was", hint=moved)
    try:
        known = registry.known_files(trusted=not verify_package)
        package, record = open_package(path, known), read_owner_record(owner_record_path(path))
        known.save()
    except ArtefactError as error:
        raise ConfigError(f"package {path.name!r} of the job cannot be used: {error}", hint=moved) from None
    if job.package_digest != package.digest or job.package_digest != record.package_digest:
        raise ConfigError(f"another package stands where {path.name!r} of the job was", hint=moved)
    return package, record


def asked_round(registry: Registry, job_id: str, number: int) -> Round | None:
    """Return the federation's round that was asked of the job, None when none was.

    Raises:
        ConfigError: when it is not where it was written, or another stands there: no fault of the bundle's.
    """
    asked = registry.asked(job_id, number)
    if asked is None:
        return None
    try:
        found = open_round(registry.round_folder(asked))
    except ArtefactError as error:
        raise ConfigError(f"round {number} of job {job_id[:12]} cannot be read in the registry: {error}") from None
    if found.digest != asked:
        raise ConfigError(f"another round stands where round {number} of job {job_id[:12]} was in the registry")
    return found


def read_registered(registry: Registry, entry: Entry, record: OwnerRecord) -> Verified:
    """Return the adapter of a verified bundle; each file is read once, and what was hashed is what is used.

    Raises:
        BadDigest: when a file is not the one that was verified.
        ArtefactError: when it does not fit the record any longer.
    """
    folder, what = registry.bundle_folder(entry.id), f"bundle {entry.id}"
    raw = _read_once(folder / MANIFEST_NAME, entry.bundle_digest, what)
    data = _read_once(folder / TENSOR_FILE, entry.tensors_sha256, what)
    from safetensors.torch import load

    return restored(
        what,
        BundleManifest.model_validate_json(raw),
        load(data),
        job=registry.job(entry.job_id),
        record=record,
        round_number=entry.round,
        bundle_digest=sha256_bytes(raw),
        round_digest=registry.asked(entry.job_id, entry.round),
    )


def _examine(
    registry: Registry,
    sealed: Path,
    raw: RawSealed,
    identity: Identity,
    trust: TrustStore,
    now: int,
    verify_package: bool,
) -> Verdict:
    """Verify, and register what follows from it."""
    digest = raw.digest
    try:
        require_recipient(raw, identity.public.fingerprint, kind="bundle", verb="intake")
        manifest, job = verify_envelope(
            raw.manifest_raw, raw.signatures_raw, lambda key: trust.require(key, now=now), registry.job, now=now
        )
        check_unseen(manifest, digest, registry.seen(manifest))
    except ArtefactError as error:
        return _refused(registry, digest, error, now)
    added = asked_round(registry, job.job_id, manifest.round)
    if added is not None and added.manifest.secure is not None:  # nothing of it is decrypted: its client erred
        secret = WrongBinding(f"round {manifest.round} is a secure one, which no bundle answers")
        return _refused(registry, digest, secret, now)
    package, record = job_package(registry, job, verify_package=verify_package)
    stage = registry.folder / "incoming" / short_id(digest)
    try:
        registry.receive(manifest, digest, now=now)
        try:
            verify_sizes(manifest, adapter_tensors(job.adapter, record))
        except TooLarge as error:  # the client signed these sizes
            return _refused(registry, digest, error, now, is_final=True)
        stage.mkdir(mode=0o700)
        decrypt_files(sealed, raw, manifest, identity, stage)
    except ArtefactError as error:
        return _refused(registry, digest, error, now)
    reach("intake-decrypted")
    try:
        verified, tensors_sha256 = _verify(stage, manifest, job, package, record, short_id(digest), added)
    except ArtefactError as error:
        return _refused(registry, digest, error, now, is_final=True)
    reach("intake-verified")
    for path in (*stage.iterdir(), stage):
        fsync(path)
    stage.rename(registry.bundle_folder(short_id(digest)))
    fsync(registry.folder / "bundles")
    reach("intake-stored")
    registry.verified(
        digest,
        bundle_digest=verified.bundle_digest,
        tensors_sha256=tensors_sha256,
        figures=_figures(verified.norms) | head_norm(verified.tensors),
        now=now,
    )
    return _fresh(registry, digest)


def _verify(
    stage: Path,
    manifest: SealedManifest,
    job: Job,
    package: Package,
    record: OwnerRecord,
    name: str,
    asked: Round | None,
) -> tuple[Verified, str]:
    """Return the adapter in the decrypted folder, and the digest of its tensor file."""
    bundle, what = open_bundle(stage), f"bundle {name}"
    round_digest = None if asked is None else asked.digest
    expected = expected_tensors(what, bundle.manifest, record, job, round_digest)
    tensors = read_tensors(
        stage / TENSOR_FILE, expected, limit_bytes=ADAPTER_HEADER_LIMIT_BYTES, max_tensors=len(expected)
    )
    base = base_tensors(package, adapted_names(job.adapter, record.layout, record.block_tensors))
    if asked is not None:
        base = grown(base, asked)
    verified = verify_adapter(
        what,
        bundle.manifest,
        tensors,
        base,
        envelope=manifest,
        job=job,
        record=record,
        bundle_digest=bundle.digest,
        round_digest=round_digest,
    )
    return verified, bundle.manifest.files[TENSOR_FILE].sha256


def _refused(registry: Registry, digest: str, error: ArtefactError, now: int, *, is_final: bool = False) -> Verdict:
    registry.note_refusal(digest, error, is_final=is_final, now=now)
    return Verdict(
        short_id(digest), digest, "refused", type(error).__name__, str(error), is_final=is_final, error=error
    )


def _fresh(registry: Registry, digest: str) -> Verdict:
    found = registry.verdict(digest)
    if found is None:
        raise RunFailed("the registry has lost the bundle that it just took in")
    return Verdict(found.id, digest, found.state, found.reason_class, found.message, False, True, found.error)


def _tidy(registry: Registry, digest: str) -> None:
    """Whatever stands in the way of taking the bundle in again is gone; if the disk fails, at the next opening."""
    shutil.rmtree(registry.folder / "incoming" / short_id(digest), ignore_errors=True)
    with contextlib.suppress(RunFailed):
        known = registry.verdict(digest)
        if known is not None and known.state == "received":
            registry.forget(digest)
        if known is None or known.state in ("received", "refused"):
            shutil.rmtree(registry.bundle_folder(short_id(digest)), ignore_errors=True)


def _figures(norms: Mapping[str, UpdateNorms]) -> dict[str, object]:
    """Return what an owner looks at before accepting: how far the adapter goes, and where most."""
    relative = {name: found.relative_frobenius for name, found in norms.items()}
    spectral = [found.relative_spectral for found in norms.values()]
    largest = max(relative, key=lambda name: relative[name])
    return {
        "num_modules": len(norms),
        "largest_module": largest,
        "max_relative_frobenius": relative[largest],
        "max_relative_spectral": max(spectral),
    }


def _read_once(path: Path, digest: str | None, what: str) -> bytes:
    try:
        with opened_plain(path) as handle, open(handle, "rb", closefd=False) as file:
            data = file.read()
    except WrongNames:
        raise BadDigest(f"{what}: its {path.name!r} is gone from the registry, or no plain file") from None
    if sha256_bytes(data) != digest:
        raise BadDigest(
            f"{what}: its {path.name!r} in the registry is not the one that was verified",
            hint="refuse it, and have the client hand it in again",
        )
    return data


@contextmanager
def _disk(registry: Registry) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or "i/o error").lower()
        raise RunFailed(
            f"cannot write registry {registry.folder.name!r}: {reason}", hint="free space, and again"
        ) from None
