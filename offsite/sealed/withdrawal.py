"""The owner's signed statement that it took one client's adapter out again, and of what cannot be taken back.

One JSON file: the statement as the text that was signed, and both signatures over it. It names things by digest alone,
no file, folder or host, and is fit to be handed to the client. What it says is the owner's word; that the owner said
it, the signatures show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from offsite.artefacts.job import JOB_ID_PATTERN, LATEST_SECOND
from offsite.digests import DIGEST_PATTERN
from offsite.errors import BadSignature
from offsite.keys.identity import Identity, PublicKeys, Signatures
from offsite.sealed.recipients import Fingerprint, SignaturePair
from offsite.strictjson import Strict, parse_strict, write_compact

WITHDRAWAL_FORMAT: Literal["offsite/withdrawal/1"] = "offsite/withdrawal/1"
WITHDRAWAL_LIMIT_BYTES = 2**20
SIGN_PURPOSE = "withdrawal"

Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]


class Sum(Strict):
    """One finished round of a federation whose sum holds the bundle, as do all rounds after it."""

    federation: str = Field(pattern=r"^[0-9a-f]{32}$")
    round: int = Field(ge=1, le=10_000)
    rounds_since: int = Field(ge=0, le=10_000)


class Statement(Strict):
    """What the owner says.

    Attributes:
        bundle: digest of the sealed bundle as the client sent it; `bundle_digest` is of the plain one.
        client, issuer: fingerprints.
        created: Unix seconds.
        was: what had become of the bundle before.
        removed: digests of the manifests of the adapted folders that were deleted.
        model_checked: the full model was read, and its digest is still the one the package was made of.
        sums: of federations, from which a part cannot be taken back.
    """

    issuer: Fingerprint
    client: Fingerprint
    created: int = Field(ge=0, le=LATEST_SECOND)
    bundle: Digest
    bundle_digest: Digest
    job_id: str = Field(pattern=JOB_ID_PATTERN)
    round: int = Field(ge=1, le=10_000)
    package_digest: Digest
    base_digest: Digest
    was: Literal["accepted", "plugged-in", "served", "withdrawn"]
    removed: tuple[Digest, ...] = Field(max_length=4096)
    model_checked: bool
    sums: tuple[Sum, ...] = Field(max_length=4096)


class _Signed(Strict):
    format: Literal["offsite/withdrawal/1"] = WITHDRAWAL_FORMAT
    statement: str = Field(max_length=WITHDRAWAL_LIMIT_BYTES, pattern=r"^[\x20-\x7e]+$")
    signatures: SignaturePair


def write_withdrawal(statement: Statement, identity: Identity) -> bytes:
    """Return the file, signed by `identity`."""
    body = write_compact(statement).rstrip(b"\n")
    pair = SignaturePair(**identity.sign(SIGN_PURPOSE, body).to_json())
    return write_compact(_Signed(statement=body.decode("ascii"), signatures=pair))


def read_withdrawal(raw: bytes) -> tuple[Statement, Callable[[PublicKeys], None]]:
    """Return what the file states, and what checks that its issuer, whose keys it is given, signed it.

    The latter raises `BadSignature` when the keys are another's, or either signature does not fit.

    Raises:
        BadSchema: when it has another form.
        WrongBinding: when it is of another format.
    """
    signed = parse_strict(raw, _Signed, "withdrawal", {"format": WITHDRAWAL_FORMAT})
    body = signed.statement.encode("ascii")
    statement = parse_strict(body, Statement, "withdrawal", {})

    def verify(keys: PublicKeys) -> None:
        if keys.fingerprint != statement.issuer:
            raise BadSignature("the withdrawal names another issuer than these keys'")
        keys.verify(SIGN_PURPOSE, body, Signatures.from_json(signed.signatures.model_dump()))

    return statement, verify
