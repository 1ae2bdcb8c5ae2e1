"""``keys.json``: the data keys of a sealed artefact, wrapped for each recipient. It lies outside the signed manifest.

A wrap is one HPKE ciphertext over the data keys of all files, bound to the manifest's digest and to the recipient's
fingerprint. A recipient who moves to a new key wraps them anew and touches nothing else; because the signed manifest
names the old key, the wrap then carries a *rotation*: a statement that both keys sign, for this one manifest. The old
key alone could name a stranger's, who would then take for addressed to him what was not.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Final, Literal

from pydantic import Field

from offsite.errors import BadEncryption, BadSchema, BadSignature, TooLarge, WrongRecipient
from offsite.keys.identity import FINGERPRINT_PATTERN, Identity, PublicKeys, Signatures, read_card
from offsite.sealed.manifest import MAX_FILES, MAX_RECIPIENTS, SealedManifest
from offsite.strictjson import Strict, parse_strict, write_compact

KEYS_FORMAT: Final = "offsite/keys/1"
KEYS_LIMIT_BYTES = 2**20
ROTATION_PURPOSE = "rotation"
DATA_KEY_BYTES = 32

_LABEL = b"offsite/v1/data-keys\0"
_WRAP_LIMIT = 4 * (1120 + 16 + DATA_KEY_BYTES * MAX_FILES) // 3 + 4

Fingerprint = Annotated[str, Field(pattern=FINGERPRINT_PATTERN)]


class SignaturePair(Strict):
    """Both signatures, base64."""

    ed25519: str = Field(max_length=8192)
    mldsa65: str = Field(max_length=8192)


class Rotation(Strict):
    """That the recipient named in the manifest now receives with another key, signed by the old one and the new."""

    named: Fingerprint
    card: str = Field(max_length=64 * 2**10)
    by_named: SignaturePair
    by_recipient: SignaturePair


class Wrap(Strict):
    """The data keys for one recipient; ``rotation`` only when the manifest names an earlier key of theirs."""

    recipient: Fingerprint
    wrapped: str = Field(max_length=_WRAP_LIMIT)
    rotation: Rotation | None = None


class KeysFile(Strict):
    """The content of ``keys.json``."""

    format: Literal["offsite/keys/1"] = KEYS_FORMAT
    wraps: tuple[Wrap, ...] = Field(min_length=1, max_length=MAX_RECIPIENTS)


def read_keys(raw: bytes) -> KeysFile:
    """Return what ``keys.json`` holds.

    Raises:
        TooLarge: when it is over `KEYS_LIMIT_BYTES`.
        BadSchema, WrongBinding: when it has another form or format, or two wraps for one recipient.
    """
    if len(raw) > KEYS_LIMIT_BYTES:
        raise TooLarge(f"keys.json: over {KEYS_LIMIT_BYTES} bytes")
    found = parse_strict(raw, KeysFile, "keys.json", {"format": KEYS_FORMAT})
    if write_keys(found.wraps) != raw:
        raise BadSchema("keys.json is not written in the one form it has")
    if len({wrap.recipient for wrap in found.wraps}) != len(found.wraps):
        raise BadSchema("keys.json holds two wraps for one recipient")
    return found


def write_keys(wraps: Sequence[Wrap]) -> bytes:
    """Return the bytes of ``keys.json``."""
    return write_compact(KeysFile(wraps=tuple(wraps)))


def wrap_keys(keys: Sequence[bytes], digest: str, recipient: PublicKeys, rotation: Rotation | None = None) -> Wrap:
    """Return the data keys of the manifest with that digest, readable by `recipient` alone."""
    wrapped = recipient.wrap(b"".join(keys), _info(digest, recipient.fingerprint))
    return Wrap(recipient=recipient.fingerprint, wrapped=base64.b64encode(wrapped).decode("ascii"), rotation=rotation)


def unwrap_keys(found: KeysFile, manifest: SealedManifest, digest: str, identity: Identity) -> list[bytes]:
    """Return the data keys in the order of the manifest's files.

    Args:
        digest: of the manifest's exact bytes.

    Raises:
        WrongRecipient: when there is no wrap for `identity`, the manifest does not name it, or it does not open.
        BadSignature: when a rotation is not signed by the key that the manifest names and by `identity`.
        BadEncryption: when what was wrapped is not a key for each file.
    """
    own = identity.public.fingerprint
    wrap = next((wrap for wrap in found.wraps if wrap.recipient == own), None)
    if wrap is None:
        raise WrongRecipient(
            f"this {manifest.kind} is sealed for another key than {own[:9]}",
            hint="is --keys the folder it was meant for?",
        )
    if own not in manifest.recipients:
        _check_rotation(wrap, manifest, digest, identity.public)
    elif wrap.rotation is not None:
        raise BadSchema("keys.json holds a rotation for a key that the manifest names itself")
    joined = identity.unwrap(_decode(wrap.wrapped, "keys.json"), _info(digest, own))
    if len(joined) != DATA_KEY_BYTES * len(manifest.files):
        raise BadEncryption(f"keys.json wraps {len(joined)} bytes, the manifest has {len(manifest.files)} files")
    return [joined[start : start + DATA_KEY_BYTES] for start in range(0, len(joined), DATA_KEY_BYTES)]


def rotate(manifest: SealedManifest, digest: str, old: Identity, new: Identity) -> Rotation:
    """Return the statement that `old`, whom the manifest names, now receives with `new`; both sign it.

    Raises:
        WrongRecipient: when the manifest does not name `old`, or names `new` already.
    """
    named, own = old.public.fingerprint, new.public.fingerprint
    if named not in manifest.recipients:
        raise WrongRecipient(
            f"this {manifest.kind} does not name key {named[:9]}", hint="rewrap the folder as its issuer sealed it"
        )
    if own in manifest.recipients:
        raise WrongRecipient(f"this {manifest.kind} names key {own[:9]} already", hint="open it as it is")
    statement = _statement(digest, named, own)
    return Rotation(
        named=named,
        card=base64.b64encode(old.public.card).decode("ascii"),
        by_named=SignaturePair(**old.sign(ROTATION_PURPOSE, statement).to_json()),
        by_recipient=SignaturePair(**new.sign(ROTATION_PURPOSE, statement).to_json()),
    )


def _check_rotation(wrap: Wrap, manifest: SealedManifest, digest: str, own: PublicKeys) -> None:
    rotation = wrap.rotation
    if rotation is None or rotation.named not in manifest.recipients:
        raise WrongRecipient(f"this {manifest.kind} does not name key {own.fingerprint[:9]} as a recipient")
    named = read_card(_decode(rotation.card, "keys.json"))
    if named.fingerprint != rotation.named:
        raise BadSignature("keys.json: the rotation shows another card than that of the key it names")
    statement = _statement(digest, rotation.named, own.fingerprint)
    named.verify(ROTATION_PURPOSE, statement, Signatures.from_json(rotation.by_named.model_dump()))
    own.verify(ROTATION_PURPOSE, statement, Signatures.from_json(rotation.by_recipient.model_dump()))


def _statement(digest: str, named: str, recipient: str) -> bytes:
    return "\0".join([digest, named, recipient]).encode("ascii")


def _info(digest: str, recipient: str) -> bytes:
    return _LABEL + bytes.fromhex(digest.removeprefix("sha256:")) + recipient.encode("ascii")


def _decode(text: str, what: str) -> bytes:
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if not found or base64.b64encode(found).decode("ascii") != text:
        raise BadSchema(f"{what} holds a field that is not base64")
    return found
