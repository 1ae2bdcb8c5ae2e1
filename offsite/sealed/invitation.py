"""The invitation: one file by which an owner tells a client where its job is, and whom the client then deals with.

It holds the owner's card, the job (or, for a client whose card is not pinned yet, the package alone), and the address
and certificate of an exchange, or neither: then what was sealed lies beside it. It is signed by the keys of the card in
it and holds no secret. Whose card that is, only the fingerprint tells, compared over another channel: until then an
invitation is a claim. Nothing of the job or package is taken from it but digests that they are held to.
"""

from __future__ import annotations

import base64
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, model_validator

from offsite.artefacts.job import JOB_ID_PATTERN, LATEST_SECOND
from offsite.artefacts.layout import Line
from offsite.audits.canaries import words_of
from offsite.digests import DIGEST_PATTERN, sha256_bytes
from offsite.errors import BadSchema, ConfigError, Expired, TooLarge
from offsite.keys.files import read_limited
from offsite.keys.identity import FINGERPRINT_PATTERN, Identity, PublicKeys, Signatures, read_card
from offsite.keys.trust import MAX_SKEW_SECONDS
from offsite.staging import staged_file
from offsite.strictjson import Strict, parse_strict

INVITATION_FORMAT: Final = "offsite/invitation/1"
INVITATION_LIMIT_BYTES = 256 * 2**10
CERTIFICATE_LIMIT_BYTES = 32 * 2**10
URL_PATTERN = r"^https?://[A-Za-z0-9.:\[\]-]{1,255}/?$"

_PURPOSE = "invitation"


class Invitation(Strict):
    """What the owner signs. Times are seconds since 1970; ``card`` is the owner's in base64.

    Of a job there are its id, digest and client, all three or none. ``certificate`` is the PEM that the exchange at
    ``url`` must show; without one the usual authorities count.
    """

    title: Line = ""
    card: str = Field(max_length=64 * 2**10)
    package_digest: str = Field(pattern=DIGEST_PATTERN)
    job_id: str | None = Field(None, pattern=JOB_ID_PATTERN)
    job_digest: str | None = Field(None, pattern=DIGEST_PATTERN)
    client: str | None = Field(None, pattern=FINGERPRINT_PATTERN)
    url: str | None = Field(None, pattern=URL_PATTERN)
    certificate: str | None = Field(None, max_length=CERTIFICATE_LIMIT_BYTES, pattern=r"^[\x0a\x0d\x20-\x7e]*$")
    created: int = Field(ge=0, le=LATEST_SECOND)
    expires: int = Field(ge=0, le=LATEST_SECOND)

    @model_validator(mode="after")
    def _belongs_together(self) -> Invitation:
        if len({self.job_id is None, self.job_digest is None, self.client is None}) > 1:
            raise ValueError("a job has an id, a digest and a client, all three")
        if self.certificate is not None and self.url is None:
            raise ValueError("a certificate without an exchange")
        if self.expires <= self.created:
            raise ValueError("expires is not after created")
        return self


class _File(Strict):
    format: Literal["offsite/invitation/1"] = INVITATION_FORMAT
    body: str
    signatures: dict[str, str]


@dataclass(frozen=True)
class Invited:
    """An invitation whose signatures are those of the card in it; `owner` is whoever holds that card's keys."""

    invitation: Invitation
    owner: PublicKeys
    digest: str


def write_invitation(out: Path, invitation: Invitation, identity: Identity) -> str:
    """The file `out` holds the invitation, signed; return the digest of its bytes.

    Raises:
        ConfigError: when `out` exists, or the certificate is none.
        RunFailed: when the disk is full.
    """
    _check_certificate(invitation)
    body = json.dumps(invitation.model_dump(mode="json"), sort_keys=True, ensure_ascii=True).encode("ascii")
    signatures = identity.sign(_PURPOSE, body).to_json()
    file = _File(body=base64.b64encode(body).decode(), signatures=signatures)
    raw = json.dumps(file.model_dump(mode="json"), sort_keys=True, indent=1).encode("ascii") + b"\n"
    with staged_file(out) as stage:
        stage.write_bytes(raw)
        stage.chmod(0o644)
    return sha256_bytes(raw)


def parse_invitation(raw: bytes) -> Invited:
    """Return what the file's bytes say, once the card in it and its signatures are sound. Dates are not looked at.

    Raises:
        TooLarge: when it is over `INVITATION_LIMIT_BYTES`.
        WrongBinding: when it is of another format.
        BadSchema: when it does not have the form of an invitation.
        BadKey: when the card in it is none.
        BadSignature: when it was not signed by the keys of the card in it.
    """
    if len(raw) > INVITATION_LIMIT_BYTES:
        raise TooLarge(f"invitation of {len(raw)} bytes, limit {INVITATION_LIMIT_BYTES}")
    file = parse_strict(raw, _File, "invitation", {"format": INVITATION_FORMAT})
    body = _decoded(file.body, "body")
    found = parse_strict(body, Invitation, "invitation", {})
    owner = read_card(_decoded(found.card, "card"))
    owner.verify(_PURPOSE, body, Signatures.from_json(file.signatures))
    try:
        _check_certificate(found)
    except ConfigError as error:
        raise BadSchema(f"invitation: {error}") from None
    return Invited(found, owner, sha256_bytes(raw))


def read_invitation(path: Path, *, now: int) -> Invited:
    """Return the invitation in a file, which counts at that moment.

    Args:
        now: Unix seconds.

    Raises:
        BadKey: when there is no such file, or the card in it is none.
        Expired: when its date is past, or still to come.
        TooLarge, WrongBinding, BadSchema, BadSignature: as `parse_invitation`.
    """
    found = parse_invitation(read_limited(path, INVITATION_LIMIT_BYTES, what="invitation"))
    if now > found.invitation.expires or now + MAX_SKEW_SECONDS < found.invitation.created:
        when = "is past its date" if now > found.invitation.expires else "is dated in the future: check this clock"
        raise Expired(f"invitation {path.name!r} {when}", hint="ask the owner for a new one")
    return found


def fingerprint_words(fingerprint: str) -> list[str]:
    """Return the words that say the same as a fingerprint's letters: 32, one for each byte of its hash.

    Read out, they are harder to get wrong than letters. The list is offsite's own (`offsite/audits/wordlist.py`).
    """
    letters = fingerprint.replace("-", "").upper()
    return words_of(base64.b32decode(letters + "=" * (-len(letters) % 8))).split()


def _decoded(text: str, what: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raise BadSchema(f"invitation: {what} is not base64") from None
    if base64.b64encode(raw).decode() != text:
        raise BadSchema(f"invitation: {what} is not base64 in its one form")
    return raw


def _check_certificate(invitation: Invitation) -> None:
    """Raises ConfigError when there is a certificate that is none."""
    if invitation.certificate is None:
        return
    try:
        ssl.create_default_context(cadata=invitation.certificate)
    except (ssl.SSLError, ValueError):
        raise ConfigError("the certificate is not one in PEM") from None
