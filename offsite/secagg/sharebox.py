"""Encrypted shares from one client to another: the owner carries them and cannot read them.

A box holds the receiver's shares of the sender's two secrets. Its key comes from an X25519 agreement of keys made for
this round and is bound by HKDF-SHA256 to the federation, the round, the sender and the receiver in that order, so that
each direction of each pair has a key of its own, used for one box. Cipher: ChaCha20-Poly1305 (RFC 8439).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from offsite.errors import BadEncryption
from offsite.secagg.masking import Context, agree
from offsite.secagg.shamir import SHARE_BYTES, read_share

BOX_BYTES = 2 * SHARE_BYTES + 16

_ZERO_NONCE = bytes(12)  # each key encrypts one box


@dataclass(frozen=True)
class SharePair:
    """One holder's shares of a client's two secrets; whoever gives away both gives away the client's update.

    Attributes:
        self_mask: of the self-mask's seed.
        masking_key: of the private key that pairwise masks come from.
    """

    self_mask: bytes = field(repr=False)
    masking_key: bytes = field(repr=False)


def seal_shares(
    pair: SharePair, private: bytes, public: bytes, context: Context, *, sender: str, receiver: str
) -> bytes:
    """Return the box, `BOX_BYTES` long, that the holder of `public` can open.

    Raises:
        BadKey: when `public` is not sound.
    """
    key = context.derive(agree(private, public), "share-box", sender, receiver)
    return ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, pair.self_mask + pair.masking_key, None)


def open_shares(
    box: bytes, private: bytes, public: bytes, context: Context, *, sender: str, receiver: str
) -> SharePair:
    """Return the shares in a box that `sender`, who holds `public`, sealed for `receiver` in this round.

    Raises:
        BadKey: when `public` is not sound.
        BadEncryption: when it was sealed by or for another, in another round, or was changed.
        BadSchema: when what is in it are not shares.
    """
    key = context.derive(agree(private, public), "share-box", sender, receiver)
    try:
        opened = ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, box, None)
    except (InvalidTag, ValueError):
        raise BadEncryption(f"the shares from {sender[:9]} do not open: changed, or sealed for another") from None
    pair = SharePair(opened[:SHARE_BYTES], opened[SHARE_BYTES:])
    for share in (pair.self_mask, pair.masking_key):
        read_share(share)
    return pair
