"""What a lying owner tries in a round of secure aggregation, and what it can make of all that it has.

Clients must refuse at the latest when they are asked for shares; until then nothing but masked numbers has left. The
statistical tests draw every secret from a seeded generator and the parties are fixed: they pass or fail for good.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import secagg_round as s
import torch
from scipy import stats

from client.federation.secagg import ClientRound, ClientStage
from offsite.errors import (
    BadEncryption,
    BadKey,
    BadSignature,
    OffsiteError,
    PolicyError,
    Replayed,
    RunFailed,
    Untrusted,
    WrongBinding,
)
from offsite.secagg.fixedpoint import TensorShape, encode_tensors
from offsite.secagg.masking import add_pairwise_masks, public_of, subtract_self_mask
from offsite.secagg.messages import (
    Answer,
    Delivery,
    Keys,
    Roster,
    Statement,
    Survivors,
    UnmaskRequest,
    from_text,
    make_message,
    open_signed,
    read_envelope,
    read_message,
    sign_message,
    split_masked,
    to_text,
)
from offsite.strictjson import write_compact

SIGNIFICANCE = 0.001


def retold(arena, cls, raw, **content):
    """The owner's message with some of its content replaced."""
    found = read_message(raw, cls, arena.terms)
    kept = {name: getattr(found, name) for name in cls.model_fields if name not in STATED}
    return write_compact(make_message(cls, arena.terms, **{**kept, **content}))


STATED = {"format", "federation", "round", "terms", "stage"}


def refuses(arena, step, name, raw, error, said):
    with pytest.raises(OffsiteError, match=said) as caught:
        arena.answer(step, name, raw)
    assert type(caught.value) is error
    assert arena.clients[name].stage is ClientStage.REFUSED
    assert not arena.clients[name]._sharers  # with the shares of everybody


# The roster


def keys_of(arena, raw):
    return {signed.sender: signed for signed in read_message(raw, Roster, arena.terms).keys}


def forged(arena, identity, sender, masking_key=None):
    """Keys whose private halves the owner knows, signed by `identity` in the name of `sender`."""
    keys = {"masking_key": to_text(masking_key or public_of(b"m" * 32)), "sharing_key": to_text(public_of(b"n" * 32))}
    return sign_message(make_message(Keys, arena.terms, **keys), identity).model_copy(update={"sender": sender})


def replaced(arena, signed, name):
    return {**signed, name: forged(arena, s.party(9), name)}


ROSTERS = {
    "a peer's key is replaced": (
        lambda a, k: replaced(a, k, a.names[2]),
        BadSignature,
        "does not verify",
    ),
    "a peer is invented": (
        lambda a, k: {**k, "x": forged(a, s.party(9), s.party(9).public.fingerprint)},
        Untrusted,
        "not a known member",
    ),
    "a member speaks for another": (
        lambda a, k: {**k, a.names[2]: forged(a, a.identities[a.names[3]], a.names[2])},
        BadSignature,
        "does not verify",
    ),
    "a peer stands there twice": (lambda a, k: {**k, "x": k[a.names[2]]}, WrongBinding, "twice"),
    "two peers have one key": (
        lambda a, k: {
            **k,
            a.names[1]: forged(a, a.identities[a.names[1]], a.names[1]),
            a.names[2]: forged(a, a.identities[a.names[2]], a.names[2]),
        },
        BadKey,
        "one key twice",
    ),
    "a peer in league with the owner has a weak key": (
        lambda a, k: {**k, a.names[1]: forged(a, a.identities[a.names[1]], a.names[1], b"\1" + bytes(31))},
        BadKey,
        "not sound",
    ),
    "a peer in league with the owner has a key in another form": (
        lambda a, k: {**k, a.names[1]: forged(a, a.identities[a.names[1]], a.names[1], b"\xff" * 32)},
        BadKey,
        "not sound",
    ),
    "this client is left out": (
        lambda a, k: {name: signed for name, signed in k.items() if name != a.names[0]},
        PolicyError,
        "does not hold the keys that this client sent",
    ),
    "fewer peers than the threshold": (
        lambda a, k: {name: k[name] for name in a.names[:2]},
        PolicyError,
        "only 2 clients take part, the threshold is 3",
    ),
}


@pytest.mark.parametrize("row", ROSTERS)
def test_a_roster_that_lies_is_refused(row):
    change, error, said = ROSTERS[row]
    arena = s.Arena(5, 3)
    raw = arena.inbox_for("share")[arena.names[0]]
    told = retold(arena, Roster, raw, keys=tuple(change(arena, keys_of(arena, raw)).values()))
    refuses(arena, "share", arena.names[0], told, error, said)


def test_keys_of_an_earlier_round_are_refused():
    """The owner may have learnt their private halves: a masking key is what it gets of a client that was lost."""
    earlier, arena = s.Arena(5, 3, round=2), s.Arena(5, 3)
    old = keys_of(earlier, earlier.inbox_for("share")[earlier.names[0]])
    raw = arena.inbox_for("share")[arena.names[0]]
    mixed = {**keys_of(arena, raw), arena.names[1]: old[arena.names[1]]}
    told = retold(arena, Roster, raw, keys=tuple(mixed.values()))
    refuses(arena, "share", arena.names[0], told, Replayed, "of round 2, this is round 3")


@pytest.mark.parametrize("step", s.STEPS[1:])
def test_the_owners_messages_of_an_earlier_round_are_refused(step):
    earlier, arena = s.Arena(4, 3, round=2), s.Arena(4, 3)
    old = earlier.inbox_for(step)[earlier.names[0]]
    arena.inbox_for(step)
    refuses(arena, step, arena.names[0], old, Replayed, "of round 2, this is round 3")


@pytest.mark.parametrize(
    ("step", "error", "said"),
    [
        ("share", PolicyError, "does not hold the keys that this client sent"),
        ("mask", BadEncryption, "do not open"),
        ("reveal", PolicyError, "was shown other clients or survivors"),
    ],
)
def test_messages_of_a_round_run_anew_under_the_same_number_do_not_mix(step, error, said):
    """Another run of round 3: its messages are well signed and bound, but hold other keys than this run's."""
    other, arena = s.Arena(4, 3), s.Arena(4, 3)
    foreign = other.inbox_for(step)[other.names[0]]
    arena.inbox_for(step)
    refuses(arena, step, arena.names[0], foreign, error, said)


def test_a_restarted_client_does_not_join_again():
    with pytest.raises(Replayed):
        s.Arena(4, 3, last_round=3)


def test_clients_told_other_terms_do_not_take_part_in_one_round():
    arena, others = s.Arena(4, 3), s.Arena(4, 3, limit=4.0)
    foreign = others.answer("advertise", others.names[0], b"")
    with pytest.raises(WrongBinding, match="under other terms"):
        arena.owner.take(foreign)


# The boxes


@pytest.mark.parametrize("kind", ["swapped", "own", "stranger's", "changed"])
def test_boxes_that_are_not_from_whom_the_owner_says_are_refused(kind):
    arena = s.Arena(4, 3)
    inbox = arena.inbox_for("mask")
    boxes = dict(read_message(inbox[arena.names[0]], Delivery, arena.terms).boxes)
    first, second = list(boxes)[:2]
    error, said = BadEncryption, "do not open"
    if kind == "swapped":
        boxes[first], boxes[second] = boxes[second], boxes[first]
    elif kind == "changed":
        boxes[first] = ("B" if boxes[first][0] != "B" else "C") + boxes[first][1:]
    else:
        boxes[arena.names[0] if kind == "own" else s.party(9).public.fingerprint] = boxes[first]
        error, said = WrongBinding, "not another client on the roster"
    refuses(arena, "mask", arena.names[0], retold(arena, Delivery, inbox[arena.names[0]], boxes=boxes), error, said)


def test_fewer_sharers_than_the_threshold_are_refused():
    arena = s.Arena(4, 3)
    inbox = arena.inbox_for("mask")
    boxes = dict(list(read_message(inbox[arena.names[0]], Delivery, arena.terms).boxes.items())[:1])
    told = retold(arena, Delivery, inbox[arena.names[0]], boxes=boxes)
    refuses(arena, "mask", arena.names[0], told, PolicyError, "only 2 clients shared their secrets")


# The survivors and the shares


@pytest.mark.parametrize("row", ["too few", "without this client", "stranger", "twice"])
def test_a_list_of_survivors_that_cannot_be_is_refused(row):
    arena = s.Arena(5, 3)
    raw = arena.inbox_for("confirm")[arena.names[0]]
    listed, error, said = {
        "too few": (arena.names[:2], PolicyError, "only 2 clients are left, the threshold is 3"),
        "without this client": (arena.names[1:], PolicyError, "leaves out this client"),
        "stranger": ((*arena.names, s.party(9).public.fingerprint), WrongBinding, "did not share secrets"),
        "twice": ((*arena.names, arena.names[1]), WrongBinding, "repeats a client"),
    }[row]
    refuses(arena, "confirm", arena.names[0], retold(arena, Survivors, raw, survivors=listed), error, said)


def split_view(arena, left_out):
    """The owner tells the clients of `left_out` that the last client was lost, and the others that it was not."""
    without = arena.names[:-1]
    inbox = arena.inbox_for("confirm")
    told = {name: retold(arena, Survivors, raw, survivors=without) for name, raw in inbox.items() if name in left_out}
    return {name: arena.answer("confirm", name, raw) for name, raw in {**inbox, **told}.items()}


def request(arena, statements, survivors):
    lost = tuple(name for name in arena.names if name not in survivors)
    signed = tuple(read_envelope(raw, arena.terms) for raw in statements)
    content = {"self_masks": tuple(survivors), "masking_keys": lost, "statements": signed}
    return write_compact(make_message(UnmaskRequest, arena.terms, **content))


def both_kinds(arena, left_out, colluders=()):
    """How many shares of the last client's two secrets the owner gets by telling two stories; colluders sign both."""
    replies = split_view(arena, left_out)
    stories = {name: arena.names[:-1] if name in left_out else arena.names for name in arena.names}
    kinds = {"self_masks": set(colluders), "masking_keys": set(colluders)}
    for name in set(arena.names) - set(colluders):
        signed = [replies[peer] for peer in arena.names if stories[peer] == stories[name] and peer not in colluders]
        signed += [view_signed(arena, name, peer) for peer in colluders]
        try:
            raw = arena.answer("reveal", name, request(arena, signed, stories[name]))
        except PolicyError:
            continue
        answer = open_signed(read_envelope(raw, arena.terms), Answer, arena.terms, arena.cards)
        for kind in kinds:
            if arena.names[-1] in getattr(answer, kind):
                kinds[kind].add(name)
    return {kind: len(holders) for kind, holders in kinds.items()}


def view_signed(arena, name, colluder):
    """What a client in league with the owner signs: whatever that client was shown."""
    statement = make_message(Statement, arena.terms, view=arena.clients[name]._view)
    return write_compact(sign_message(statement, arena.identities[colluder]))


@pytest.mark.parametrize(("num", "threshold"), [(4, 3), (5, 3)])
def test_different_lists_to_different_clients_never_give_both_kinds_of_share(num, threshold):
    """Every way of telling two stories, each with all the signatures there are: of one kind nobody gives a share."""
    for size in range(1, num):
        for left_out in itertools.combinations(
            [s.terms_of(num, threshold).members[place] for place in range(num - 1)], size
        ):
            found = both_kinds(s.Arena(num, threshold), left_out)
            assert min(found.values()) == 0


@pytest.mark.parametrize(("threshold", "caught"), [(3, False), (4, True)])
def test_the_threshold_that_holds_against_a_colluder_is_the_one_that_is_documented(threshold, caught):
    """One of five signs both stories. With 2 * 3 = 5 + 1 the owner gets both secrets of the last client, with 4 not."""
    arena = s.Arena(5, threshold)
    colluder, left_out = arena.names[0], arena.names[1:3]
    found = both_kinds(arena, left_out, [colluder])
    assert (min(found.values()) < threshold) is caught
    if caught:
        with pytest.raises(PolicyError):
            ClientRound(s.terms_of(5, 3), s.party(0), arena.cards, last_round=-1, colluders=1)
        ClientRound(s.terms_of(5, 4), s.party(0), arena.cards, last_round=-1, colluders=1)


def test_statements_of_another_list_are_noticed():
    arena = s.Arena(5, 3)
    left_out = arena.names[:2]
    replies = split_view(arena, left_out)
    told = request(arena, [replies[name] for name in arena.names[:-1]], arena.names[:-1])
    refuses(arena, "reveal", left_out[0], told, PolicyError, "was shown other clients or survivors")


def test_one_statement_many_times_is_one():
    arena = s.Arena(5, 3)
    raw = arena.inbox_for("reveal")[arena.names[0]]
    one = read_message(raw, UnmaskRequest, arena.terms).statements[0]
    told = retold(arena, UnmaskRequest, raw, statements=(one,) * 5)
    refuses(arena, "reveal", arena.names[0], told, PolicyError, "only 1 clients signed this list")


def test_a_statement_the_owner_made_up_does_not_count():
    arena = s.Arena(5, 3)
    raw = arena.inbox_for("reveal")[arena.names[0]]
    first, *rest = read_message(raw, UnmaskRequest, arena.terms).statements
    forged_one = first.model_copy(update={"sender": arena.names[4]})
    told = retold(arena, UnmaskRequest, raw, statements=(forged_one, *rest))
    refuses(arena, "reveal", arena.names[0], told, BadSignature, "does not verify")
    strange = sign_message(open_signed(first, Statement, arena.terms, arena.cards), s.party(9))
    told = retold(arena, UnmaskRequest, raw, statements=(strange, *rest))
    refuses(arena, "reveal", arena.names[1], told, PolicyError, "not among the survivors")


def test_too_few_statements_are_refused():
    arena = s.Arena(5, 3)
    raw = arena.inbox_for("reveal")[arena.names[0]]
    some = read_message(raw, UnmaskRequest, arena.terms).statements[:2]
    told = retold(arena, UnmaskRequest, raw, statements=some)
    refuses(arena, "reveal", arena.names[0], told, PolicyError, "only 2 clients signed this list of survivors")


@pytest.mark.parametrize("row", ["both", "the other kind", "fewer", "a living client's key"])
def test_shares_other_than_follow_from_the_survivors_are_refused(row):
    arena = s.Arena(5, 3)
    gone = arena.names[4]
    raw = arena.inbox_for("reveal", {"mask": {gone}, "confirm": {gone}})[arena.names[0]]
    living, target = arena.names[:4], arena.names[1]
    self_masks, masking_keys, said = {
        "both": (living, (gone, target), f"asks for both shares of {target[:9]}"),
        "the other kind": ((*living, gone), (), "other shares than follow"),
        "fewer": (living[1:], (gone,), "other shares than follow"),
        "a living client's key": (tuple(n for n in living if n != target), (gone, target), "other shares than follow"),
    }[row]
    told = retold(arena, UnmaskRequest, raw, self_masks=self_masks, masking_keys=masking_keys)
    refuses(arena, "reveal", arena.names[0], told, PolicyError, said)


def test_a_second_request_is_refused():
    """First the honest one, then the one that would complete what the owner wants of another client."""
    arena = s.Arena(5, 3)
    inbox = arena.inbox_for("reveal")
    name = arena.names[0]
    arena.answer("reveal", name, inbox[name])
    for raw in (inbox[name], retold(arena, UnmaskRequest, inbox[name], masking_keys=(arena.names[1],))):
        with pytest.raises(PolicyError, match="is at: done"):
            arena.answer("reveal", name, raw)


def test_a_vector_that_came_too_late_stays_masked_though_its_masking_key_is_known(monkeypatch):
    """The owner takes a client for lost, learns its masking key, and then its vector comes: its self-mask is left."""
    s.seed_secrets(monkeypatch, 5)
    arena = s.Arena(4, 3, **shaped())
    late = arena.names[3]
    inbox = arena.inbox_for("mask")
    raw = arena.answer("mask", late, inbox[late])
    private = arena.clients[late]._masking_key  # what enough shares give the owner
    inbox = arena.step("mask", inbox, lost=[late])
    for step in ("confirm", "reveal"):
        inbox = arena.step(step, inbox)
    encoding = arena.terms.encoding
    vector = encoding.from_bytes(split_masked(raw, arena.terms)[1])
    own = np.zeros_like(vector)
    peers = {name: from_text(keys.masking_key) for name, keys in arena.owner._keys.items() if name != late}
    add_pairwise_masks(own, private, late, peers, arena.terms.context, encoding)
    looks_uniform(encoding, encoding.reduce(vector - own))
    looks_uniform(
        encoding, encoding.reduce(vector - own - encode_tensors(arena.updates[late], arena.terms.shapes, encoding))
    )


# What can be seen in what the owner has


def shaped():
    return {"shapes": (TensorShape(name="w", shape=(20_000,)),)}


def histogram(encoding, vector):
    return np.bincount(np.frombuffer(encoding.to_bytes(vector), np.uint8), minlength=256)


def looks_uniform(encoding, vector):
    assert stats.chisquare(histogram(encoding, vector)).pvalue > SIGNIFICANCE


def masked_vectors(arena):
    inbox = arena.inbox_for("mask")
    return {
        name: arena.terms.encoding.from_bytes(split_masked(arena.answer("mask", name, raw), arena.terms)[1])
        for name, raw in inbox.items()
    }


@pytest.mark.parametrize("bits", [32, 48, 64])
def test_one_masked_vector_says_nothing_of_its_update(monkeypatch, bits):
    """Its bytes are uniform, alike for two updates that differ everywhere, and so is what masking added."""
    counts = []
    for seed, value in ((11, 0.0), (12, 2.0)):
        s.seed_secrets(monkeypatch, seed)
        arena = s.Arena(3, 2, bits=bits, **shaped())
        for update in arena.updates.values():
            update["w"] = torch.full((20_000,), value)
        encoding = arena.terms.encoding
        vectors = masked_vectors(arena)
        for name, vector in vectors.items():
            looks_uniform(encoding, vector)
            plain = encode_tensors(arena.updates[name], arena.terms.shapes, encoding)
            looks_uniform(encoding, encoding.reduce(vector - plain))
            assert abs(np.corrcoef(vector[:-1].astype(float), vector[1:].astype(float))[0, 1]) < 4 / np.sqrt(20_000)
        counts.append(histogram(encoding, vectors[arena.names[0]]))
    assert stats.chi2_contingency(counts).pvalue > SIGNIFICANCE


def test_an_unmasked_vector_does_not_look_like_that():
    """The test above can fail: encoded updates are far from uniform."""
    arena = s.Arena(3, 2, **shaped())
    encoding = arena.terms.encoding
    plain = encode_tensors(arena.updates[arena.names[0]], arena.terms.shapes, encoding)
    assert stats.chisquare(histogram(encoding, plain)).pvalue < 1e-9


def test_without_the_last_answer_the_sum_stays_uniform(monkeypatch):
    """One share fewer than the threshold of every secret: the owner can take off no mask, and what it has is noise."""
    s.seed_secrets(monkeypatch, 21)
    arena = s.Arena(5, 3, **shaped())
    inbox = arena.inbox_for("reveal")
    with pytest.raises(RunFailed):
        arena.step("reveal", inbox, lost=arena.names[2:])
    encoding = arena.terms.encoding
    looks_uniform(encoding, arena.owner._sum)
    looks_uniform(encoding, encoding.reduce(arena.owner._sum - arena.expected(arena.names)))


def test_a_partial_sum_stays_uniform_under_the_masks_of_who_is_missing(monkeypatch):
    """Everything but one client's vector, with all self-masks known: the pairwise masks with it are left."""
    s.seed_secrets(monkeypatch, 22)
    arena = s.Arena(4, 3, **shaped())
    vectors = masked_vectors(arena)
    encoding, some = arena.terms.encoding, arena.names[:3]
    total = encoding.reduce(sum(vectors[name] for name in some))
    for name in some:
        subtract_self_mask(total, arena.clients[name]._seed, arena.terms.context, name, encoding)
    looks_uniform(encoding, total)
    looks_uniform(encoding, encoding.reduce(total - arena.expected(some)))


def test_all_others_in_league_with_the_owner_learn_the_last_ones_update():
    """No protocol of sums can do better, and the documents say so: the sum less their own updates is the rest."""
    arena = s.Arena(4, 3)
    total = arena.run()
    for name, tensor in total.tensors.items():
        rest = tensor - sum(arena.updates[other][name].double() for other in arena.names[1:])
        assert (rest - arena.updates[arena.names[0]][name]).abs().max() <= 4 * arena.terms.encoding.step


def test_an_owner_cannot_run_one_round_for_clients_with_a_low_threshold():
    with pytest.raises(PolicyError, match="does not hold against the owner"):
        s.Arena(4, 2)
