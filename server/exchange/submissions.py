"""The registry as the exchange uses it: asked before an upload, at its end, and afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from offsite.artefacts.job import Job
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.errors import ArtefactError, ConfigError, WrongBinding
from offsite.exchange.wire import Status
from offsite.keys.identity import Identity, PublicKeys
from offsite.keys.trust import TrustStore
from offsite.sealed.folder import MANIFEST_FILE, RawSealed, read_sealed
from offsite.sealed.manifest import SealedManifest, verify_sealed
from offsite.sealed.recipients import read_keys, unwrap_keys
from offsite.strictjson import parse_object
from offsite.tensors import TensorSpec
from server.registry.intake import take_in
from server.registry.messages import MessageStore
from server.registry.registry import Registry
from server.registry.rows import Verdict, check_unseen
from server.registry.verify import adapter_tensors, verify_envelope, verify_sizes


class Submissions:
    """One registry, asked by clients. Every method may be called from several threads at once.

    Args:
        lookup: the keys of a trusted fingerprint at a time; raises Untrusted.
    """

    def __init__(
        self,
        registry: Registry,
        identity: Identity,
        trust: TrustStore,
        lookup: Callable[[str, int], PublicKeys],
    ) -> None:
        self._registry, self._identity, self._trust, self._lookup = registry, identity, trust, lookup
        self._notes = MessageStore(registry)
        self._tensors: dict[str, dict[str, TensorSpec]] = {}

    def check(self, raw: RawSealed, client: str, now: int) -> SealedManifest:
        """Return the manifest once all that can be known before the payload comes is in order.

        Raises:
            ArtefactError: a child for signature, schema, dates, job, round or sequence, or wrapped keys that do not
                open.
        """

        def keys(issuer: str) -> PublicKeys:
            return self._lookup(issuer, now)

        manifest = verify_sealed(raw.manifest_raw, raw.signatures_raw, keys, now=now)
        if manifest.kind == "note":
            if manifest.issuer != client:
                raise WrongBinding("this note was sealed by another key than the one that hands it in")
            self._notes.check(manifest, self._registry.job(manifest.job_id))
            unwrap_keys(read_keys(raw.keys_raw), manifest, raw.digest, self._identity)
            return manifest
        manifest, job = verify_envelope(raw.manifest_raw, raw.signatures_raw, keys, self._registry.job, now=now)
        if manifest.issuer != client:
            raise WrongBinding("this bundle was sealed by another key than the one that hands it in")
        check_unseen(manifest, raw.digest, self._registry.seen(manifest))
        verify_sizes(manifest, self._expected(job))
        unwrap_keys(read_keys(raw.keys_raw), manifest, raw.digest, self._identity)  # before a byte of it is sent
        return manifest

    def _expected(self, job: Job) -> dict[str, TensorSpec]:
        """Return the tensors of the job's adapter, from the owner's record of its package.

        Raises:
            ConfigError: when there is none.
        """
        if job.job_id not in self._tensors:
            package = self._registry.package_path(job.package_digest)
            try:
                record = read_owner_record(owner_record_path(package))
            except ArtefactError as error:  # the owner's fault, not the client's
                raise ConfigError(f"package {package.name!r} of the job cannot be used: {error}") from None
            self._tensors[job.job_id] = adapter_tensors(job.adapter, record)
        return self._tensors[job.job_id]

    def verdict(self, digest: str, client: str) -> Status | None:
        """Return what became of a bundle of that client; None when none was verified or refused for good.

        Args:
            digest: SHA-256 in hex.
        """
        found = self._registry.verdict(f"sha256:{digest}")
        if found is None or not found.is_final or self._registry.entry(found.id).client != client:
            return None
        return _status(found)

    def take_in(self, folder: Path, digest: str, now: int) -> Status:
        """Verify the sealed bundle in `folder` and register it; return what became of it.

        Raises:
            RunFailed: when the disk fails; nothing is registered then.
        """
        try:
            raw = read_sealed(folder)
            if self._is_note(raw):
                return self._keep_note(folder, raw, digest, now)
            found = take_in(self._registry, folder, self._identity, self._trust, now=now)
        except ArtefactError as error:
            return Status(digest=digest, state="refused", reason=type(error).__name__, message=str(error)[:2000])
        return _status(found)

    def _keep_note(self, folder: Path, raw: RawSealed, digest: str, now: int) -> Status:
        manifest = verify_sealed(raw.manifest_raw, raw.signatures_raw, lambda key: self._lookup(key, now), now=now)
        self._notes.check(manifest, self._registry.job(manifest.job_id))
        self._notes.keep(folder, manifest)
        return Status(digest=digest, state="accepted")

    @staticmethod
    def _is_note(raw: RawSealed) -> bool:
        """Tell whether the manifest says that it is a note's; what that is worth is checked afterwards."""
        return parse_object(raw.manifest_raw, MANIFEST_FILE).get("kind") == "note"

    def log(self, event: str, **fields: object) -> None:
        """One line more is in the owner's log."""
        self._registry.log(event, **fields)


def _status(found: Verdict) -> Status:
    return Status(
        digest=found.digest.removeprefix("sha256:"),
        state=found.state,
        id=found.id,
        reason=found.reason_class or "",
        message=found.message[:2000],
    )
