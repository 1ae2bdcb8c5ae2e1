"""A client's part in a secure round: what terms it refuses; joined once, in order, and ended by a refusal."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import secure_round as lab
import torch

import client.federation.join as federate
from client.federation.secureround import SecureRound, last_joined
from offsite.errors import (
    ArtefactError,
    ConfigError,
    PolicyError,
    Replayed,
    RunFailed,
    TooLarge,
    Untrusted,
    WrongBinding,
)
from offsite.keys.trust import TrustStore
from offsite.sealed.ledger import Ledger
from offsite.sealed.manifest import NOTE_NAME
from offsite.secagg.fixedpoint import TensorShape
from offsite.secagg.terms import make_terms, read_terms
from offsite.strictjson import write_compact


@pytest.fixture
def federated(make_federated):
    """Three clients who know each other, and an owner who asks secure rounds."""
    return make_federated(**lab.SECURE)


@pytest.fixture
def federation(federated):
    with federated.opened() as found:
        yield found


@pytest.fixture
def carried(federated, federation):
    """The first round, asked of everybody, and nobody has joined."""
    return lab.Carried(federated, federation)


def part_of(federated, round_, *, name="anna", work=None, **changes):
    """The client's part, made as its program makes it, or with changes."""
    member = federated.member(name)
    stated = {"owner": member.job.owner, "last_round": -1, "colluders": 0}
    trust = TrustStore(member.config.keys)
    return SecureRound(
        round_, member.package, member.identity, trust, work or member.config.work, **{**stated, **changes}
    )


def with_terms(round_, **changes):
    """The round under other terms, which its owner may write as it likes."""
    terms = read_terms(round_.manifest.secure.encode())
    given = {name: getattr(terms, name) for name in type(terms).model_fields if name != "format"}
    made = make_terms(**{**given, **changes})
    secure = write_compact(made).decode("ascii")
    return dataclasses.replace(round_, manifest=round_.manifest.model_copy(update={"secure": secure}))


# --- terms


def test_terms_of_another_agreement_are_refused(federated, carried):
    round_ = carried.rounds["anna"]
    terms = read_terms(round_.manifest.secure.encode())
    rows = {
        "another federation": {"federation": "5" * 32},
        "another round": {"round": 2},
        "others than this client": {"members": [federated.key("bert"), federated.key("cora")]},
        "another adapter": {"shapes": terms.shapes[::-1]},
        "another adapter ": {"shapes": (*terms.shapes, TensorShape(name="middle.0.x.lora_B", shape=(2, 2)))},
        "another clip": {"limit": 3.5},
        "other weights": {"asked": None},
        "other weights ": {"asked": "sha256:" + "5" * 64},
    }
    for what, changes in rows.items():
        with pytest.raises(WrongBinding, match=f"terms of secure aggregation are for {what.strip()}"):
            part_of(federated, with_terms(round_, **changes))
    assert not (federated.member("anna").config.work / "last-secure-round").exists()


def test_the_terms_name_all_that_is_asked(federated, carried):
    """An owner that asks of one client what it asks of no other has no terms that both agree to."""
    round_ = carried.rounds["anna"]
    start = {name: spec.model_copy(update={"dtype": "bfloat16"}) for name, spec in round_.manifest.start.items()}
    files = {
        name: entry.model_copy(update={"sha256": "sha256:" + "5" * 64}) for name, entry in round_.manifest.files.items()
    }
    rows = (
        {"steps": 3},
        {"learning_rate": None},
        {"proximal": 0.5},
        {"num_rounds": 4},
        {"start": start},
        {"files": files},
    )
    for changes in rows:
        other = dataclasses.replace(round_, manifest=round_.manifest.model_copy(update=changes))
        assert other.manifest.asked != round_.manifest.asked
        with pytest.raises(WrongBinding, match="other weights or another task"):
            part_of(federated, other)


def test_members_are_pinned_peers_and_never_the_owner(federated, carried, make_party):
    round_, anna = carried.rounds["anna"], federated.member("anna")
    owner, stranger = anna.job.owner, make_party("stranger").fingerprint
    own = anna.identity.public.fingerprint
    for members, why in (([own, owner], "name the owner"), ([own, stranger], "not known here")):
        with pytest.raises(Untrusted, match=why):
            part_of(federated, with_terms(round_, members=members, threshold=2))
    with pytest.raises(Untrusted, match="name the owner"):  # among enough honest ones too
        part_of(federated, with_terms(round_, members=[*carried.names, owner], threshold=4))
    TrustStore(anna.config.keys).revoke(federated.key("bert"))
    with pytest.raises(Untrusted, match="not known here"):
        part_of(federated, round_)


@pytest.mark.parametrize(
    ("threshold", "colluders", "kept"),
    [(2, 0, True), (2, 1, False), (3, 0, True), (3, 1, True), (3, 2, False)],
)
def test_a_threshold_holds_against_so_many_in_league_or_is_refused(federated, carried, threshold, colluders, kept):
    round_ = with_terms(carried.rounds["anna"], threshold=threshold)
    if kept:
        part_of(federated, round_, colluders=colluders)
        return
    with pytest.raises(PolicyError, match=f"threshold {threshold}"):
        part_of(federated, round_, colluders=colluders)


def test_a_round_without_a_shared_factor_is_no_sum(federated, carried):
    round_ = carried.rounds["anna"]
    bare = dataclasses.replace(round_, manifest=round_.manifest.model_copy(update={"start": {}, "files": {}}))
    with pytest.raises(ConfigError, match="share A"):
        part_of(federated, bare)


# --- joined once


def test_a_round_is_joined_once_with_these_keys_in_whatever_folder(federated, carried, tmp_path):
    anna, round_ = federated.member("anna"), carried.rounds["anna"]
    assert not anna.has_joined(round_)
    anna.answer(round_)
    assert (anna.secure_round, last_joined(anna.config.work)) == (1, 1)
    with Ledger(anna.config.keys) as ledger:
        assert ledger.last_round(anna.job.job_id, "note") == 1
        assert ledger.last_round(anna.job.job_id, "bundle") == ledger.last_round("0" * 32, "note") == -1
    restarted = federated.member("anna", limit_steps=9_999)
    elsewhere = federated.member("anna", work=str(tmp_path / "elsewhere"))
    for member in (anna, restarted, elsewhere):
        again = member.take(carried.asked["anna"])
        assert member.has_joined(again)
        with pytest.raises(Replayed, match="joined before"):
            member.answer(again)
    with pytest.raises(Replayed, match="not after round 1"):
        part_of(federated, round_, work=tmp_path, last_round=1)
    with pytest.raises(Replayed, match="not after round 1"):
        part_of(federated, round_)  # the note in the work folder says it as well


def test_a_damaged_note_of_the_last_round_is_no_leave_to_join(federated, carried):
    anna = federated.member("anna")
    for content in (b"", b"one", b"-1", b"1 2", b"\xff"):
        (anna.config.work / "last-secure-round").write_bytes(content)
        for joins in (lambda: anna.answer(carried.rounds["anna"]), lambda: last_joined(anna.config.work)):
            with pytest.raises(PolicyError, match="damaged"):
                joins()
    assert anna.secure_round is None


def test_nothing_leaves_before_the_disk_remembers_that_it_was_joined(federated, carried, monkeypatch):
    anna, round_ = federated.member("anna"), carried.rounds["anna"]

    def full(*_, **__):
        raise RunFailed("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("client.federation.secureround.staged_file", full)
        with pytest.raises(RunFailed, match="full"):
            anna.answer(round_)
    assert anna.secure_round is None
    assert not (round_.path.parent / "notes").exists()
    assert anna.answer(round_).is_dir()  # nothing had left, so it joins now


def test_a_first_message_that_cannot_be_sealed_is_a_round_joined_and_lost(federated, carried, monkeypatch):
    anna, round_ = federated.member("anna"), carried.rounds["anna"]

    def full(*_, **__):
        raise RunFailed("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("client.federation.member.seal_run", full)
        with pytest.raises(RunFailed):
            anna.answer(round_)
    assert anna.secure_round is None
    assert list((round_.path.parent / "notes").iterdir()) == []  # no message stays in the clear
    assert anna.has_joined(round_)


# --- the order, and what ends it


def test_the_sum_is_the_mean_of_what_three_clients_hold(federated, carried):
    total, mean = carried.total(), carried.mean()
    step = read_terms(carried.rounds["anna"].manifest.secure.encode()).encoding.step
    for name, tensor in total.tensors.items():
        assert torch.allclose(tensor / 3, mean[name], rtol=0, atol=step)
    for name in federated.NAMES:
        with pytest.raises(PolicyError, match="is over"):
            federated.member(name)._secure.follow(b"")


def test_messages_out_of_turn_and_after_a_refusal(federated, carried):
    part = part_of(federated, carried.rounds["anna"])
    bundle = carried.rounds["anna"].path.parent / "bundle"
    with pytest.raises(PolicyError, match="is over"):
        part.follow(b"{}")
    part.begin(bundle)
    with pytest.raises(PolicyError, match="asked to advertise"):
        part.begin(bundle)
    with pytest.raises(ArtefactError):
        part.follow(b"{}")
    for _ in range(4):
        with pytest.raises(PolicyError):
            part.follow(b"{}")


def test_a_refused_message_ends_the_round_and_its_answer_is_never_made(federated, carried):
    carried.until(3)
    anna = federated.member("anna")
    wrong = carried.owner.note_for(federated.key("anna"), 1, 9, b"{}")
    with pytest.raises(ArtefactError):
        anna.follow(wrong)
    assert anna.secure_round is None
    with pytest.raises(PolicyError, match="no secure round is under way"):
        anna.follow(carried.inbox["anna"])
    carried.follow(lost=("anna",)).close().follow().close()
    assert carried.part.total().contributors == tuple(sorted(carried.names))  # her vector was there already


def test_a_message_of_another_round_is_none_and_the_one_under_way_goes_on(federated, federation, carried, tmp_path):
    carried.join("anna")
    stale = tmp_path / "stale"
    shutil.copytree(carried.owner.note_for(federated.key("anna"), 1, 1, b"{}"), stale)
    carried.owner.void_unfinished()  # the owner broke off, and asks the next
    later = lab.Carried(federated, federation, 2).join(*federated.NAMES)
    with pytest.raises(WrongBinding, match="not for the secure round that is under way"):
        federated.member("anna").follow(stale)
    assert federated.member("anna").secure_round == 2
    assert later.total().contributors == tuple(sorted(carried.names))


def test_a_message_that_is_too_large_is_not_read(federated, carried):
    carried.until(1)
    anna = federated.member("anna")
    limit = anna._secure.terms.limit_bytes
    with pytest.raises(TooLarge, match=f"limit {limit}"):
        anna.follow(carried.owner.note_for(federated.key("anna"), 1, 1, b"x" * (limit + 1)))
    assert anna.secure_round is None


# --- no bundle in place of a part of a sum


def plain_round(federated, round_, tmp_path):
    """The next round as an owner can seal it that wants bundles after all."""
    from offsite.artefacts.round import write_round
    from offsite.exchange.verbs import seal_run
    from offsite.sealed.config import SealConfig

    manifest = round_.manifest.model_copy(update={"round": 2, "secure": None, "clip": None, "start": {}, "files": {}})
    plain = write_round(tmp_path / "plain", manifest, start=round_.load_start())
    owner, job = federated.config, tmp_path / "owners-job"
    shutil.copytree(federated.member("anna").config.job, job)
    sealing = {"keys": owner.keys, "passphrase_file": owner.passphrase_file}
    seal_run(SealConfig(input=plain.path, output=tmp_path / "plain.sealed", job=job, **sealing))
    return tmp_path / "plain.sealed"


@pytest.mark.parametrize("joined", [True, False])
def test_a_client_of_secure_rounds_hands_in_no_bundle(federated, carried, tmp_path, joined):
    """Neither once it has joined one, nor with --secure-only, which simulate sets for its clients."""
    assert json.loads(federated.settings["anna"].read_text())["secure_only"] is True
    anna = federated.member("anna", secure_only=not joined)
    if joined:
        anna.answer(carried.rounds["anna"])
    sealed = plain_round(federated, carried.rounds["anna"], tmp_path)
    with pytest.raises(PolicyError, match="asks for the bundle itself"):
        anna.take(sealed)
    assert not (anna.config.work / "round-0002").exists()


# --- over an exchange


def test_a_refusal_does_not_end_the_client_but_its_part_in_the_round(federated, carried, monkeypatch, capsys, tmp_path):
    carried.until(1)
    anna, handed = federated.member("anna"), []
    loop = object.__new__(federate._Loop)
    loop._member, loop._exchange, loop._patiently = anna, None, lambda work: work()
    monkeypatch.setattr(federate, "hand_in", lambda _exchange, sealed, **_: handed.append(sealed))
    pulled = tmp_path / "pulled"
    shutil.copytree(carried.owner.note_for(federated.key("anna"), 1, 1, b"{}"), pulled)
    assert loop._followed(pulled) == 1
    assert (anna.secure_round, handed, pulled.exists()) == (None, [], False)
    assert "this client is out of it" in capsys.readouterr().err

    def refuse(*_, **__):
        raise WrongBinding("round 1 is closed")

    monkeypatch.setattr(federate, "hand_in", refuse)
    loop._hand_in_note(anna.drop_out(carried.rounds["anna"]), 1)
    assert "does not take this client's message: round 1 is closed" in capsys.readouterr().err


def test_what_stays_on_the_client_s_disk_is_sealed_for_the_owner(federated, carried):
    carried.total()
    for name in federated.NAMES:
        work = federated.member(name).config.work
        assert not list(work.rglob(NOTE_NAME))
        assert not list(work.rglob(".note.partial"))
        assert len(list((work / "round-0001" / "notes").glob("*.sealed"))) == 5
