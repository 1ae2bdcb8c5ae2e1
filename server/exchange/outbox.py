"""What the owner offers: sealed folders in one place, each to the recipients that its manifest names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offsite.console import say
from offsite.errors import ArtefactError, ConfigError, OffsiteError
from offsite.exchange.wire import MAX_OFFERS, OfferSummary
from offsite.folders import names_in, read_all
from offsite.sealed.folder import KEYS_FILE, MANIFEST_FILE, SIGNATURES_FILE, opened_file, opened_payload
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
        names = sorted(name for name in names_in(self._folder) if not name.startswith("."))
        for name in names[:_MAX_FOLDERS]:
            offer = self._offer(self._folder / name)
            if offer is not None:
                found[name] = offer
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
        try:
            with _opened(offer.folder) as folder:
                if name in (MANIFEST_FILE, SIGNATURES_FILE, KEYS_FILE):
                    with opened_file(folder, name) as handle:
                        return os.dup(handle), os.fstat(handle).st_size
                if name not in sizes:
                    raise not_found()
                with opened_payload(folder, offer.folder.name) as payload, \
                        opened_file(payload, name, sizes[name]) as handle:  # fmt: skip
                    return os.dup(handle), sizes[name]
        except (OSError, ArtefactError):
            raise not_found() from None

    def _offer(self, path: Path) -> Offer | None:
        """Return the offer at `path`; None, told once to the owner, when it is not a sealed folder of theirs."""
        try:
            with _opened(path) as folder, opened_file(folder, MANIFEST_FILE) as handle:
                known = os.fstat(handle)
                stamp = (known.st_mtime_ns, known.st_ino)
                before = self._offers.get(path.name)
                if before is not None and before.stamp == stamp:
                    return before
                raw = read_all(handle, SEALED_MANIFEST_LIMIT_BYTES, MANIFEST_FILE)
            manifest = parse_strict(raw, SealedManifest, MANIFEST_FILE, {})
        except (OSError, OffsiteError):
            self._tell(path.name, "is not a sealed folder of plain files")
            return None
        if manifest.issuer != self._issuer:
            self._tell(path.name, "was not sealed by this owner")
            return None
        return Offer(sealed_digest(raw).removeprefix("sha256:"), path, manifest, stamp)

    def _tell(self, name: str, why: str) -> None:
        if name not in self._told:
            self._told.add(name)
            say(f"warning: {name!a} in the outbox {why}; it is not offered")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Yield the handle of a folder in the outbox; a link to one is none, and nothing is waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)
