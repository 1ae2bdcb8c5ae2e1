"""The owner's secure rounds: what becomes of a sum, of a round that broke off, and of messages that are none."""

from __future__ import annotations

import pytest
import secure_round as lab
import torch

from adapters.updates import dense, update_of
from offsite.digests import sha256_file
from offsite.errors import ArtefactError, ConfigError, Replayed, RunFailed, TooLarge, Untrusted, WrongBinding
from offsite.exchange.packing import pack
from offsite.exchange.verbs import seal_run
from offsite.faults import ROUND_POINTS, set_hook
from offsite.secagg.terms import read_terms
from offsite.tensors import TensorSpec
from server.federation.results import finish
from server.federation.securerounds import SecureRounds
from server.federation.secureterms import secure_terms
from server.federation.state import SHARED


@pytest.fixture
def federated(make_federated):
    return make_federated(**lab.SECURE)


@pytest.fixture
def federation(federated):
    with federated.opened() as found:
        yield found


@pytest.fixture
def carried(federated, federation):
    return lab.Carried(federated, federation)


def files(folder):
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def notes_of(federated, federation):
    kept = [path for path in (federation.registry.folder / "notes").rglob("*") if path.is_file()]
    return [*federated.outbox.glob("note-*"), *kept]


# --- the sum


def test_the_mean_of_the_sum_is_added_to_what_earlier_rounds_added(federated, federation):
    expected = {}
    for number in (1, 2):
        carried = lab.Carried(federated, federation, number)
        closed = carried.owner.close_sum(number, carried.total(), {})
        base = {name: torch.zeros(spec.shape) for name, spec in federation.shapes.items()}
        tensors = {**federation.start_of(number), **{n: t.float() for n, t in carried.mean().items()}}
        for name, part in update_of(federation.spec, tensors, base, is_conv1d=federation.is_conv1d).items():
            expected[name] = expected.get(name, 0) + dense(part)
        assert closed.content["used"] == sorted(carried.names)
        assert (closed.content["norms"], closed.content["flags"]) == ({}, {})
    state = federation.states[SHARED]
    assert state.keys() == expected.keys()
    for name, part in state.items():
        assert torch.allclose(dense(part), expected[name], rtol=0, atol=1e-6), name


def test_a_sum_of_survivors_is_theirs_alone(federated, federation, carried):
    carried.until(1).follow(lost=("bert",)).close()  # she shared no secrets: nothing of hers is in any mask
    while carried.inbox:
        carried.follow().close()
    closed = carried.owner.close_sum(1, carried.part.total(), {federated.key("bert"): "dropped out"})
    assert closed.content["used"] == sorted(key for key, name in carried.names.items() if name != "bert")
    mean, total = carried.mean("anna", "cora"), carried.part.total()
    for name, tensor in total.tensors.items():
        assert torch.allclose(tensor / 2, mean[name], rtol=0, atol=1e-8)


def test_a_sum_that_is_longer_than_clipped_updates_can_be_is_refused(federated, federation, monkeypatch):
    """One client does not clip: every number is at the limit, which the encoding lets through."""
    monkeypatch.setattr(
        "client.federation.secureround.clipped",
        lambda vector, clip: ({name: torch.full_like(tensor, clip) for name, tensor in vector.items()}, clip),
    )
    carried = lab.Carried(federated, federation)
    total = carried.total()
    before = files(federation.folder)
    with pytest.raises(RunFailed, match="3 updates of at most 3 cannot be"):
        carried.owner.close_sum(1, total, {})
    assert (federation.num_finished, federation.states, files(federation.folder)) == (0, {}, before)
    carried.owner.void_unfinished()
    assert (federation.num_finished, federation.states) == (1, {})


def test_a_sum_that_is_just_as_long_as_clipped_updates_can_be_counts(federated, federation):
    carried = lab.Carried(federated, federation)
    total = carried.total()
    length = sum(float(tensor.square().sum()) for tensor in total.tensors.values()) ** 0.5
    for factor in (3 * 3.0 / length, 3 * 3.0 * 1.002 / length):
        scaled = type(total)({name: tensor * factor for name, tensor in total.tensors.items()}, total.contributors)
        if factor * length <= 9.0 + 1e-9:
            assert carried.owner.close_sum(1, scaled, {}).content["figures"]["norm_sum"] == pytest.approx(9.0)
        else:
            with pytest.raises(RunFailed):
                carried.owner.close_sum(2, scaled, {})


# --- what is asked


def test_terms_say_who_how_many_and_what_is_asked(federated, federation, carried):
    manifest = carried.rounds["anna"].manifest
    terms = read_terms(manifest.secure.encode())
    assert terms == carried.owner.terms(1)
    assert (terms.federation, terms.round, terms.members) == (federation.store.id, 1, tuple(sorted(carried.names)))
    assert (terms.threshold, terms.limit, terms.asked) == (2, 3.0, manifest.asked)
    assert len({round_.digest for round_ in carried.rounds.values()}) == 1
    folders = [path.name for path in (federation.registry.folder / "rounds").iterdir()]
    assert folders == [carried.rounds["anna"].digest.removeprefix("sha256:")]  # what was drafted is gone
    with pytest.raises(RunFailed, match="was not asked"):
        carried.owner.terms(2)


@pytest.mark.parametrize(
    ("changes", "found"), [({}, 3), ({"min_clients": 3, "threshold": 3}, 3), ({"threshold": 2}, 2)]
)
def test_the_threshold(make_federated, changes, found):
    made = make_federated(**{**lab.SECURE, "threshold": None, **changes})
    with made.opened() as federation:
        federation.ask(1)
        assert SecureRounds(federation).terms(1).threshold == found


@pytest.mark.parametrize(
    ("changes", "why"), [({"threshold": 4}, "threshold 4"), ({"fraction": 0.4, "min_clients": 1}, "members")]
)
def test_a_round_that_no_client_would_join_is_not_asked(make_federated, changes, why):
    made = make_federated(**{**lab.SECURE, **changes})
    with made.opened() as federation:
        with pytest.raises(ConfigError, match=why):
            federation.ask(1)
        assert federation.store.asked(federation.job_ids, 1) == {}
        assert list((federation.registry.folder / "rounds").iterdir()) == []
        assert list(made.outbox.iterdir()) == []


def test_a_threshold_of_half_or_less_is_told_before_anything_is_asked(federated, federation):
    object.__setattr__(federation.config, "threshold", 2)
    clients = [*federation.participants, "5" * 4 + "-" + "-".join(["aaaa"] * 12)]
    named = {
        "federation_id": federation.store.id,
        "expected": {"a": TensorSpec(shape=(2,), dtype="float32")},
        "number": 1,
        "clients": clients,
    }
    with pytest.raises(ConfigError, match="not over half of the 4 clients"):
        secure_terms(federation.config, asked="sha256:" + "5" * 64, **named)


# --- rounds that broke off


def test_a_round_that_broke_off_counts_for_nothing_and_is_not_asked_again(federated, federation, carried, capsys):
    carried.until(3)
    assert notes_of(federated, federation)
    carried.owner.void_unfinished()
    assert federation.num_finished == 1
    content = federation.finished[0].content
    assert (content["used"], set(content["left_out"]), federation.states) == ([], set(carried.names), {})
    assert notes_of(federated, federation) == []
    assert "was broken off" in capsys.readouterr().err
    later = lab.Carried(federated, federation, 2)
    assert {name: path.name.rpartition("-")[2] for name, path in later.asked.items()} == dict.fromkeys(
        federated.NAMES, "0002"
    )
    assert later.owner.close_sum(2, later.total(), {}).round == 2
    assert federation.states[SHARED]


def test_a_round_that_is_finished_is_not_voided(federated, federation, carried):
    carried.owner.void_unfinished()  # asked, nothing more: it counts for nothing
    assert federation.num_finished == 1
    second = lab.Carried(federated, federation, 2)
    second.owner.close_sum(2, second.total(), {})
    before = (federation.finished, {name: dense(part) for name, part in federation.states[SHARED].items()})
    for _ in range(2):  # nothing is asked that is not finished
        second.owner.void_unfinished()
    assert federation.finished == before[0]
    assert all(torch.equal(dense(part), before[1][name]) for name, part in federation.states[SHARED].items())


def test_rounds_that_are_not_secure_are_never_voided(make_federated):
    made = make_federated()
    with made.opened() as federation:
        federation.ask(1)
        SecureRounds(federation).void_unfinished()
        assert federation.num_finished == 0


def test_a_federation_whose_every_round_broke_off_ends_without_a_model(make_federated, capsys):
    made = make_federated(**{**lab.SECURE, "rounds": 1})
    with made.opened() as federation:
        lab.Carried(made, federation).until(1).owner.void_unfinished()
        told = finish(federation)
    assert (told["rounds"][0]["used"], told["mode"]) == ([], "shared")
    assert [path.name for path in made.config.output.iterdir()] == ["results.json"]
    assert "no round counted" in capsys.readouterr().err


def summed(federated, federation):
    carried = lab.Carried(federated, federation)
    carried.owner.close_sum(1, carried.total(), {})


@pytest.mark.parametrize("point", [point for point in ROUND_POINTS if point != "round-sealed"])
def test_killed_anywhere_a_round_is_summed_once_or_void(federated, point):
    def stop(found):
        if found == point:
            raise KeyboardInterrupt

    with federated.opened() as federation:
        try:
            set_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                summed(federated, federation)
        finally:
            set_hook(None)
    with federated.opened() as federation:
        is_summed = point == "round-finished"
        assert federation.num_finished == int(is_summed)
        SecureRounds(federation).void_unfinished()
        assert (federation.num_finished, bool(federation.states)) == (1, is_summed)
        after = federation.folder / "after-0001"
        assert {path.stem for path in after.iterdir()} == set(federation.states)  # no sum of a void round stays


def test_clear_takes_the_messages_of_that_round_and_earlier_ones(federated, federation, carried):
    carried.until(1)
    kept = federation.registry.folder / "notes" / carried.federation.job_ids[federated.key("anna")]
    for name in ("00001-0000000000000001", ".00001-0000000000000002.partial", "00002-0000000000000003"):
        (kept / name).mkdir(parents=True)
    carried.owner.clear(1)
    assert not list(federated.outbox.glob("note-*"))
    assert [path.name for path in kept.iterdir()] == ["00002-0000000000000003"]
    assert list(federated.outbox.glob("round-*"))


# --- messages


def test_messages_that_are_none_of_that_client_and_round(federated, federation, carried, monkeypatch, tmp_path):
    carried.join(*federated.NAMES)
    parts = {name: pack(sealed) for name, sealed in carried.replies.items()}
    anna, bert = federated.key("anna"), federated.key("bert")
    owner = carried.owner
    with pytest.raises(WrongBinding, match="no message of this client"):
        owner.read_note(bert, 1, parts["anna"])
    own = owner.note_for(anna, 1, 9, b"{}")  # what the owner sealed, sent back
    with pytest.raises(ArtefactError):
        owner.read_note(anna, 1, pack(own))
    with pytest.raises(RunFailed, match="was not asked"):
        owner.read_note(anna, 2, parts["anna"])
    payload = next(name for name in parts["cora"] if name.startswith("payload/"))
    flipped = bytearray(parts["cora"][payload])
    flipped[-1] ^= 1
    with pytest.raises(ArtefactError):
        owner.read_note(federated.key("cora"), 1, {**parts["cora"], payload: bytes(flipped)})
    limit = owner.terms(1).limit_bytes + owner.terms(1).num_vector_bytes
    with pytest.raises(TooLarge):
        owner.read_note(anna, 1, {**parts["anna"], payload: bytes(limit + 2**22)})
    assert owner.read_note(bert, 1, parts["bert"]).startswith(b"{")
    assert not (federation.folder / "note").exists()
    assert not (federation.folder / "parcel").exists()


def test_a_message_that_another_signed_is_not_taken(federated, federation, carried):
    """Bert puts what anna signed into a sealed message of his own."""
    carried.join("anna")
    raw = carried.owner.read_note(federated.key("anna"), 1, pack(carried.replies.pop("anna")))
    bert = federated.member("bert")
    sealed = bert._note(raw, carried.rounds["bert"])
    found = carried.owner.read_note(federated.key("bert"), 1, pack(sealed))
    with pytest.raises(WrongBinding, match="another client signed"):
        carried.part.take(found, sender=federated.key("bert"))
    assert carried.part.take(found, sender=federated.key("anna")) == federated.key("anna")
    with pytest.raises(Replayed):
        carried.part.take(found)


def test_a_client_trusted_no_longer_gets_no_message(federated, federation, carried):
    carried.until(1)
    federation.trust.revoke(federated.key("cora"))
    with pytest.raises(Untrusted):
        carried.owner.note_for(federated.key("cora"), 1, 2, b"{}")
    assert not (federation.folder / "note").exists()


def test_a_bundle_that_stayed_at_its_client_is_not_taken_for_a_secure_round(federated, federation, carried, tmp_path):
    member, bundle = federated.member("anna"), carried.rounds["anna"].path.parent / "bundle"
    seal_run(member._sealing(bundle, tmp_path / "by-mistake", 1), identity=member.identity)
    verdict = federation.take_in(pack(tmp_path / "by-mistake"))
    assert (verdict.state, verdict.reason_class) == ("refused", "WrongBinding")
    assert "which no bundle answers" in verdict.message
    assert not list((federation.registry.folder / "bundles").iterdir())
