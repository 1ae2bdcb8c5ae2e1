from __future__ import annotations

import json
import math

import pytest
import secagg_round as s

from offsite.errors import ArtefactError, BadSchema, ConfigError, TooLarge, WrongBinding
from offsite.secagg.fixedpoint import TensorShape
from offsite.secagg.terms import MAX_NUMBERS, TERMS_LIMIT_BYTES, read_terms
from offsite.strictjson import write_compact

TERMS = s.terms_of(5, 3)


def test_terms_come_back_as_they_were_written():
    found = read_terms(write_compact(TERMS))
    assert found == TERMS
    assert found.digest == TERMS.digest
    assert (TERMS.encoding.num_summands, TERMS.encoding.bits, TERMS.num_vector_bytes) == (5, 32, 22 * 4)
    assert TERMS.places() == {member: place + 1 for place, member in enumerate(TERMS.members)}


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": "f" * 32},
        {"round": 4},
        {"members": [s.party(number).public.fingerprint for number in (0, 1, 2, 3, 5)]},
        {"threshold": 4},
        {"limit": 2.5},
        {"bits": 48},
        {"shapes": s.SHAPES[::-1]},
        {"shapes": (s.SHAPES[0], TensorShape(name="a.bias", shape=(7, 1)))},
        {"shapes": (s.SHAPES[0], TensorShape(name="c.bias", shape=(7,)))},
    ],
)
def test_the_digest_covers_every_term(changes):
    assert s.terms_of(5, 3, **changes).digest != TERMS.digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"members": [TERMS.members[0]] * 3}, "sorted and distinct"),
        ({"members": [TERMS.members[0]], "threshold": 2}, "members: "),
        ({"members": ["alice", "bob"]}, "members.0: "),
        ({"threshold": 6}, "threshold 6 is over the number of members, 5"),
        ({"threshold": 1}, "threshold: "),
        ({"limit": math.nan}, "limit: "),
        ({"limit": 0.0}, "limit is 0.0"),
        ({"bits": 33}, "bits: "),
        ({"federation": "A b"}, "federation: "),
        ({"federation": "a\0b"}, "federation: "),
        ({"round": -1}, "round: "),
        ({"shapes": ()}, "shapes: "),
        ({"shapes": (s.SHAPES[0], s.SHAPES[0])}, "two tensors have one name"),
        ({"shapes": (TensorShape(name="a", shape=(3, 0)),)}, "a tensor is empty"),
        ({"shapes": (TensorShape(name="a", shape=(-3, -2)),)}, "a tensor is empty"),
        ({"shapes": (TensorShape(name="a", shape=(MAX_NUMBERS + 1,)),)}, f"over {MAX_NUMBERS} numbers"),
        ({"more": 1}, "more: "),
    ],
)
def test_wrong_terms(changes, said):
    with pytest.raises(ConfigError, match=r"^terms of secure aggregation: ") as caught:
        s.terms_of(5, 3, **changes)
    assert said in str(caught.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError, match=r"round: .*; threshold: "):
        s.terms_of(5, 1, round=-1)


def changed(**fields):
    return json.dumps({**TERMS.model_dump(mode="json"), **fields}).encode()


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", BadSchema),
        (b"[]", BadSchema),
        (changed(threshold=9), BadSchema),
        (changed(members=list(TERMS.members[::-1])), BadSchema),
        (changed(round=3.0), BadSchema),
        (changed(other=1), BadSchema),
        (changed(format="offsite/secagg/2"), WrongBinding),
        (b" " * (TERMS_LIMIT_BYTES + 1), TooLarge),
    ],
)
def test_terms_from_the_other_side(raw, error):
    with pytest.raises(ArtefactError) as caught:
        read_terms(raw)
    assert type(caught.value) is error
