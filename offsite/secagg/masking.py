"""Masks of secure aggregation: one for each pair of clients, which cancel in the sum, and one of each client's own.

A pair's seed comes from an X25519 agreement of two keys made for this round; the one of the two whose fingerprint sorts
first adds the pair's mask, the other subtracts it. Every seed has its full 256 bits, is bound by HKDF-SHA256 to the
federation, the round and the parties, and is the key of one ChaCha20 stream, which is cut into numbers of the modulus's
width: modulo a power of two, no number is likelier than another.

Sources: Bonawitz et al. 2017, https://doi.org/10.1145/3133956.3133982, section 4; RFC 7748 (X25519), RFC 5869 (HKDF),
RFC 8439 (ChaCha20).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from secrets import token_bytes
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from offsite.errors import BadKey
from offsite.secagg.fixedpoint import Encoding, Numbers

KEY_BYTES = 32
PIECE_NUMBERS = 2**15  # of the stream at a time: what a mask needs in memory does not grow with the vector

_LABEL: Final = "offsite/v1/secagg/"
_ZERO_NONCE = bytes(16)  # each key is used for one stream; the first four bytes are the block counter
_ADD, _SUBTRACT = 1, -1


@dataclass(frozen=True)
class Context:
    """The round that keys are derived for.

    Attributes:
        federation: its id, without zero bytes.
        round: its number.
    """

    federation: str
    round: int

    def derive(self, secret: bytes, purpose: str, *parties: str) -> bytes:
        """Return 32 bytes that follow from `secret` for this purpose, round and parties, in that order."""
        info = "\0".join([_LABEL + purpose, self.federation, str(self.round), *parties]).encode("ascii")
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def new_secret() -> bytes:
    """Return 32 bytes from the operating system: a self-mask's seed or an X25519 private key."""
    return token_bytes(KEY_BYTES)


def public_of(private: bytes) -> bytes:
    """Return the X25519 public key of a raw private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes) -> bytes:
    """Return the secret that the holders of these two keys share; never used but through `Context.derive`.

    Raises:
        BadKey: when `public` is not 32 bytes, or a point of small order, with which every secret is zero.
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise BadKey("a key of this round is not a sound X25519 key") from None


def commit(seed: bytes, context: Context, party: str) -> str:
    """Return what shows later that `seed` was this party's self-mask seed, and says nothing of it before, in hex."""
    return context.derive(seed, "self-commitment", party).hex()


def add_self_mask(vector: Numbers, seed: bytes, context: Context, party: str, encoding: Encoding) -> None:
    """Add to `vector`, in place, the mask that only the seed's holders can take off."""
    _add_stream(vector, context.derive(seed, "self-mask", party), encoding, _ADD)


def subtract_self_mask(vector: Numbers, seed: bytes, context: Context, party: str, encoding: Encoding) -> None:
    """Undo `add_self_mask`."""
    _add_stream(vector, context.derive(seed, "self-mask", party), encoding, _SUBTRACT)


def add_pairwise_masks(
    vector: Numbers,
    private: bytes,
    party: str,
    peers: Mapping[str, bytes],
    context: Context,
    encoding: Encoding,
) -> None:
    """Add to `vector`, in place, what `party` adds for each peer; over both of a pair that comes to zero.

    Args:
        private: the party's masking key, raw.
        peers: masking public keys by fingerprint, without the party itself.

    Raises:
        BadKey: as `agree`; the vector is then not fit for use.
    """
    for peer, public in peers.items():
        first, second = sorted((party, peer))
        key = context.derive(agree(private, public), "pairwise-mask", first, second)
        _add_stream(vector, key, encoding, _ADD if party == first else _SUBTRACT)


def mask_stream(key: bytes, num_numbers: int, encoding: Encoding) -> Iterator[Numbers]:
    """Yield the numbers of a key's stream in pieces of at most `PIECE_NUMBERS`: little end first, from block 0 on."""
    encryptor = Cipher(ChaCha20(key, _ZERO_NONCE), mode=None).encryptor()
    zeros = bytes(PIECE_NUMBERS * encoding.num_bytes)
    for start in range(0, num_numbers, PIECE_NUMBERS):
        count = min(PIECE_NUMBERS, num_numbers - start)
        yield encoding.from_bytes(encryptor.update(zeros[: count * encoding.num_bytes]))


def _add_stream(vector: Numbers, key: bytes, encoding: Encoding, sign: int) -> None:
    start = 0
    for piece in mask_stream(key, len(vector), encoding):
        part = vector[start : start + len(piece)]
        if sign == _ADD:
            np.add(part, piece, out=part)  # unsigned numbers wrap modulo 2**64, of which the modulus is a divisor
        else:
            np.subtract(part, piece, out=part)
        encoding.reduce(part)
        start += len(piece)
