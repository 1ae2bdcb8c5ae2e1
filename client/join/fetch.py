"""The job and its package, from the owner's exchange or from beside the invitation, opened by every check there is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from client.exchange.http import ExchangeClient, NotAccepted
from client.exchange.verbs import fetch_offer
from client.join.party import Joining
from offsite.artefacts.job import OpenedJob, read_job
from offsite.artefacts.package import Package, open_package
from offsite.console import say, utc
from offsite.errors import ArtefactError, Expired, OffsiteError, WrongBinding
from offsite.exchange.verbs import open_sealed
from offsite.exchange.wire import Offers, OfferSummary
from offsite.sealed.folder import MANIFEST_FILE, read_sealed
from offsite.sealed.invitation import Invitation
from offsite.sealed.ledger import Ledger
from offsite.sealed.manifest import SEALED_MANIFEST_LIMIT_BYTES, Kind, SealedManifest
from offsite.staging import remove, staged_file
from offsite.strictjson import parse_strict

LIMIT_BYTES = 2**40
CERTIFICATE_NAME = "exchange.pem"
_MAX_FOLDERS = 1000


class NotYet(Exception):
    """The owner has no job for this card yet; the words say what was looked at.

    Args:
        has_card: whether the owner has pinned the card, so that nothing is left to be done here.
    """

    def __init__(self, told: str, *, has_card: bool = False) -> None:
        super().__init__(told)
        self.has_card = has_card


@dataclass(frozen=True)
class Opened:
    """The job and its package, opened in the work folder and held to the invitation and to each other."""

    job: OpenedJob
    package: Package


def exchange_of(invitation: Invitation, joining: Joining, work: Path) -> ExchangeClient | None:
    """Return a connection to the exchange that the invitation names, trusting its certificate alone; None without one.

    Raises:
        ConfigError: when the address is none of an exchange, or would go over the network without encryption.
    """
    if invitation.url is None:
        return None
    certificate = None
    if invitation.certificate is not None:
        certificate = work / CERTIFICATE_NAME
        with staged_file(certificate, replace=True) as stage:
            stage.write_text(invitation.certificate, encoding="ascii")
    return ExchangeClient(invitation.url, joining.identity, joining.owner, certificate=certificate)


def fetch(
    invitation: Invitation, joining: Joining, exchange: ExchangeClient | None, *, beside: Path, work: Path
) -> Opened:
    """Return the job and package that the invitation is about; what was opened before is not fetched again.

    Args:
        beside: folder in which the owner's sealed folders lie, where there is no exchange.

    Raises:
        NotYet: when there is nothing for this card, and the invitation is one that does not name a job.
        Expired: when the job is past its date.
        WrongBinding: when the job is not the invitation's, or the work folder belongs to another.
        ArtefactError: with the subclass of the check that failed.
        RunFailed: when the exchange cannot be reached; what arrived is kept.
    """
    source: _Source = _Folder(joining, beside) if exchange is None else _Exchange(joining, exchange, work)
    job_folder, package_folder = work / "job", work / "package"
    is_new = not job_folder.is_dir()
    if is_new:
        _open(source, joining, "job", job_folder, lambda found: _is_job(found, invitation))
    job = read_job(job_folder)
    try:
        _require_invited(job, invitation, joining, job_folder)
    except ArtefactError:
        if is_new:  # another one may still come
            remove(job_folder)
        raise
    if not package_folder.is_dir():
        job_id = job.job.job_id
        _open(source, joining, "package", package_folder, lambda found: found.job_id == job_id)
    package = open_package(package_folder)
    if (package.digest, package.manifest.base_digest) != (job.job.package_digest, job.job.base_digest):
        raise WrongBinding(f"the package in {work.name!r} is not the job's", hint="give another --work")
    return Opened(job, package)


def _is_job(found: OfferSummary | SealedManifest, invitation: Invitation) -> bool:
    """Tell whether a sealed job may be the one meant; of an invitation without a job, a folder's manifest tells."""
    if invitation.job_id is not None:
        return found.job_id == invitation.job_id
    return not isinstance(found, SealedManifest) or found.package_digest == invitation.package_digest


def _open(
    source: _Source,
    joining: Joining,
    kind: Kind,
    out: Path,
    is_meant: Callable[[OfferSummary | SealedManifest], bool],
) -> None:
    sealed = source.sealed(kind, is_meant)
    now = int(time.time())
    with Ledger(joining.keys) as ledger:
        manifest = open_sealed(
            sealed, out, identity=joining.identity, trust=joining.trust, ledger=ledger, now=now
        ).manifest
    say(f"{kind} of {utc(manifest.created)}: signed by the owner, for this key, every byte as signed")


def _require_invited(opened: OpenedJob, invitation: Invitation, joining: Joining, folder: Path) -> None:
    """Return only if the opened job is the one that the invitation names, of these two parties, and in time."""
    job = opened.job
    named = (invitation.job_id, invitation.job_digest)
    if named != (None, None) and named != (job.job_id, opened.digest):
        raise WrongBinding(
            f"{folder.parent.name!r} holds job {job.job_id[:12]}, the invitation is to another, or to other terms",
            hint="give another --work, or ask the owner for a new invitation",
        )
    if (job.owner, job.client) != (joining.owner, joining.own):
        raise WrongBinding("the job is not between the invitation's owner and these keys", hint="give another --work")
    if job.package_digest != invitation.package_digest:
        raise WrongBinding("the job is about another package than the invitation", hint="ask the owner for a new one")
    if time.time() > job.expires:
        raise Expired(f"job {job.job_id[:12]} expired on {utc(job.expires)}", hint="ask the owner for a new job")
    with Ledger(joining.keys) as ledger:
        if ledger.job(job.job_id).digest != opened.digest:
            raise WrongBinding(f"job {job.job_id[:12]} was opened here with other terms than {folder.name!r} has")


class _Source(Protocol):
    """Where sealed folders come from."""

    def sealed(self, kind: Kind, is_meant: Callable[[OfferSummary | SealedManifest], bool]) -> Path:
        """Return the newest sealed folder of the kind that may be meant; NotYet when there is none."""


class _Folder(_Source):
    def __init__(self, joining: Joining, folder: Path) -> None:
        self._joining, self._folder = joining, folder

    def sealed(self, kind: Kind, is_meant: Callable[[OfferSummary | SealedManifest], bool]) -> Path:
        found = [
            (manifest.sequence, manifest.created, path)
            for path, manifest in self._manifests()
            if manifest.kind == kind
            and manifest.issuer == self._joining.owner
            and self._joining.own in manifest.recipients
            and is_meant(manifest)
        ]
        if not found:
            raise NotYet(f"no sealed {kind} for this key lies beside the invitation")
        return max(found)[2]

    def _manifests(self) -> Iterable[tuple[Path, SealedManifest]]:
        """Yield what looks like a sealed folder; all of it is checked when it is opened."""
        for path in sorted(self._folder.iterdir())[:_MAX_FOLDERS]:
            if path.is_dir() and (path / MANIFEST_FILE).is_file():
                try:
                    yield path, parse_strict(read_sealed(path).manifest_raw, SealedManifest, MANIFEST_FILE, {})
                except OffsiteError as error:
                    say(f"{path.name!a} beside the invitation is passed over: {error}")


class _Exchange(_Source):
    def __init__(self, joining: Joining, exchange: ExchangeClient, work: Path) -> None:
        self._joining, self._exchange, self._work = joining, exchange, work

    def sealed(self, kind: Kind, is_meant: Callable[[OfferSummary | SealedManifest], bool]) -> Path:
        out = self._work / f"{kind}.sealed"
        try:
            offers = self._exchange.ask("GET", "/v1/sealed", Offers).offers
        except NotAccepted as error:
            raise NotYet(f"{error}: its owner has not pinned this card, or the clocks differ") from None
        found = [one for one in offers if one.kind == kind and is_meant(one)]
        if len({one.job_id for one in found}) > 1:  # an invitation without a job: the manifests say of which package
            found = [one for one in found if is_meant(self._stated(one))]
        if not found:
            raise NotYet(f"the exchange offers no {kind} to this key", has_card=True)
        offer = max(found, key=lambda one: (one.created, one.sequence))
        if out.is_dir() and read_sealed(out).digest != f"sha256:{offer.digest}":
            remove(out)
        if not out.is_dir():
            say(f"{kind} {offer.digest[:16]}: {offer.bytes:,} bytes")
            trust, own = self._joining.trust, self._joining.own
            fetch_offer(self._exchange, offer, out, trust=trust, own=own, limit_bytes=LIMIT_BYTES)
        return out

    def _stated(self, offer: OfferSummary) -> SealedManifest:
        """Return what the exchange says that the manifest is; nothing of it is checked before the folder is fetched."""
        path = f"/v1/sealed/{offer.digest}/{MANIFEST_FILE}"
        raw = self._exchange.fetch(path, SEALED_MANIFEST_LIMIT_BYTES)
        return parse_strict(raw, SealedManifest, MANIFEST_FILE, {})


def clear_fetched(work: Path) -> None:
    """What was fetched sealed is gone, once it was opened; its disk is wanted for training."""
    for name in ("job.sealed", "package.sealed"):
        if (work / name).is_dir():
            shutil.rmtree(work / name)


def require_nothing_missing(error: NotYet, invitation: Invitation) -> None:
    """Return only if the invitation names no job, so that there may be none yet.

    Raises:
        ArtefactError: saying what is missing.
    """
    if invitation.job_id is not None:
        where = "lay the sealed folders beside the invitation" if invitation.url is None else "ask the owner"
        raise ArtefactError(f"job {invitation.job_id[:12]}: {error}", hint=where)
