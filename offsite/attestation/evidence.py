"""What a report states of the machine that issued it: nothing, or evidence that somebody else can verify.

``{"kind": "none"}`` is a statement as well: signed, and the default. Evidence is quoted as the platform's own tools
gave it; it counts for nothing until it is verified against an auditor's policy (`offsite.attestation.policy`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Annotated, Final, Literal

from pydantic import Field

from offsite.errors import BadSchema
from offsite.strictjson import Strict

MOST_BYTES: Final = 4096
"""No quote and no signature of a TPM is larger: its structures end below two kilobytes."""

_LABEL = b"offsite/v1/attested-report\0"

Encoded = Annotated[str, Field(min_length=4, max_length=4 * -(-MOST_BYTES // 3), pattern=r"^[A-Za-z0-9+/]*={0,2}$")]


class NoAttestation(Strict):
    """No evidence: whose keys signed is known, and nothing of the machine or the program."""

    kind: Literal["none"] = "none"


class TpmQuote(Strict):
    """A quote of a TPM 2.0 and its signature, each in base64 as ``tpm2_quote -m`` and ``-s`` write them."""

    kind: Literal["tpm2-quote"] = "tpm2-quote"
    attest: Encoded
    signature: Encoded

    @property
    def parts(self) -> tuple[bytes, bytes]:
        """The bytes of TPMS_ATTEST and of TPMT_SIGNATURE.

        Raises:
            BadSchema: when one is not base64 in its one form.
        """
        return _decoded(self.attest, "attest"), _decoded(self.signature, "signature")


Attestation = Annotated[NoAttestation | TpmQuote, Field(discriminator="kind")]


def nonce_for(body: bytes) -> bytes:
    """Return the 32 bytes that evidence about a report with this body must hold, so that it fits no other."""
    return hashlib.sha256(_LABEL + body).digest()


def quoted(attest: bytes, signature: bytes) -> TpmQuote:
    """Return the quote as a report states it."""
    return TpmQuote(attest=base64.b64encode(attest).decode(), signature=base64.b64encode(signature).decode())


def _decoded(text: str, what: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error:
        raw = b""
    if not raw or base64.b64encode(raw).decode() != text:
        raise BadSchema(f"attestation: {what} is not base64 in its one form")
    return raw
