"""``offsite exchange pull``, ``push`` and ``status``: the client's way to fetch and hand in what is sealed.

What is pulled is checked against the owner's signature before its payload is fetched and against every signed digest
after; `offsite open` checks it in full. What is pushed goes on where it broke off. The same folders may as well travel
by hand.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from client.exchange.config import ExchangeConfig, PullConfig, PushConfig, StatusConfig
from client.exchange.http import ExchangeClient, WrongOffset, plain
from offsite import errors
from offsite.console import Progress, say, table
from offsite.digests import sha256_file
from offsite.errors import ArtefactError, BadDigest, ConfigError, RunFailed, TooLarge, WrongBinding, WrongRecipient
from offsite.exchange.wire import Offers, OfferSummary, Status, declare
from offsite.folders import names_in
from offsite.keys.identity import Identity, open_identity
from offsite.keys.trust import TrustStore
from offsite.sealed.folder import (
    KEYS_FILE,
    MANIFEST_FILE,
    PAYLOAD,
    SIGNATURES_FILE,
    RawSealed,
    check_payload,
    read_sealed,
)
from offsite.sealed.manifest import SEALED_MANIFEST_LIMIT_BYTES, SIGNATURES_LIMIT_BYTES, SealedManifest, verify_sealed
from offsite.sealed.recipients import KEYS_LIMIT_BYTES
from offsite.staging import fsync, refuse_existing
from offsite.strictjson import parse_strict

MAX_PART_BYTES = 8 * 2**20

_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.2, 5.0
_MAX_ROUNDS = 100
_PAYLOAD_NAME = re.compile(r"[0-9a-f]{64}\.enc")


def pull_run(config: PullConfig) -> dict[str, object]:
    """Write the sealed folder OUTPUT, whole or not at all; OUTPUT.work keeps what arrived before a failure.

    Raises:
        ConfigError: the output exists, the settings do not fit, or none or several folders are offered.
        ArtefactError: what arrives is not what the owner signed for this key.
        RunFailed: the exchange cannot be reached, or the disk is full.
    """
    began = time.monotonic()
    refuse_existing(config.output)
    trust, identity = TrustStore(config.keys), open_identity(config)
    owner = owner_of(config.owner, trust)
    with exchange_client(config, identity, owner) as exchange:
        offer = _chosen(exchange.ask("GET", "/v1/sealed", Offers).offers, config)
        say(f"{offer.kind} {offer.digest[:16]} of job {offer.job_id[:12]}: {offer.bytes:,} bytes")
        if offer.bytes > config.limit_bytes:
            raise TooLarge(f"this {offer.kind} has {offer.bytes} bytes, --limit-bytes {config.limit_bytes}")
        manifest, num_resumed = fetch_offer(
            exchange, offer, config.output, trust=trust, own=identity.public.fingerprint, limit_bytes=config.limit_bytes
        )
    return {
        "bytes": sum(file.sealed_bytes for file in manifest.files),
        "digest": f"sha256:{offer.digest}",
        "job_id": manifest.job_id,
        "kind": manifest.kind,
        "output": str(config.output),
        "resumed_bytes": num_resumed,
        "seconds": round(time.monotonic() - began, 1),
    }


def fetch_offer(
    exchange: ExchangeClient, offer: OfferSummary, out: Path, *, trust: TrustStore, own: str, limit_bytes: int
) -> tuple[SealedManifest, int]:
    """Write the sealed folder `out`, whole or not at all; return what its owner signed, and the bytes resumed.

    Args:
        own: fingerprint of this client, which it must be sealed for.

    Raises:
        ArtefactError: what arrives is not what the owner signed for this key, or is too large.
        RunFailed: the exchange cannot be reached, or the disk is full; `out`.work keeps what arrived.
    """
    raw = RawSealed(
        manifest_raw=exchange.fetch(f"/v1/sealed/{offer.digest}/{MANIFEST_FILE}", SEALED_MANIFEST_LIMIT_BYTES),
        signatures_raw=exchange.fetch(f"/v1/sealed/{offer.digest}/{SIGNATURES_FILE}", SIGNATURES_LIMIT_BYTES),
        keys_raw=exchange.fetch(f"/v1/sealed/{offer.digest}/{KEYS_FILE}", KEYS_LIMIT_BYTES),
    )
    now = int(time.time())
    manifest = verify_sealed(
        raw.manifest_raw, raw.signatures_raw, lambda issuer: trust.require(issuer, now=now), now=now
    )
    _check_offer(manifest, raw, offer, exchange.owner, own, limit_bytes)
    return manifest, _download(exchange, offer.digest, raw, manifest, out)


def hand_in(exchange: ExchangeClient, sealed: Path, *, verdict_seconds: float) -> tuple[Status, int]:
    """The sealed bundle or note is with the owner; return what became of it, and how many bytes were sent now.

    An earlier try that broke off is gone on with.

    Raises:
        ArtefactError: the class that the owner's check names, when the bundle is refused.
        RunFailed: the exchange cannot be reached; trying again goes on.
    """
    raw = read_sealed(sealed)
    manifest = parse_strict(raw.manifest_raw, SealedManifest, MANIFEST_FILE, {})
    check_payload(sealed, manifest)
    status, num_sent = _upload(exchange, sealed, raw, manifest)
    status = _awaited(exchange, status, verdict_seconds)
    if status.state == "refused":
        raise _refusal(status)
    return status, num_sent


def push_run(config: PushConfig) -> dict[str, object]:
    """Hand in the sealed bundle, from where an earlier push broke off, and return the owner's verdict.

    Raises:
        ArtefactError: the class that the owner's check names, when the bundle is refused.
        RunFailed: the exchange cannot be reached; pushing again goes on.
    """
    began = time.monotonic()
    manifest = parse_strict(read_sealed(config.sealed).manifest_raw, SealedManifest, MANIFEST_FILE, {})
    if manifest.kind != "bundle":
        raise WrongBinding(f"{config.sealed.name!r} is a sealed {manifest.kind}; an exchange takes bundles")
    trust, identity = TrustStore(config.keys), open_identity(config)
    if manifest.issuer != identity.public.fingerprint:
        raise WrongBinding(f"{config.sealed.name!r} was sealed by another key", hint="give the right --keys")
    owner = owner_of(manifest.recipients[0], trust)
    if config.owner not in (None, owner):
        raise WrongRecipient(f"{config.sealed.name!r} is sealed for {owner}, not for --owner")
    with exchange_client(config, identity, owner) as exchange:
        status, num_sent = hand_in(exchange, config.sealed, verdict_seconds=config.verdict_seconds)
    if status.state == "verifying":
        say("the owner's checks are not done yet; exchange status will tell")
    else:
        say(f"{status.state}: bundle {status.id}")
    return {**_told(status), "seconds": round(time.monotonic() - began, 1), "sent_bytes": num_sent}


def status_run(config: StatusConfig) -> dict[str, object]:
    """Return what became of a bundle, or what the owner offers.

    Raises:
        ArtefactError: when the owner does not know the bundle.
        RunFailed: the exchange cannot be reached.
    """
    trust = TrustStore(config.keys)
    digest, recipient = (None, None) if config.sealed is None else _named(config.sealed)
    owner = owner_of(config.owner or recipient, trust)
    with exchange_client(config, open_identity(config), owner) as exchange:
        if digest is None:
            return _listed(exchange.ask("GET", "/v1/sealed", Offers).offers)
        status = exchange.ask("GET", f"/v1/bundles/{digest}", Status)
    reason = f": {plain(status.reason)}: {plain(status.message)}" if status.reason else ""
    say(f"{status.state}{reason}")
    return _told(status)


def exchange_client(config: ExchangeConfig, identity: Identity, owner: str) -> ExchangeClient:
    """Return a connection to the exchange of that owner, which is not opened yet."""
    return ExchangeClient(
        config.url,
        identity,
        owner,
        certificate=config.certificate,
        patience_seconds=config.patience_seconds,
        timeout_seconds=config.timeout_seconds,
    )


def owner_of(fingerprint: str | None, trust: TrustStore) -> str:
    """Return the fingerprint of the party whose exchange it is: the one named, or the only one trusted."""
    now = int(time.time())
    if fingerprint is not None:
        return trust.require(trust.named(fingerprint, now=now), now=now).fingerprint
    trusted = [peer.keys.fingerprint for peer in trust.peers() if peer.state(now=now) == "trusted"]
    if len(trusted) != 1:
        raise ConfigError(f"--owner is missing; {len(trusted)} parties are trusted here", hint="offsite trust list")
    return trusted[0]


def _chosen(offers: Sequence[OfferSummary], config: PullConfig) -> OfferSummary:
    """Return the newest offer that the settings name, when they name one kind of one job."""
    digest = (config.digest or "").removeprefix("sha256:")
    found = [
        offer
        for offer in offers
        if offer.digest.startswith(digest)
        and config.kind in (None, offer.kind)
        and offer.job_id.startswith(config.job or "")
    ]
    if not found:
        raise ConfigError(
            f"nothing of that sort is offered to this key; {len(offers)} other(s) are",
            hint="offsite exchange status URL lists what is",
        )
    if len({(offer.kind, offer.job_id) for offer in found}) > 1:
        named = ", ".join(sorted(f"{offer.kind} {offer.digest[:16]} of job {offer.job_id[:12]}" for offer in found)[:8])
        raise ConfigError(f"{len(found)} are offered: {named}", hint="choose by --kind, --job or --digest")
    return max(found, key=lambda offer: (offer.sequence, offer.created))


def _check_offer(
    manifest: SealedManifest, raw: RawSealed, offer: OfferSummary, owner: str, own: str, limit_bytes: int
) -> None:
    if raw.digest != f"sha256:{offer.digest}":
        raise BadDigest("the exchange sent another manifest than the one it offered")
    if manifest.issuer != owner:
        raise WrongBinding("what the exchange offers was sealed by another party than its owner")
    if own not in manifest.recipients:
        raise WrongRecipient(f"this {manifest.kind} is sealed for another key")
    num_bytes = sum(file.sealed_bytes for file in manifest.files)
    if num_bytes > limit_bytes:
        raise TooLarge(f"this {manifest.kind} has {num_bytes} bytes, --limit-bytes {limit_bytes}")


def _download(exchange: ExchangeClient, digest: str, raw: RawSealed, manifest: SealedManifest, out: Path) -> int:
    """Write the folder `out`; return how many of its bytes were there from an earlier try."""
    work = out.with_name(f"{out.name}.work")
    total = sum(file.sealed_bytes for file in manifest.files)
    try:
        num_resumed = _prepare(work, raw, manifest)
        if shutil.disk_usage(work).free < total - num_resumed:
            raise RunFailed(f"the disk has no room for {total - num_resumed} bytes", hint="make room and pull again")
        done, bar = 0, Progress(total, "pull")
        for file in manifest.files:
            target = work / PAYLOAD / file.payload_name
            path = f"/v1/sealed/{digest}/{PAYLOAD}/{file.payload_name}"
            exchange.download(path, target, file.sealed_bytes, _shown(bar, done))
            done += file.sealed_bytes
            if sha256_file(target) != file.sealed_sha256:
                target.unlink()
                raise BadDigest(f"{file.name!r}: what arrived is not what was signed", hint="pull again")
        bar.close()
        for name, content in zip(
            (MANIFEST_FILE, SIGNATURES_FILE, KEYS_FILE),
            (raw.manifest_raw, raw.signatures_raw, raw.keys_raw),
            strict=True,
        ):
            (work / name).write_bytes(content)
            fsync(work / name)
        fsync(work / PAYLOAD)
        fsync(work)
        refuse_existing(out)
        work.rename(out)
        fsync(out.parent)
    except OSError as error:
        raise RunFailed(f"cannot write {work.name!r}: {(error.strerror or 'i/o error').lower()}") from error
    return num_resumed


def _shown(bar: Progress, done: int) -> Callable[[int], None]:
    return lambda reached: bar.update(done + reached)


def _prepare(work: Path, raw: RawSealed, manifest: SealedManifest) -> int:
    """The work folder holds this manifest, and of the payload only what belongs to it; return how much."""
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise ConfigError(f"{work.name!r} is in the way", hint="delete it")
    known = work / MANIFEST_FILE
    if work.is_dir() and not _is_own(work):
        raise ConfigError(
            f"{work.name!r} is in the way: it holds more than an unfinished pull", hint="choose another -o"
        )
    if work.is_dir() and not (known.is_file() and known.read_bytes() == raw.manifest_raw):
        shutil.rmtree(work)
    (work / PAYLOAD).mkdir(parents=True, exist_ok=True)
    known.write_bytes(raw.manifest_raw)
    sizes = {file.payload_name: file.sealed_bytes for file in manifest.files}
    for path in (work / PAYLOAD).iterdir():
        if path.is_symlink() or not path.is_file() or path.stat().st_size > sizes.get(path.name, -1):
            path.unlink()
    return sum(path.stat().st_size for path in (work / PAYLOAD).iterdir())


def _is_own(work: Path) -> bool:
    """Tell whether nothing lies in the work folder but what a pull writes there."""
    payload = work / PAYLOAD
    if payload.is_symlink() or names_in(work) - {MANIFEST_FILE, SIGNATURES_FILE, KEYS_FILE, PAYLOAD}:
        return False
    return not payload.is_dir() or all(_PAYLOAD_NAME.fullmatch(name) for name in names_in(payload))


def _upload(exchange: ExchangeClient, sealed: Path, raw: RawSealed, manifest: SealedManifest) -> tuple[Status, int]:
    """Send what the exchange does not have; return its answer to the whole, and how many bytes were sent."""
    body, num_sent = declare(raw), 0
    sizes = {file.payload_name: file.sealed_bytes for file in manifest.files}
    bar = Progress(sum(sizes.values()), "push")
    for _ in range(_MAX_ROUNDS):
        status = exchange.ask("POST", "/v1/bundles", Status, body)
        if status.state != "receiving":
            break
        done = 0
        for name, size in sorted(sizes.items()):
            begun = status.parts[name].offset if name in status.parts else 0
            num_sent += _send(
                exchange, raw, sealed / PAYLOAD / name, (begun, size), status.part_bytes, _shown(bar, done)
            )
            done += size
        try:
            status = exchange.ask("POST", f"{_address(raw)}/complete", Status)
        except WrongOffset:
            continue  # bytes are missing there: ask how far it has come
        break
    else:
        raise RunFailed("the exchange keeps asking for the same bytes", hint="tell its owner")
    bar.close()
    return status, num_sent


def _send(
    exchange: ExchangeClient,
    raw: RawSealed,
    path: Path,
    span: tuple[int, int],
    part_bytes: int,
    progress: Callable[[int], None],
) -> int:
    """The exchange has every byte of the encrypted file at `path`; return how many were sent now."""
    offset, size = span
    part_bytes = max(1, min(part_bytes, MAX_PART_BYTES))
    num_sent, num_moves = 0, 0
    with path.open("rb") as handle:
        while offset < size:
            handle.seek(offset)
            part = handle.read(part_bytes)
            if not part:
                raise BadDigest(f"{path.name[:16]} became shorter while it was sent")
            address = f"{_address(raw)}/{PAYLOAD}/{path.name}/{offset}"
            try:
                status = exchange.ask("PUT", address, Status, part)
            except WrongOffset as moved:
                num_moves += 1
                if moved.offset is None or num_moves > _MAX_ROUNDS:
                    break  # it takes no more parts: completing tells why
                offset = min(moved.offset, size)
                continue
            num_sent += len(part)
            reached = status.parts[path.name].offset if path.name in status.parts else offset + len(part)
            if not offset < reached <= size:
                raise RunFailed("the exchange lost its place in an upload", hint="push again to continue")
            offset = reached
            progress(offset)
    return num_sent


def _awaited(exchange: ExchangeClient, status: Status, verdict_seconds: float) -> Status:
    until, pause_seconds = time.monotonic() + verdict_seconds, _POLL_SECONDS
    while status.state in ("verifying", "received") and time.monotonic() < until:
        time.sleep(pause_seconds)
        pause_seconds = min(1.5 * pause_seconds, _LONGEST_POLL_SECONDS)
        status = exchange.ask("GET", f"/v1/bundles/{status.digest}", Status)
    if status.state == "receiving":
        raise RunFailed("the exchange could not verify the bundle", hint="push again; it goes on where it was")
    return status


def _refusal(status: Status) -> ArtefactError:
    kind = getattr(errors, status.reason, None)
    known = kind if isinstance(kind, type) and issubclass(kind, ArtefactError) else ArtefactError
    return known(
        f"the owner refused this bundle: {plain(status.reason, 40) or 'no reason given'}: {plain(status.message)}",
        hint="it was not registered" if status.reason != "PolicyError" else "ask the owner",
    )


def _address(raw: RawSealed) -> str:
    return f"/v1/bundles/{raw.digest.removeprefix('sha256:')}"


def _named(sealed: str) -> tuple[str, str | None]:
    """Return the digest, and the recipient if a folder was given."""
    digest = sealed.removeprefix("sha256:")
    if len(digest) == 64 and all(letter in "0123456789abcdef" for letter in digest):
        return digest, None
    raw = read_sealed(Path(sealed))
    manifest = parse_strict(raw.manifest_raw, SealedManifest, MANIFEST_FILE, {})
    return raw.digest.removeprefix("sha256:"), manifest.recipients[0]


def _listed(offers: Sequence[OfferSummary]) -> dict[str, object]:
    rows = [[offer.kind, offer.job_id[:12], offer.digest[:16], f"{offer.bytes:,}"] for offer in offers]
    table("offered to this key", ["kind", "job", "digest", "bytes"], rows)
    return {"offers": [offer.model_dump(mode="json") for offer in offers]}


def _told(status: Status) -> dict[str, object]:
    told: dict[str, object] = {"digest": f"sha256:{status.digest}", "id": status.id, "state": status.state}
    if status.reason:
        told.update(reason=plain(status.reason), message=plain(status.message))
    return told
