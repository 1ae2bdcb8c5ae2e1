from __future__ import annotations

import random

import numpy as np
import pytest
import secagg_round as s
import torch

from offsite.digests import sha256_bytes
from offsite.errors import (
    ArtefactError,
    BadDigest,
    BadKey,
    BadSchema,
    BadSignature,
    ConfigError,
    NormTooLarge,
    Replayed,
    RunFailed,
    TooLarge,
    Untrusted,
    WrongBinding,
    WrongNames,
    WrongShape,
)
from offsite.secagg.fixedpoint import decode_tensors
from offsite.secagg.messages import (
    Answer,
    Keys,
    Masked,
    Shares,
    Statement,
    make_message,
    open_signed,
    read_envelope,
    sign_message,
    split_masked,
    to_text,
    write_masked,
)
from offsite.strictjson import write_compact
from server.aggregation.secagg import ServerRound, ServerStage


def check_total(arena, total, contributors):
    """The sum is that of the encoded updates to the last bit, and that of the updates up to half a step for each."""
    assert total.contributors == tuple(sorted(contributors))
    terms = arena.terms
    exact = decode_tensors(arena.expected(contributors), terms.shapes, terms.encoding, len(contributors))
    for name, tensor in total.tensors.items():
        assert torch.equal(tensor, exact[name])
        plain = sum(arena.updates[one][name].double() for one in contributors)
        assert (tensor - plain).abs().max() <= len(contributors) * terms.encoding.step / 2 + 1e-12


@pytest.mark.parametrize(
    ("num", "threshold", "bits"), [(2, 2, 32), (3, 2, 64), (3, 3, 48), (5, 3, 32), (7, 5, 48), (10, 7, 64)]
)
def test_the_sum_of_all_is_exact(num, threshold, bits):
    arena = s.Arena(num, threshold, bits=bits)
    check_total(arena, arena.run(), arena.names)
    assert arena.owner.refused == []


@pytest.mark.parametrize("seed", range(40))
def test_any_clients_may_drop_out_at_any_stage_as_long_as_enough_last(seed):
    """Up to num - threshold clients leave, each at a random step; those whose vectors came are in the sum."""
    source = random.Random(seed)
    num = source.choice([3, 4, 5, 6])
    threshold = source.randint(num // 2 + 1, num - 1)
    arena = s.Arena(num, threshold, bits=source.choice([32, 48, 64]))
    leavers = source.sample(arena.names, source.randint(1, num - threshold))
    left_at = {name: source.choice(s.STEPS) for name in leavers}
    lost = {step: {name for name in leavers if s.STEPS.index(left_at[name]) <= s.STEPS.index(step)} for step in s.STEPS}
    contributors = [name for name in arena.names if left_at.get(name) not in ("advertise", "share", "mask")]
    check_total(arena, arena.run(lost), contributors)


@pytest.mark.parametrize("step", s.STEPS)
def test_exactly_the_threshold_lasts_from_any_stage_on(step):
    arena = s.Arena(5, 3)
    gone = set(arena.names[1:3])
    lost = dict.fromkeys(s.STEPS[s.STEPS.index(step) :], gone)
    in_sum = step in ("confirm", "reveal")
    check_total(arena, arena.run(lost), arena.names if in_sum else sorted(set(arena.names) - gone))


@pytest.mark.parametrize("step", s.STEPS)
def test_below_the_threshold_there_is_no_sum(step):
    arena = s.Arena(5, 3)
    inbox = arena.inbox_for(step)
    stage = arena.owner.stage
    with pytest.raises(RunFailed, match=f"ends at stage {stage}: 2 clients answered, the threshold is 3"):
        arena.step(step, inbox, lost=arena.names[2:])
    for call in (arena.owner.total, arena.owner.close, lambda: arena.owner.take(b"")):
        with pytest.raises(RunFailed):
            call()
    assert arena.owner.stage is ServerStage.FAILED
    assert repr(arena.owner) == "ServerRound(round 3, failed)"


def test_there_is_no_sum_before_the_end():
    arena = s.Arena(3, 2)
    inbox = dict.fromkeys(arena.names, b"")
    for step in s.STEPS:
        with pytest.raises(RunFailed, match=f"has no sum: it is at stage {arena.owner.stage}"):
            arena.owner.total()
        inbox = arena.step(step, inbox)
    assert arena.owner.stage is ServerStage.DONE
    with pytest.raises(RunFailed, match="which is done"):
        arena.owner.take(b"")
    with pytest.raises(RunFailed, match="is done"):
        arena.owner.close()


def test_settings():
    cards = {s.party(n).public.fingerprint: s.party(n).public for n in range(4)}
    with pytest.raises(ConfigError, match="threshold 2 is not over half of 4 members"):
        ServerRound(s.terms_of(4, 2), cards)
    with pytest.raises(ConfigError, match="missing, or another's"):
        ServerRound(s.terms_of(5, 3), cards)
    with pytest.raises(ConfigError, match="missing, or another's"):
        ServerRound(s.terms_of(4, 3), {**cards, s.party(2).public.fingerprint: s.party(3).public})


# Wrong messages: every row makes one client's message at a stage wrong and has its class. The others finish without it.


def signed_by(arena, name, cls, **content):
    return write_compact(sign_message(make_message(cls, arena.terms, **content), arena.identities[name]))


def opened(arena, raw, cls):
    return open_signed(read_envelope(raw, arena.terms), cls, arena.terms, arena.cards).model_dump(
        exclude={"format", "federation", "round", "terms", "stage"}
    )


def rewritten(cls, change):
    def make(arena, name, raw):
        content = opened(arena, raw, cls)
        change(arena, name, content)
        return signed_by(arena, name, cls, **content)

    return make


def masked(view=None, sha256=None, vector=None):
    def make(arena, name, raw):
        found = vector or split_masked(raw, arena.terms)[1]
        content = {"view": view or arena.owner._view, "sha256": sha256 or sha256_bytes(found)}
        return write_masked(sign_message(make_message(Masked, arena.terms, **content), arena.identities[name]), found)

    return make


def stranger(arena, name, raw):
    keys = make_message(Keys, arena.terms, masking_key=to_text(b"k" * 32), sharing_key=to_text(b"o" * 32))
    return write_compact(sign_message(keys, s.party(9)))


def as_sender(arena, name, raw):
    return raw.replace(name.encode(), arena.names[0].encode(), 1)


def drop_one(field):
    return lambda arena, name, content: content[field].pop(min(content[field]))


def set_(field, value):
    return lambda arena, name, content: content.update({field: value})


ZERO = "sha256:" + "0" * 64
WEAK = to_text(bytes(32))
WRONG = {
    "no message": ("advertise", lambda *_: b"hello", BadSchema),
    "too large": ("advertise", lambda arena, *_: b" " * (arena.terms.limit_bytes + 1), TooLarge),
    "a stranger's": ("advertise", stranger, Untrusted),
    "another's name": ("advertise", as_sender, BadSignature),
    "a changed byte": ("advertise", lambda a, n, raw: raw.replace(b"masking_key", b"masking-key"), BadSignature),
    "one key twice": (
        "advertise",
        rewritten(Keys, lambda a, n, c: c.update(masking_key=c["sharing_key"])),
        BadKey,
    ),
    "a weak key": ("advertise", rewritten(Keys, set_("masking_key", WEAK)), BadKey),
    "a key not canonical": ("advertise", rewritten(Keys, set_("sharing_key", to_text(b"\xff" * 32))), BadKey),
    "another's key": (
        "advertise",
        rewritten(Keys, lambda a, n, c: c.update(masking_key=a.owner._keys[a.names[0]].masking_key)),
        BadKey,
    ),
    "shares for too few": ("share", rewritten(Shares, drop_one("boxes")), WrongNames),
    "shares for itself": (
        "share",
        rewritten(Shares, lambda a, n, c: c["boxes"].update({n: "A" * 110 + "=="})),
        WrongNames,
    ),
    "shares for another roster": ("share", rewritten(Shares, set_("roster", ZERO)), WrongBinding),
    "a message of another stage": ("share", lambda a, n, raw: signed_by(a, n, Statement, view=ZERO), WrongBinding),
    "masked for others": ("mask", masked(view=ZERO), WrongBinding),
    "another vector": ("mask", masked(sha256=ZERO), BadDigest),
    "a short vector": ("mask", lambda a, n, raw: raw[:-4], WrongShape),
    "a vector changed after": ("mask", lambda a, n, raw: raw[:-4] + b"\0" * 4, BadDigest),
    "another list": ("confirm", rewritten(Statement, set_("view", ZERO)), WrongBinding),
    "too few shares": ("reveal", rewritten(Answer, drop_one("self_masks")), WrongNames),
    "both shares": (
        "reveal",
        rewritten(Answer, lambda a, n, c: c["masking_keys"].update(c["self_masks"])),
        WrongNames,
    ),
    "a share out of range": (
        "reveal",
        rewritten(Answer, lambda a, n, c: c["self_masks"].update({n: to_text(b"\xff" * 33)})),
        BadSchema,
    ),
}


@pytest.mark.parametrize("row", WRONG)
def test_a_wrong_message_counts_as_not_sent(row):
    step, make, error = WRONG[row]
    arena = s.Arena(4, 3)
    inbox = arena.inbox_for(step)
    liar = arena.names[-1]
    replies = {name: arena.answer(step, name, raw) for name, raw in inbox.items()}
    for name in arena.names[:-1]:
        assert arena.owner.take(replies[name]) == name
    wrong = make(arena, liar, replies[liar])
    assert wrong != replies[liar]
    with pytest.raises(ArtefactError) as caught:
        arena.owner.take(wrong)
    assert type(caught.value) is error
    inbox = arena.owner.close()
    for later in s.STEPS[s.STEPS.index(step) + 1 :]:
        inbox = arena.step(later, inbox, lost=[liar])
    in_sum = step in ("confirm", "reveal")
    check_total(arena, arena.owner.total(), arena.names if in_sum else arena.names[:-1])


@pytest.mark.parametrize("step", s.STEPS)
def test_a_second_message_is_refused_and_the_first_counts(step):
    arena = s.Arena(3, 2)
    inbox = arena.inbox_for(step)
    replies = [arena.answer(step, name, raw) for name, raw in inbox.items()]
    inbox = arena.owner.advance([*replies, replies[0]])
    assert [type(error) for error in arena.owner.refused] == [Replayed]
    for later in s.STEPS[s.STEPS.index(step) + 1 :]:
        inbox = arena.step(later, inbox)
    check_total(arena, arena.owner.total(), arena.names)


def test_who_dropped_out_does_not_come_back():
    arena = s.Arena(4, 3)
    inbox = arena.inbox_for("share")
    gone, vector = arena.names[0], bytes(arena.terms.num_vector_bytes)
    inbox = arena.step("share", inbox, lost=[gone])
    with pytest.raises(Untrusted, match="has dropped out"):
        arena.owner.take(masked(vector=vector)(arena, gone, b""))
    for step in ("mask", "confirm", "reveal"):
        inbox = arena.step(step, inbox)
    check_total(arena, arena.owner.total(), arena.names[1:])


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("field", ["self_masks", "masking_keys"])
def test_shares_that_do_not_give_back_what_was_committed_to_are_refused(field, spare):
    """Seen with shares to spare, because they disagree, and without, by the commitment or the public key."""
    arena = s.Arena(4 + spare, 3)
    gone = {arena.names[-1]}
    lost = {"mask": gone, "confirm": gone}
    inbox = arena.inbox_for("reveal", lost)
    replies = {name: arena.answer("reveal", name, raw) for name, raw in inbox.items()}
    liar = arena.names[0]
    content = opened(arena, replies[liar], Answer)
    content[field] = {member: to_text(b"\0" * 33) for member in content[field]}
    replies[liar] = signed_by(arena, liar, Answer, **content)
    with pytest.raises(BadDigest, match="do not agree" if spare else "do not give back"):
        arena.owner.advance(replies.values())
    with pytest.raises(RunFailed):
        arena.owner.total()
    assert arena.owner.stage is ServerStage.FAILED


def test_a_sum_beyond_the_limit_is_refused():
    arena = s.Arena(3, 2)
    for update in arena.updates.values():
        update.update({name: torch.zeros_like(tensor) for name, tensor in update.items()})
    inbox = arena.inbox_for("mask")
    replies = {name: arena.answer("mask", name, raw) for name, raw in inbox.items()}
    liar, encoding = arena.names[0], arena.terms.encoding
    numbers = encoding.from_bytes(split_masked(replies[liar], arena.terms)[1])
    numbers[5] += np.uint64(3 * encoding.largest + 1)
    replies[liar] = masked(vector=encoding.to_bytes(encoding.reduce(numbers)))(arena, liar, replies[liar])
    inbox = arena.step("confirm", arena.owner.advance(replies.values()))
    with pytest.raises(NormTooLarge, match="beyond what 3 values within 2 add up to"):
        arena.step("reveal", inbox)
    with pytest.raises(RunFailed):
        arena.owner.total()


def test_masks_of_two_rounds_differ_though_the_updates_do_not(monkeypatch):
    vectors = []
    for number in (3, 4):
        s.seed_secrets(monkeypatch, 1)  # even with the same secrets: the round is in every derived key
        arena = s.Arena(3, 2, round=number)
        inbox = arena.inbox_for("mask")
        arena.step("mask", inbox, lost=arena.names[2:])
        vectors.append(arena.owner._sum.tolist())
    assert not set(vectors[0]) & set(vectors[1])


def test_the_owner_holds_one_vector_however_many_clients():
    arena = s.Arena(6, 4)
    arena.inbox_for("confirm")
    arrays = [value for value in vars(arena.owner).values() if hasattr(value, "nbytes")]
    assert [array.shape for array in arrays] == [(22,)]
    assert not any(isinstance(value, (bytes, bytearray)) for value in vars(arena.owner).values())
