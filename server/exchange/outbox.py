"""What the owner offers: sealed folders in one place, each to the recipients that its manifest names."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from offsite.console import say
from offsite.errors import ConfigError, OffsiteError
from offsite.exchange.wire import MAX_OFFERS, OfferSummary
from offsite.sealed.folder import KEYS_FILE, MANIFEST_FILE, PAYLOAD, SIGNATURES_FILE
from offsite.sealed.manifest import SEALED_MANIFEST_LIMIT_BYTES, SealedManifest, sealed_digest
from offsite.strictjson import parse_strict
from server.http.refusals import not_found

_MAX_FOLDERS = 10_000


@dataclass(frozen=True)
class Offer:
    """One sealed folder. `digest` is in hex, without prefix."""

    digest: str
    folder: Path
    manifest: SealedManifest
    stamp: tuple[int, int]

    def summary(self) -> OfferSummary:
        """Return what a client chooses by."""
        manifest = self.manifest
        return OfferSummary(
            digest=self.digest,
            kind=manifest.kind,
            job_id=manifest.job_id,
            created=manifest.created,
            expires=manifest.expires,
            sequence=manifest.sequence,
            bytes=sum(file.sealed_bytes for file in manifest.files),
        )


class Outbox:
    """The sealed folders of one issuer that lie in `folder`; looked at again whenever somebody asks.

    Raises:
        ConfigError: when there is no such folder.
    """

    def __init__(self, folder: Path, issuer: str) -> None:
        if not folder.is_dir():
            raise ConfigError(f"no outbox folder named {folder.name!r}", hint="offsite seal writes folders into it")
        self._folder, self._issuer = folder, issuer
        self._offers: dict[str, Offer] = {}
        self._told: set[str] = set()

    def offers(self, client: str) -> list[Offer]:
        """Return what is offered to that client, oldest first."""
        found: dict[str, Offer] = {}
        for path in sorted(self._folder.iterdir())[:_MAX_FOLDERS]:
            offer = self._offer(path)
            if offer is not None:
                found[path.name] = offer
        self._offers = found
        own = [offer for offer in found.values() if client in offer.manifest.recipients]
        return sorted(own, key=lambda offer: (offer.manifest.created, offer.manifest.sequence))[-MAX_OFFERS:]

    def open(self, client: str, digest: str, name: str) -> tuple[int, int]:
        """Return an open file and its size: one of the three small ones, or a payload file that the manifest names.

        Raises:
            Refusal: 404 unless all of that is offered to the client.
        """
        offer = next((offer for offer in self.offers(client) if offer.digest == digest), None)
        if offer is None:
            raise not_found()
        sizes = {file.payload_name: file.sealed_bytes for file in offer.manifest.files}
        if name in (MANIFEST_FILE, SIGNATURES_FILE, KEYS_FILE):
            path, expected = offer.folder / name, None
        elif name in sizes:
            path, expected = offer.folder / PAYLOAD / name, sizes[name]
        else:
            raise not_found()
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            raise not_found() from None
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or expected not in (None, found.st_size):
            os.close(handle)
            raise not_found()
        return handle, found.st_size

    def _offer(self, path: Path) -> Offer | None:
        """Return the offer at `path`; None, told once to the owner, when it is not a sealed folder of theirs."""
        try:
            known = (path / MANIFEST_FILE).stat()
            stamp = (known.st_mtime_ns, known.st_ino)
            before = self._offers.get(path.name)
            if before is not None and before.stamp == stamp:
                return before
            if path.name.startswith(".") or path.is_symlink():
                return None
            with (path / MANIFEST_FILE).open("rb") as handle:
                raw = handle.read(SEALED_MANIFEST_LIMIT_BYTES + 1)
            manifest = parse_strict(raw, SealedManifest, MANIFEST_FILE, {})
        except (OSError, OffsiteError):
            self._tell(path.name, "is not a sealed folder")
            return None
        if manifest.issuer != self._issuer:
            self._tell(path.name, "was not sealed by this owner")
            return None
        return Offer(sealed_digest(raw).removeprefix("sha256:"), path, manifest, stamp)

    def _tell(self, name: str, why: str) -> None:
        if name not in self._told and not name.startswith("."):
            self._told.add(name)
            say(f"warning: {name!r} in the outbox {why}; it is not offered")
