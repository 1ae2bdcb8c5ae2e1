"""Sealed folders, withdrawals, cards and keys folders, in words. Nothing is decrypted, and no private key is opened."""

from __future__ import annotations

from offsite.console import say
from offsite.errors import BadSignature, Untrusted
from offsite.inspection.thing import Thing, read_plain
from offsite.inspection.words import ends, fact, facts, rows, when
from offsite.keys.files import check_folder, read_private
from offsite.keys.identity import CARD_LIMIT_BYTES, CARD_NAME, PublicKeys, read_card
from offsite.keys.trust import TrustStore
from offsite.sealed.folder import RawSealed, check_payload, read_sealed
from offsite.sealed.invitation import INVITATION_LIMIT_BYTES, parse_invitation
from offsite.sealed.manifest import (
    SEALED_FORMAT,
    SUITE,
    SealedManifest,
    check_names,
    read_signatures,
    verify_sealed,
)
from offsite.sealed.withdrawal import WITHDRAWAL_LIMIT_BYTES, read_withdrawal
from offsite.strictjson import parse_strict

_CARD = "signed by the keys in it; whose they are, only the fingerprint compared over another channel tells"


def show_sealed(thing: Thing) -> dict[str, object]:
    """A sealed folder is told from its manifest; its seal is verified where its issuer is pinned.

    Raises:
        ArtefactError: with the subclass of the check that failed; a date that has passed is told, not refused.
    """
    raw = read_sealed(thing.path)
    manifest = parse_strict(
        raw.manifest_raw, SealedManifest, "manifest.json", {"format": SEALED_FORMAT, "suite": SUITE}
    )
    check_names(manifest)
    if read_signatures(raw.signatures_raw)[0] != manifest.issuer:
        raise BadSignature("manifest.json names another issuer than the one who signed it")
    unchecked = _verified(thing, raw, manifest)
    checked = "both signatures, and every encrypted byte; nothing is decrypted" if unchecked is None else unchecked
    say(f"sealed {manifest.kind} {thing.name}; {'checked: ' if unchecked is None else ''}{checked}")
    told = thing.names.told
    facts(
        {
            "digest": raw.digest,
            "job": manifest.job_id,
            "issuer": told(manifest.issuer),
        }
    )
    for recipient in manifest.recipients:
        fact("for", told(recipient))
    facts(
        {
            "created": when(manifest.created, thing.now),
            "expires": ends(manifest.expires, thing.now),
            "number": f"{manifest.sequence:,} of its kind in this job",
            "round": manifest.round or None,
            "package": manifest.package_digest,
            "base model": manifest.base_digest,
        }
    )
    rows("files", ["name", "bytes", "encrypted"], [
        [file.name, f"{file.bytes:,}", f"{file.sealed_bytes:,}"] for file in manifest.files
    ])  # fmt: skip
    return {
        "kind": "sealed",
        "holds": manifest.kind,
        "digest": raw.digest,
        "job_id": manifest.job_id,
        "issuer": manifest.issuer,
        "recipients": list(manifest.recipients),
        "created": manifest.created,
        "expires": manifest.expires,
        "expired": thing.now > manifest.expires,
        "sequence": manifest.sequence,
        "round": manifest.round,
        "package_digest": manifest.package_digest,
        "base_digest": manifest.base_digest,
        "files": {file.name: file.bytes for file in manifest.files},
        "bytes": sum(file.sealed_bytes for file in manifest.files),
        "verified": unchecked is None,
        "checked": checked,
    }


def _verified(thing: Thing, raw: RawSealed, manifest: SealedManifest) -> str | None:
    """Return None once signatures and encrypted bytes fit, or why they were not checked."""
    store = thing.names.store
    if store is None:
        return "signatures not checked: --keys names no keys folder with its issuer's card"
    at = min(max(thing.now, manifest.created), manifest.expires)  # what is over can still be genuine

    own = thing.names.own

    def issuer(fingerprint: str) -> PublicKeys:
        return own if own is not None and own.fingerprint == fingerprint else store.require(fingerprint, now=thing.now)

    try:
        verify_sealed(raw.manifest_raw, raw.signatures_raw, issuer, now=at)
    except Untrusted as error:
        return f"signatures not checked: {error}"
    check_payload(thing.path, manifest)
    return None


def show_withdrawal(thing: Thing) -> dict[str, object]:
    """A withdrawal is told; its signatures are verified where its issuer is pinned.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    statement, verify = read_withdrawal(read_plain(thing.path, WITHDRAWAL_LIMIT_BYTES))
    keys = _keys_of(thing, statement.issuer)
    if isinstance(keys, PublicKeys):
        verify(keys)
    checked = "both signatures; what is stated is its issuer's word" if isinstance(keys, PublicKeys) else keys
    say(f"withdrawal {thing.name}; {'checked: ' if isinstance(keys, PublicKeys) else ''}{checked}")
    told = thing.names.told
    facts(
        {
            "issuer": told(statement.issuer),
            "client": told(statement.client),
            "created": when(statement.created, thing.now),
            "sealed bundle": statement.bundle,
            "bundle": statement.bundle_digest,
            "job": statement.job_id,
            "round": statement.round,
            "it was": statement.was,
            "base model": statement.base_digest,
            "read again": "the full model, and its digest is that one" if statement.model_checked else "nothing",
        }
    )
    for digest in statement.removed:
        fact("deleted", f"an adapted folder, {digest}")
    for one in statement.sums:
        since = f", on which {one.rounds_since:,} later round(s) stand" if one.rounds_since else ""
        fact("stays", f"in the sum of round {one.round} of federation {one.federation[:12]}{since}")
    verified = isinstance(keys, PublicKeys)
    return {"kind": "withdrawal", **statement.model_dump(mode="json"), "verified": verified, "checked": checked}


def _keys_of(thing: Thing, issuer: str) -> PublicKeys | str:
    """Return the issuer's keys, or why there are none to check its signatures with."""
    store, own = thing.names.store, thing.names.own
    if store is None:
        return "signatures not checked: --keys names no keys folder with its issuer's card"
    if own is not None and own.fingerprint == issuer:
        return own
    try:
        return store.require(issuer, now=thing.now)
    except Untrusted as error:
        return f"signatures not checked: {error}"


def show_card(thing: Thing) -> dict[str, object]:
    """A card is told.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    keys = read_card(read_plain(thing.path, CARD_LIMIT_BYTES))
    say(f"card {thing.name}; {_CARD}")
    return {"kind": "card", **_card(thing, keys), "verified": True, "checked": _CARD}


def show_keys(thing: Thing) -> dict[str, object]:
    """A keys folder is told: its card, how many private keys lie there, and who is pinned.

    Raises:
        BadKey: when it is open to others.
        ArtefactError: with the subclass of the check that failed.
    """
    check_folder(thing.path)
    keys = read_card(read_private(thing.path / CARD_NAME, CARD_LIMIT_BYTES, what="card"))
    num_private = sum(path.suffix == ".pem" for path in thing.path.iterdir())
    say(f"keys folder {thing.name}: never send it; the card in it is what others get")
    told = _card(thing, keys)
    fact("private keys", f"{num_private} files, locked by the passphrase, not opened")
    pinned = {peer.keys.fingerprint: peer for peer in TrustStore(thing.path).peers()}
    if pinned:
        rows("pinned", ["name", "state", "fingerprint"], [
            [peer.keys.name, peer.state(now=thing.now), fingerprint] for fingerprint, peer in pinned.items()
        ])  # fmt: skip
    states = {fingerprint: peer.state(now=thing.now) for fingerprint, peer in pinned.items()}
    return {"kind": "keys", **told, "private_keys": num_private, "pinned": states, "verified": True, "checked": _CARD}


def show_invitation(thing: Thing) -> dict[str, object]:
    """An invitation is told: by whom, to what, where, until when.

    Raises:
        ArtefactError: with the subclass of the check that failed; a date that has passed is told, not refused.
    """
    found = parse_invitation(read_plain(thing.path, INVITATION_LIMIT_BYTES))
    stated = found.invitation
    say(f"invitation {thing.name}; checked: {_CARD}")
    facts(
        {
            "title": stated.title or None,
            "owner": thing.names.told(found.owner.fingerprint),
            "on its card": found.owner.name,
            "job": stated.job_id or "none yet",
            "client": None if stated.client is None else thing.names.told(stated.client),
            "package": stated.package_digest,
            "where": stated.url or "sealed folders beside the invitation",
            "certificate": None if stated.url is None else "its own, trusted alone" if stated.certificate else "usual",
            "created": when(stated.created, thing.now),
            "expires": ends(stated.expires, thing.now),
        }
    )
    told = stated.model_dump(mode="json", exclude={"card", "certificate"})
    told |= {"owner": found.owner.fingerprint, "expired": thing.now > stated.expires}
    return {"kind": "invitation", "digest": found.digest, **told, "verified": True, "checked": _CARD}


def _card(thing: Thing, keys: PublicKeys) -> dict[str, object]:
    facts(
        {
            "name": keys.name,
            "fingerprint": thing.names.told(keys.fingerprint),
            "created": when(keys.created, thing.now),
            "expires": ends(keys.expires, thing.now),
        }
    )
    return {
        "name": keys.name,
        "fingerprint": keys.fingerprint,
        "created": keys.created,
        "expires": keys.expires,
        "expired": thing.now >= keys.expires,
    }
