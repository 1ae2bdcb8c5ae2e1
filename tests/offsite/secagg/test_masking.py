from __future__ import annotations

import hashlib
import hmac
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from offsite.errors import BadKey
from offsite.secagg import masking
from offsite.secagg.fixedpoint import BITS, Encoding
from offsite.secagg.masking import (
    PIECE_NUMBERS,
    Context,
    add_pairwise_masks,
    add_self_mask,
    agree,
    commit,
    mask_stream,
    new_secret,
    public_of,
    subtract_self_mask,
)

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "secagg" / "masks.json").read_bytes())
CONTEXT = Context("0123456789abcdef0123456789abcdef", 7)
ALICE, BOB, CAROL = ("-".join([letter * 4] * 13) for letter in "abc")
KEYS = {name: bytes([number]) * 32 for number, name in enumerate((ALICE, BOB, CAROL), start=1)}
PUBLIC = {name: public_of(key) for name, key in KEYS.items()}
SEED = bytes(range(32))


def others(name):
    return {peer: key for peer, key in PUBLIC.items() if peer != name}


def self_masked(encoding, num, **changes):
    given = {"seed": SEED, "context": CONTEXT, "party": ALICE, **changes}
    vector = np.zeros(num, np.uint64)
    add_self_mask(vector, **given, encoding=encoding)
    return vector


def pairwise(encoding, num, name, peers, context=CONTEXT, key=None):
    vector = np.zeros(num, np.uint64)
    add_pairwise_masks(vector, key or KEYS[name], name, peers, context, encoding)
    return vector


def as_hex(encoding, vector):
    return encoding.to_bytes(vector).hex()


# The oracle: both algorithms as their RFCs write them, and nothing of offsite.


def hkdf(secret: bytes, info: bytes) -> bytes:
    return hmac.digest(hmac.digest(bytes(32), secret, "sha256"), info + b"\x01", "sha256")


def chacha20(key: bytes, num_bytes: int) -> bytes:
    turn = lambda word, by: (word << by | word >> 32 - by) & 0xFFFFFFFF  # noqa: E731
    quarters = [(n, n + 4, n + 8, n + 12) for n in range(4)]
    quarters += [(n, 4 + (n + 1) % 4, 8 + (n + 2) % 4, 12 + (n + 3) % 4) for n in range(4)]
    found = b""
    for block in range(-(-num_bytes // 64)):
        start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), block, 0, 0, 0]
        x = list(start)
        for _ in range(10):
            for a, b, c, d in quarters:
                for one, two, three, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                    x[one] = (x[one] + x[two]) & 0xFFFFFFFF
                    x[three] = turn(x[three] ^ x[one], by)
        found += struct.pack("<16I", *((one + two) & 0xFFFFFFFF for one, two in zip(x, start, strict=True)))
    return found[:num_bytes]


def test_the_oracle_is_chacha20():
    """RFC 8439, A.1, test vector 1 and 2."""
    assert chacha20(bytes(32), 80).hex().startswith("76b8e0ada0f13d90405d6ae55386bd28")
    assert chacha20(bytes(32), 80)[64:].hex() == "9f07e7be5551387a98ba977c732d080d"


@pytest.mark.parametrize("bits", BITS)
def test_masks_are_the_streams_that_the_rfcs_say(bits):
    encoding, width = Encoding(1.0, bits, 2), bits // 8
    context = f"{CONTEXT.federation}\0{CONTEXT.round}\0".encode()
    key = hkdf(SEED, b"offsite/v1/secagg/self-mask\0" + context + ALICE.encode())
    assert encoding.to_bytes(self_masked(encoding, 40)) == chacha20(key, 40 * width)
    shared = agree(KEYS[BOB], PUBLIC[ALICE])
    key = hkdf(shared, b"offsite/v1/secagg/pairwise-mask\0" + context + f"{ALICE}\0{BOB}".encode())
    stream = [int.from_bytes(part, "little") for part in struct.unpack(f"{width}s" * 40, chacha20(key, 40 * width))]
    assert pairwise(encoding, 40, ALICE, {BOB: PUBLIC[BOB]}).tolist() == stream
    assert pairwise(encoding, 40, BOB, {ALICE: PUBLIC[ALICE]}).tolist() == [-n % 2**bits for n in stream]


@pytest.mark.parametrize("bits", BITS)
def test_masks_of_the_frozen_vector(bits):
    encoding, expected = Encoding(1.0, bits, 2), VECTORS[str(bits)]
    assert as_hex(encoding, self_masked(encoding, 8)) == expected["self"]
    for name in KEYS:
        assert as_hex(encoding, pairwise(encoding, 8, name, others(name))) == expected["pairwise"][name[0]]
    long = encoding.to_bytes(self_masked(encoding, PIECE_NUMBERS * 2 + 5))
    assert hashlib.sha256(long).hexdigest() == expected["long_sha256"]
    assert commit(SEED, CONTEXT, ALICE) == VECTORS["commitment"]


@pytest.mark.parametrize("bits", BITS)
def test_pairwise_masks_cancel_and_self_masks_come_off(bits):
    encoding = Encoding(1.0, bits, 3)
    parts = [pairwise(encoding, 1000, name, others(name)) for name in KEYS]
    assert all(part.any() for part in parts)
    assert not encoding.reduce(parts[0] + parts[1] + parts[2]).any()
    vector = self_masked(encoding, 1000)
    assert vector.any()
    subtract_self_mask(vector, SEED, CONTEXT, ALICE, encoding)
    assert not vector.any()


def test_every_party_round_federation_and_purpose_has_masks_of_its_own():
    encoding = Encoding(1.0, 64, 3)
    later, elsewhere = Context(CONTEXT.federation, 8), Context("f" * 32, 7)
    alone = {BOB: PUBLIC[BOB]}
    masks = [
        self_masked(encoding, 64),
        self_masked(encoding, 64, context=later),
        self_masked(encoding, 64, context=elsewhere),
        self_masked(encoding, 64, party=BOB),
        self_masked(encoding, 64, seed=SEED[::-1]),
        pairwise(encoding, 64, ALICE, alone),
        pairwise(encoding, 64, ALICE, alone, context=later),
        pairwise(encoding, 64, ALICE, alone, context=elsewhere),
        pairwise(encoding, 64, ALICE, {CAROL: PUBLIC[BOB]}),  # the same agreed secret, another peer
        pairwise(encoding, 64, CAROL, {BOB: PUBLIC[BOB]}, key=KEYS[ALICE]),
    ]
    numbers = np.concatenate([mask if mask[0] < 2**63 else 0 - mask for mask in masks])
    assert len(np.unique(numbers)) == len(numbers)


def test_a_round_and_a_federation_do_not_run_into_each_other():
    keys = [Context("a", 11).derive(SEED, "x", "b"), Context("a", 1).derive(SEED, "x", "1", "b")]
    assert keys[0] != keys[1]


def test_pieces_are_one_stream_and_memory_does_not_grow_with_the_vector():
    encoding = Encoding(1.0, 32, 2)
    num = 3 * PIECE_NUMBERS + 17
    pieces = list(mask_stream(SEED, num, encoding))
    assert [len(piece) for piece in pieces] == [PIECE_NUMBERS] * 3 + [17]
    assert encoding.to_bytes(np.concatenate(pieces))[:256] == chacha20(SEED, 256)
    peaks = []
    for size in (4 * PIECE_NUMBERS, 32 * PIECE_NUMBERS):
        vector = np.zeros(size, np.uint64)
        tracemalloc.start()
        add_self_mask(vector, SEED, CONTEXT, ALICE, encoding)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 4 * 8 * PIECE_NUMBERS
    assert abs(peaks[0] - peaks[1]) < 2**16


def test_a_commitment_says_which_seed_it_was():
    found = {
        commit(SEED, CONTEXT, ALICE),
        commit(SEED, CONTEXT, BOB),
        commit(SEED[::-1], CONTEXT, ALICE),
        commit(SEED, Context(CONTEXT.federation, 8), ALICE),
    }
    assert len(found) == 4


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), bytes(31), bytes(33), b""])
def test_weak_or_malformed_keys_are_refused(public):
    with pytest.raises(BadKey, match="not a sound X25519 key"):
        agree(KEYS[ALICE], public)


def test_secrets_come_from_the_operating_system(monkeypatch):
    assert len({new_secret() for _ in range(4)}) == 4
    asked = []
    monkeypatch.setattr(masking, "token_bytes", lambda size: asked.append(size) or bytes(size))
    assert (new_secret(), asked) == (bytes(32), [32])
