from __future__ import annotations

import pytest

from offsite.errors import BadEncryption, BadKey, BadSchema
from offsite.secagg.masking import Context, public_of
from offsite.secagg.shamir import split_secret
from offsite.secagg.sharebox import BOX_BYTES, SharePair, open_shares, seal_shares

CONTEXT = Context("federation", 7)
ALICE, BOB = bytes([1]) * 32, bytes([2]) * 32
PAIR = SharePair(split_secret(bytes(32), 2, [1, 2])[1], split_secret(b"\xff" * 32, 2, [1, 2])[2])


def sealed(pair=PAIR):
    return seal_shares(pair, ALICE, public_of(BOB), CONTEXT, sender="alice", receiver="bob")


def opened(box, key=BOB, peer=ALICE, context=CONTEXT, sender="alice", receiver="bob"):
    return open_shares(box, key, public_of(peer), context, sender=sender, receiver=receiver)


def test_the_receiver_reads_what_was_sealed():
    assert len(sealed()) == BOX_BYTES
    assert opened(sealed()) == PAIR
    assert PAIR.self_mask not in sealed()
    assert PAIR.masking_key not in sealed()


@pytest.mark.parametrize(
    "changes",
    [
        {"sender": "bob"},
        {"receiver": "carol"},
        {"sender": "bob", "receiver": "alice"},
        {"context": Context("federation", 8)},
        {"context": Context("another", 7)},
        {"key": bytes([3]) * 32},
        {"peer": bytes([3]) * 32},
    ],
)
def test_a_box_opens_for_one_receiver_of_one_sender_in_one_round(changes):
    with pytest.raises(BadEncryption, match="do not open"):
        opened(sealed(), **changes)


@pytest.mark.parametrize("place", [0, 32, 33, 65, 66, BOX_BYTES - 1])
def test_a_changed_box_does_not_open(place):
    box = bytearray(sealed())
    box[place] ^= 1
    with pytest.raises(BadEncryption):
        opened(bytes(box))


@pytest.mark.parametrize("length", [0, 15, 16, BOX_BYTES - 1])
def test_a_cut_box_does_not_open(length):
    with pytest.raises(BadEncryption):
        opened(sealed()[:length])


@pytest.mark.parametrize("pair", [SharePair(b"\xff" * 33, bytes(33)), SharePair(bytes(33), bytes(32))])
def test_what_is_not_shares_is_refused(pair):
    with pytest.raises(BadSchema):
        opened(sealed(pair))


def test_a_weak_key_is_refused():
    with pytest.raises(BadKey):
        seal_shares(PAIR, ALICE, bytes(32), CONTEXT, sender="alice", receiver="bob")


def test_shares_are_not_printed():
    assert repr(PAIR) == "SharePair()"
