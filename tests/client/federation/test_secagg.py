from __future__ import annotations

import copy
import math
import pickle

import pytest
import secagg_round as s
import torch

from client.federation.secagg import ClientRound, ClientStage
from offsite.errors import ConfigError, PolicyError, Replayed, RunFailed, Untrusted, WrongNames, WrongShape


def client(num=5, threshold=3, *, last_round=-1, peers=None, number=0, colluders=0, **changes):
    terms = s.terms_of(num, threshold, **changes)
    known = {s.party(n).public.fingerprint: s.party(n).public for n in range(num)} if peers is None else peers
    return ClientRound(terms, s.party(number), known, last_round=last_round, colluders=colluders)


@pytest.mark.parametrize(
    ("num", "colluders", "least"),
    [(2, 0, 2), (3, 0, 2), (4, 0, 3), (5, 0, 3), (5, 1, 4), (5, 2, 4), (5, 3, 5), (9, 2, 6)],
)
def test_the_threshold_must_hold_against_the_owner_and_the_colluders(num, colluders, least):
    client(num, least, colluders=colluders)
    if least > 2:
        with pytest.raises(PolicyError, match=f"threshold {least - 1} of {num} members") as caught:
            client(num, least - 1, colluders=colluders)
        assert caught.value.hint == f"the least that does is {least}"


def test_nobody_can_hold_against_everybody():
    with pytest.raises(ConfigError):
        client(3, 3, colluders=3)
    with pytest.raises(ConfigError):
        client(3, 3, colluders=-1)


def test_members_must_be_known_by_the_keys_they_are_listed_under():
    cards = {s.party(n).public.fingerprint: s.party(n).public for n in range(4)}
    with pytest.raises(Untrusted, match="is not known here"):
        client(peers=cards)
    last = s.party(4).public.fingerprint
    with pytest.raises(ConfigError, match="are those of"):
        client(peers={**cards, last: s.party(5).public})
    with pytest.raises(ConfigError, match="is not a member"):
        client(number=7)
    client(peers={**cards, last: s.party(4).public, s.party(5).public.fingerprint: s.party(5).public})


def test_a_round_is_joined_once():
    client(last_round=2)
    for last in (3, 4):
        with pytest.raises(Replayed, match=f"round 3 is not after round {last}"):
            client(last_round=last)


def test_calls_out_of_turn_are_refused_and_change_nothing():
    arena = s.Arena(3, 2)
    inbox = dict.fromkeys(arena.names, b"")
    name = arena.names[0]
    for number, step in enumerate(s.STEPS):
        for other in s.STEPS:
            if other != step:
                with pytest.raises(PolicyError, match=f"asked to {other} in round 3, where this client is at: {step}"):
                    arena.answer(other, name, inbox[name])
        assert arena.clients[name].stage == list(ClientStage)[number]
        inbox = arena.step(step, inbox)
    assert arena.clients[name].stage is ClientStage.DONE
    for other in s.STEPS:
        with pytest.raises(PolicyError, match="is at: done"):
            arena.answer(other, name, b"")
    assert arena.owner.total().contributors == arena.names


@pytest.mark.parametrize("step", s.STEPS[1:])
def test_what_is_refused_ends_the_round_for_the_client(step):
    arena = s.Arena(3, 2)
    inbox = arena.inbox_for(step)
    refusing = arena.clients[arena.names[0]]
    with pytest.raises(Exception, match="not JSON"):
        arena.answer(step, arena.names[0], b"{")
    assert refusing.stage is ClientStage.REFUSED
    with pytest.raises(PolicyError, match="is at: refused"):
        arena.answer(step, arena.names[0], inbox[arena.names[0]])
    assert not refusing._seed
    assert not refusing._sharers


def test_masks_cannot_be_used_twice():
    arena = s.Arena(3, 2)
    inbox = arena.inbox_for("mask")
    one = arena.clients[arena.names[0]]
    arena.answer("mask", arena.names[0], inbox[arena.names[0]])
    with pytest.raises(PolicyError):
        one.mask(inbox[arena.names[0]], {name: tensor + 0.5 for name, tensor in arena.updates[arena.names[0]].items()})
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="not copied or serialised"):
            attempt(one)


def test_secrets_are_forgotten_with_the_answer():
    arena = s.Arena(3, 2)
    arena.run()
    for one in arena.clients.values():
        assert (one._masking_key, one._sharing_key, one._seed, one._sharers) == (b"", b"", b"", {})
        assert repr(one) == f"ClientRound({one._own[:9]}, round 3, done)"


def test_two_rounds_of_one_client_share_no_secret():
    first, second = client(), client(round=4)
    secrets = [getattr(one, name) for one in (first, second) for name in ("_masking_key", "_sharing_key", "_seed")]
    assert len(set(secrets)) == 6


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda u: u.update({"a.bias": torch.full((7,), 2.0001)}), PolicyError),
        (lambda u: u.update({"a.bias": torch.full((7,), -math.inf)}), RunFailed),
        (lambda u: u.update({"a.bias": torch.full((7,), math.nan)}), RunFailed),
        (lambda u: u.update({"a.bias": torch.zeros(8)}), WrongShape),
        (lambda u: u.pop("a.bias"), WrongNames),
    ],
)
def test_an_update_other_than_agreed_does_not_leave(change, error):
    arena = s.Arena(3, 2)
    name = arena.names[1]
    change(arena.updates[name])
    inbox = arena.inbox_for("mask")
    with pytest.raises(error):
        arena.answer("mask", name, inbox[name])
    assert arena.clients[name].stage is ClientStage.REFUSED
    inbox = arena.step("mask", inbox, lost=[name])
    for step in ("confirm", "reveal"):
        inbox = arena.step(step, inbox)
    assert arena.owner.total().contributors == (arena.names[0], arena.names[2])
