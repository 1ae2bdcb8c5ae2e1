"""A TPM 2.0's quote, read strictly: every length within bounds, every byte accounted for, one algorithm each.

A quote is TPMS_ATTEST of type TPM_ST_ATTEST_QUOTE. It says, signed by a key that never leaves the TPM: the PCRs
selected had values with this digest, and whoever asked gave this nonce. Nothing here knows which key to trust.

Source: TCG TPM 2.0 Library, part 2, sections 10.12 (attestation), 11.2 and 11.3 (signatures); part 3, TPM2_Quote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from offsite.errors import BadSchema, BadSignature

NUM_PCRS: Final = 24
FEWEST_RSA_BITS: Final = 2048

_MAGIC = 0xFF544347  # TPM_GENERATED_VALUE: only the TPM itself signs what begins so
_QUOTE = 0x8018
_SHA256 = 0x000B
_RSASSA, _ECDSA = 0x0014, 0x0018
_MOST_NAME, _MOST_DATA = 68, 66

Key = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Quote:
    """What a quote says.

    Attributes:
        nonce: what whoever asked gave (``extraData``).
        pcrs: numbers of the PCRs of the SHA-256 bank that were selected, ascending.
        pcr_digest: SHA-256 over their values, in that order.
        reset_count: how often the TPM was reset: once for each boot.
        safe: whether the clock was never set back.
        firmware: the TPM's own version.
    """

    nonce: bytes
    pcrs: tuple[int, ...]
    pcr_digest: bytes
    reset_count: int
    safe: bool
    firmware: int


class _Reader:
    """Bytes taken from the front; never beyond the end."""

    def __init__(self, raw: bytes, what: str) -> None:
        self.rest, self.what = raw, what

    def take(self, num: int) -> bytes:
        if num > len(self.rest):
            raise BadSchema(f"{self.what}: ends {num - len(self.rest)} byte(s) too early")
        found, self.rest = self.rest[:num], self.rest[num:]
        return found

    def number(self, num: int) -> int:
        return int.from_bytes(self.take(num), "big")

    def sized(self, most: int, field: str) -> bytes:
        num = self.number(2)
        if num > most:
            raise BadSchema(f"{self.what}: {field} of {num} bytes, at most {most} are allowed")
        return self.take(num)

    def end(self) -> None:
        if self.rest:
            raise BadSchema(f"{self.what}: {len(self.rest)} byte(s) after its end")


def is_made_by_tpm(raw: bytes) -> bool:
    """Whether the bytes begin as what a TPM made itself, which TPMS_ATTEST does and its signature does not."""
    return raw[:4] == _MAGIC.to_bytes(4, "big")


def read_quote(raw: bytes) -> Quote:
    """Return what the bytes of TPMS_ATTEST say. Nothing is verified.

    Raises:
        BadSchema: when they are no quote of the SHA-256 bank, cut short, or longer than it.
    """
    reader = _Reader(raw, "quote")
    if reader.number(4) != _MAGIC:
        raise BadSchema("quote: does not begin as what a TPM made itself")
    if (kind := reader.number(2)) != _QUOTE:
        raise BadSchema(f"quote: of type 0x{kind:04x}, expected 0x{_QUOTE:04x}, a quote of PCRs")
    reader.sized(_MOST_NAME, "the signer's name")
    nonce = reader.sized(_MOST_DATA, "the nonce")
    reader.take(8)  # clock
    reset_count, _ = reader.number(4), reader.number(4)
    safe = reader.number(1)
    if safe > 1:
        raise BadSchema("quote: 'safe' is neither yes nor no")
    firmware = reader.number(8)
    if (num := reader.number(4)) != 1:
        raise BadSchema(f"quote: PCRs of {num} banks, expected one: sha256")
    if (bank := reader.number(2)) != _SHA256:
        raise BadSchema(f"quote: PCRs of bank 0x{bank:04x}, expected 0x{_SHA256:04x}, sha256")
    num = reader.number(1)
    if num != NUM_PCRS // 8:
        raise BadSchema(f"quote: {num} bytes of selected PCRs, expected {NUM_PCRS // 8}")
    mask = reader.take(num)
    pcrs = tuple(one for one in range(NUM_PCRS) if mask[one // 8] >> (one % 8) & 1)
    if not pcrs:
        raise BadSchema("quote: no PCR is selected")
    digest = reader.sized(64, "the PCRs' digest")
    if len(digest) != 32:
        raise BadSchema(f"quote: a digest of {len(digest)} bytes over the PCRs, expected 32, SHA-256")
    reader.end()
    return Quote(nonce, pcrs, digest, reset_count, bool(safe), firmware)


def require_signed(key: Key, attest: bytes, signature: bytes) -> None:
    """Return only if TPMT_SIGNATURE is this key's over the bytes of the quote: RSASSA or ECDSA, with SHA-256.

    Raises:
        BadSchema: when the signature is cut short or longer than it.
        BadSignature: when it is of another algorithm or hash, the key is of another kind, or it does not verify.
    """
    reader = _Reader(signature, "the quote's signature")
    scheme, digest = reader.number(2), reader.number(2)
    if scheme not in (_RSASSA, _ECDSA) or digest != _SHA256:
        raise BadSignature(
            f"the quote's signature is of scheme 0x{scheme:04x} with hash 0x{digest:04x}, "
            "expected RSASSA or ECDSA with SHA-256",
            hint="tpm2_quote -g sha256; the attestation key decides on the scheme",
        )
    is_rsa = scheme == _RSASSA
    if is_rsa != isinstance(key, rsa.RSAPublicKey):
        raise BadSignature("the quote's signature is of another kind of key than the policy's")
    try:
        if isinstance(key, rsa.RSAPublicKey):
            raw = reader.sized(1024, "its value")
            reader.end()
            key.verify(raw, attest, padding.PKCS1v15(), SHA256())
        else:
            r, s = (int.from_bytes(reader.sized(66, "its value"), "big") for _ in range(2))
            reader.end()
            key.verify(encode_dss_signature(r, s), attest, ec.ECDSA(SHA256()))
    except InvalidSignature:
        raise BadSignature("the quote was not signed by the attestation key that the policy pins") from None
