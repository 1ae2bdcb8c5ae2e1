from __future__ import annotations

import json

import pytest
import secagg_round as s

from offsite.errors import (
    ArtefactError,
    BadSchema,
    BadSignature,
    Replayed,
    TooLarge,
    Untrusted,
    WrongBinding,
    WrongShape,
)
from offsite.sealed.recipients import SignaturePair
from offsite.secagg.messages import (
    Keys,
    Masked,
    Signed,
    Statement,
    Survivors,
    from_text,
    make_message,
    open_signed,
    read_envelope,
    read_message,
    roster_digest,
    sign_message,
    split_masked,
    to_text,
    view_digest,
    write_masked,
)
from offsite.strictjson import write_compact

TERMS = s.terms_of(3, 2)
MEMBERS = {s.party(number).public.fingerprint: s.party(number).public for number in range(3)}
ALICE, BOB = s.party(0), s.party(1)
DIGEST = "sha256:" + "0" * 64
KEY, OTHER_KEY = to_text(b"k" * 32), to_text(b"o" * 32)


def keys(terms=TERMS, **changes):
    return make_message(Keys, terms, **{"masking_key": KEY, "sharing_key": OTHER_KEY, **changes})


def received(message=None, identity=ALICE):
    return read_envelope(write_compact(sign_message(message or keys(), identity)), TERMS)


def test_what_a_client_signs_is_what_is_read():
    signed = received()
    assert signed.sender == ALICE.public.fingerprint
    assert open_signed(signed, Keys, TERMS, MEMBERS) == keys()


def other_signature(signed):
    return signed.model_copy(update={"signatures": received(keys(masking_key=OTHER_KEY)).signatures})


def with_body(body):
    """That body, truly signed by Alice."""
    pair = SignaturePair(**ALICE.sign("secagg", body.encode()).to_json())
    return Signed(sender=ALICE.public.fingerprint, body=body, signatures=pair)


def restated(**fields):
    return with_body(json.dumps({**keys().model_dump(mode="json"), **fields}))


@pytest.mark.parametrize(
    ("signed", "error", "said"),
    [
        (received(identity=s.party(9)), Untrusted, "not a known member"),
        (received().model_copy(update={"sender": BOB.public.fingerprint}), BadSignature, "secagg does not verify"),
        (received().model_copy(update={"body": received().body + " "}), BadSignature, "secagg does not verify"),
        (other_signature(received()), BadSignature, "secagg does not verify"),
        (received(make_message(Statement, TERMS, view=DIGEST)), WrongBinding, "stage is statement, expected keys"),
        (received(keys(s.terms_of(3, 2, federation="f" * 32))), WrongBinding, "another federation"),
        (received(keys(s.terms_of(3, 2, round=2))), Replayed, "of round 2, this is round 3"),
        (received(keys(s.terms_of(3, 2, round=4))), WrongBinding, "of round 4 under other terms"),
        (received(keys(s.terms_of(3, 3))), WrongBinding, "of round 3 under other terms"),
        (with_body("[]"), BadSchema, "not a JSON object"),
        (with_body(received().body.replace("{", '{"round":3,', 1)), BadSchema, "distinct keys"),
        (restated(more=1), BadSchema, "more"),
        (restated(round="3"), BadSchema, "round"),
        (restated(round=True), BadSchema, "round"),
        (restated(masking_key="A" * 44), BadSchema, "masking_key"),
        (restated(masking_key=KEY + "\n"), BadSchema, "masking_key"),
        (restated(sharing_key=""), BadSchema, "sharing_key"),
        (restated(format="offsite/secagg/2"), WrongBinding, "format is offsite/secagg/2"),
    ],
)
def test_messages_that_are_not_this_members_in_this_round(signed, error, said):
    with pytest.raises(ArtefactError, match=said) as caught:
        open_signed(signed, Keys, TERMS, MEMBERS)
    assert type(caught.value) is error


def test_a_signature_for_another_purpose_does_not_count():
    signed = received()
    pair = SignaturePair(**ALICE.sign("manifest", signed.body.encode()).to_json())
    with pytest.raises(BadSignature):
        open_signed(signed.model_copy(update={"signatures": pair}), Keys, TERMS, MEMBERS)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", BadSchema),
        (b"\xff\xfe", BadSchema),
        (b'{"sender": "x"}', BadSchema),
        (write_compact(received())[:-9], BadSchema),
        (write_compact(received()).replace(b'"body":"', b'"body":"\\u0000'), BadSchema),
        (write_compact(received()).replace(b'"body":"', b'"body":"\\ud800'), BadSchema),
        (write_compact(received()).replace(b'"body":', b'"body":"x","body":'), BadSchema),
        (b" " * (TERMS.limit_bytes + 1), TooLarge),
    ],
)
def test_bytes_that_are_no_message(raw, error):
    with pytest.raises(ArtefactError) as caught:
        read_envelope(raw, TERMS)
    assert type(caught.value) is error


def test_the_owners_messages_are_bound_as_well():
    told = make_message(Survivors, TERMS, survivors=TERMS.members)
    assert read_message(write_compact(told), Survivors, TERMS) == told
    earlier = s.terms_of(3, 2, round=1)
    for terms, error in ((earlier, Replayed), (s.terms_of(3, 2, bits=48), WrongBinding)):
        with pytest.raises(error):
            read_message(write_compact(make_message(Survivors, terms, survivors=())), Survivors, TERMS)
    with pytest.raises(TooLarge, match=f"limit {TERMS.limit_bytes}"):
        read_message(b"{" * (TERMS.limit_bytes + 1), Survivors, TERMS)


def test_a_masked_vector_follows_its_line():
    vector = bytes(range(10, 98))  # holds line ends of its own
    signed = sign_message(make_message(Masked, TERMS, view=DIGEST, sha256=DIGEST), ALICE)
    raw = write_masked(signed, vector)
    assert split_masked(raw, TERMS) == (signed, vector)
    for wrong, error in (
        (raw[:-1], WrongShape),
        (raw + b"\0", WrongShape),
        (vector, BadSchema),
        (b"", BadSchema),
        (b"x" * (TERMS.num_vector_bytes + 2**14), BadSchema),
        (raw + bytes(2**14), TooLarge),
    ):
        with pytest.raises(ArtefactError) as caught:
            split_masked(wrong, TERMS)
        assert type(caught.value) is error


def test_digests_tell_every_difference_and_no_order():
    first, second, third = MEMBERS
    roster = {first: keys(), second: keys(masking_key=OTHER_KEY, sharing_key=KEY)}
    assert roster_digest(roster) == roster_digest(dict(reversed(roster.items())))
    assert roster_digest(roster) != roster_digest({first: keys(), second: keys()})
    assert roster_digest(roster) != roster_digest({first: keys(), third: roster[second]})
    views = [
        view_digest(DIGEST, [first, second]),
        view_digest(DIGEST, [first, second], [first, second]),
        view_digest(DIGEST, [first, second], [first]),
        view_digest(DIGEST, [first, second], []),
        view_digest(DIGEST, [first, second, third], [first]),
        view_digest(DIGEST[::-1], [first, second]),
    ]
    assert len(set(views)) == len(views)
    assert views[0] == view_digest(DIGEST, [second, first])


def test_base64_has_one_form():
    assert from_text(KEY) == b"k" * 32
    with pytest.raises(BadSchema, match="canonical"):
        from_text("A" * 42 + "B=")
