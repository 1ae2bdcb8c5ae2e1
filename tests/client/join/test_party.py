"""Who joins, and whom: nobody is pinned unseen, and no keys are made for an invitation to others."""

from __future__ import annotations

import pytest

import client.join.party as module
from offsite.errors import ConfigError, Untrusted, WrongRecipient
from offsite.keys.trust import TrustStore


def test_a_card_is_not_pinned_by_yes(players):
    with pytest.raises(ConfigError, match="--fingerprint is missing") as caught:
        players.join(players.invitation(), name="Client")
    assert "over another channel" in caught.value.hint
    assert TrustStore(players.client / "keys").peers() == []


def test_another_fingerprint_than_the_one_told_pins_nobody(players, key_ring):
    other = key_ring("third")[1].public.fingerprint
    with pytest.raises(Untrusted, match="not the one given"):
        players.join(players.invitation(), name="Client", fingerprint=other)
    assert TrustStore(players.client / "keys").peers() == []


def test_an_owner_who_was_revoked_stays_so(players):
    own = players.owner.public.fingerprint
    players.join(players.invitation(), name="Client", fingerprint=own)
    TrustStore(players.client / "keys").revoke(own)
    with pytest.raises(Untrusted, match="revoked"):
        players.join(players.invitation())


def test_keys_are_made_under_a_name(players):
    with pytest.raises(ConfigError, match="--name is missing"):
        players.join(players.invitation())
    players.patch.setattr(module, "can_ask", lambda: True)
    players.patch.setattr(module, "typed", lambda _question: "<>")
    with pytest.raises(ConfigError, match="a card's name has letters"):
        players.join(players.invitation())
    assert not (players.client / "keys").exists()


def test_at_a_terminal_a_name_and_a_yes_are_typed(players):
    answers = iter(["Example Hospital", "no", "yes"])
    players.patch.setattr(module, "can_ask", lambda: True)
    players.patch.setattr(module, "typed", lambda _question: next(answers))
    with pytest.raises(ConfigError, match="not confirmed"):
        players.join(players.invitation())
    assert players.join(players.invitation())["state"] == "card"
    (peer,) = TrustStore(players.client / "keys").peers()
    assert peer.keys.fingerprint == players.owner.public.fingerprint


def test_an_invitation_to_others_makes_no_keys_and_opens_none(players, key_ring):
    third = key_ring("third")[1].public.fingerprint
    job = {"job_id": "5" * 32, "job_digest": f"sha256:{'6' * 64}", "client": third}
    with pytest.raises(ConfigError, match="there are none"):
        players.join(players.invitation(**job), name="Client")
    assert not (players.client / "keys").exists()
    players.join(players.invitation(), name="Client", fingerprint=players.owner.public.fingerprint)
    with pytest.raises(WrongRecipient, match="the invitation is for the keys"):
        players.join(players.invitation(**job))
