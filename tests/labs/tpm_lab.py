"""A TPM's quotes, made with keys of our own by the letter of the TCG's structures: no TPM is here, none is claimed."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

VALUES = {0: "a0" * 32, 2: "b2" * 32, 7: "c7" * 32, 11: "0b" * 32}


def sized(raw):
    return struct.pack(">H", len(raw)) + raw


def selection(pcrs, *, bank=0x000B, num=3):
    mask = bytearray(num)
    for one in pcrs:
        mask[one // 8] |= 1 << (one % 8)
    return struct.pack(">HB", bank, num) + bytes(mask)


@dataclass
class Quoted:
    """The fields of TPMS_ATTEST; tests change one of them."""

    nonce: bytes
    magic: int = 0xFF544347
    kind: int = 0x8018
    signer: bytes = b"\x00\x0b" + b"\x11" * 32
    pcrs: tuple[int, ...] = tuple(VALUES)
    banks: list[bytes] | None = None
    digest: bytes | None = None
    safe: int = 1
    after: bytes = b""
    values: dict[int, str] = field(default_factory=lambda: dict(VALUES))

    def raw(self):
        digest = self.digest
        if digest is None:
            digest = hashlib.sha256(b"".join(bytes.fromhex(self.values[one]) for one in sorted(self.pcrs))).digest()
        banks = [selection(self.pcrs)] if self.banks is None else self.banks
        head = struct.pack(">IH", self.magic, self.kind) + sized(self.signer) + sized(self.nonce)
        clock = struct.pack(">QIIBQ", 123_456, 17, 3, self.safe, 0x2023_0101)
        return head + clock + struct.pack(">I", len(banks)) + b"".join(banks) + sized(digest) + self.after


def attestation_key(kind):
    return rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())


def pem(key):
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


def signed(key, raw, *, scheme=None, digest=0x000B):
    """TPMT_SIGNATURE over the bytes."""
    if isinstance(key, rsa.RSAPrivateKey):
        value = key.sign(raw, padding.PKCS1v15(), hashes.SHA256())
        return struct.pack(">HH", scheme or 0x0014, digest) + sized(value)
    r, s = decode_dss_signature(key.sign(raw, ec.ECDSA(hashes.SHA256())))
    parts = (one.to_bytes(32, "big") for one in (r, s))
    return struct.pack(">HH", scheme or 0x0018, digest) + b"".join(map(sized, parts))


def policy(key, values=None):
    """The content of a policy that pins this key and these values."""
    stated = {str(number): value for number, value in (VALUES if values is None else values).items()}
    return {"format": "offsite/attestation-policy/1", "kind": "tpm2-quote", "ak": pem(key), "pcrs": stated}
