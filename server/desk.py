"""The registry as the exchange uses it: asked before an upload, at its end, and afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from offsite.errors import ArtefactError, ConfigError, WrongBinding
from offsite.keys import Identity, PublicKeys
from offsite.sealed import SealedManifest
from offsite.sealedfolder import RawSealed
from offsite.trust import TrustStore
from offsite.wire import Status
from server.registry import Registry, check_unseen
from server.verify import verify_envelope


class Desk:
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

    def check(self, raw: RawSealed, client: str, now: int) -> SealedManifest:
        """Return the manifest once all that can be known before the payload comes is in order.

        Raises:
            ArtefactError: a child for signature, schema, dates, job, round or sequence.
        """

        def keys(issuer: str) -> PublicKeys:
            return self._lookup(issuer, now)

        manifest, _ = verify_envelope(raw.manifest_raw, raw.signatures_raw, keys, self._registry.job, now=now)
        if manifest.issuer != client:
            raise WrongBinding("this bundle was sealed by another key than the one that hands it in")
        check_unseen(manifest, raw.digest, self._registry.seen(manifest))
        return manifest

    def verdict(self, digest: str, client: str) -> Status | None:
        """Return what became of a bundle of that client; None when none was verified or refused for good.

        Args:
            digest: SHA-256 in hex.
        """
        found = self._registry.verdict(f"sha256:{digest}")
        if found is None or found.state == "received":
            return None
        try:
            entry = self._registry.entry(found.id)
        except ConfigError:
            return None  # refused on its way here; it may come again
        if entry.digest != found.digest or entry.client != client:
            return None
        return Status(
            digest=digest, state=found.state, id=found.id, reason=found.reason_class or "", message=found.message
        )

    def take_in(self, folder: Path, digest: str, now: int) -> Status:
        """Verify the sealed bundle in `folder` and register it; return what became of it.

        Raises:
            RunFailed: when the disk fails; nothing is registered then.
        """
        try:
            found = self._registry.intake(folder, self._identity, self._trust, now=now)
        except ArtefactError as error:
            return Status(digest=digest, state="refused", reason=type(error).__name__, message=str(error)[:2000])
        return Status(
            digest=digest, state=found.state, id=found.id, reason=found.reason_class or "", message=found.message
        )

    def log(self, event: str, **fields: object) -> None:
        """One line more is in the owner's log."""
        self._registry.log(event, **fields)
