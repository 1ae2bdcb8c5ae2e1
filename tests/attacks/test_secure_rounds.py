"""Attempts on secure rounds as they are carried: by the owner, who writes what it likes, and by one of its clients.

Clients are their own program, on Flower's loop in one process; what they hold is drawn. What is asked in every case:
does anybody learn one client's update, and does a round that was attacked change the model?
"""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np
import pytest
import secure_round as lab
import torch

from client.federation.member import Member
from client.federation.secagg import ClientRound
from offsite.artefacts.round import open_round, write_round
from offsite.errors import PolicyError, Replayed, RunFailed
from offsite.exchange.verbs import seal_run
from offsite.keys.identity import generate, open_identity
from offsite.keys.trust import TrustStore
from offsite.sealed.config import SealConfig
from offsite.secagg.fixedpoint import encode_tensors
from offsite.secagg.messages import Survivors, UnmaskRequest, make_message
from offsite.secagg.terms import read_terms
from offsite.strictjson import write_compact
from server.aggregation.secagg import ServerRound
from server.federation.federation import Federation
from server.federation.flower import run as run_rounds
from server.federation.grids import in_process
from server.federation.state import SHARED


class Carrier:
    """A federation of three on Flower's loop, with what every client revealed, handed in and refused."""

    def __init__(self, federated, monkeypatch):
        self.federated = federated
        self.revealed, self.masked = [], {}
        reveal, mask = ClientRound.reveal, ClientRound.mask

        def revealing(part, raw):
            found = reveal(part, raw)
            self.revealed.append(part._own)
            return found

        def masking(part, delivery, update):
            found = mask(part, delivery, update)
            self.masked[part._own] = (part.terms, {name: tensor.clone() for name, tensor in update.items()})
            return found

        monkeypatch.setattr(ClientRound, "reveal", revealing)
        monkeypatch.setattr(ClientRound, "mask", masking)

        def drawn(config):
            seed = next(number for number, name in enumerate(federated.NAMES) if name in str(config.data))
            federated.bundle(Path(config.output), open_round(Path(config.round)), seed=seed)

        monkeypatch.setattr("client.federation.member.tune", drawn)

    def run(self, federation):
        contexts = {node: {"client": str(path)} for node, path in enumerate(self.federated.settings.values(), 2)}
        run_rounds(federation, in_process(contexts, "client.federation.flower:app"))


@pytest.fixture
def carrier(make_federated, monkeypatch):
    return Carrier(make_federated(**{**lab.SECURE, "rounds": 1}), monkeypatch)


def attacked(carrier, expected=RunFailed):
    """The round ends without a change, and no client gave its shares."""
    with carrier.federated.opened() as federation:
        with pytest.raises(expected):
            carrier.run(federation)
        assert (federation.num_finished, federation.states) == (0, {})
        assert not list(federation.folder.glob("after-*"))
    assert carrier.revealed == []


# --- what the owner learns of an honest round


def test_the_owner_s_disk_holds_no_client_s_update_and_the_sum_is_exact(carrier, capsys):
    with carrier.federated.opened() as federation:
        carrier.run(federation)
        state = federation.states[SHARED]
    assert len(carrier.masked) == 3
    owner = carrier.federated.folder / "work"
    files = {
        path: path.read_bytes()
        for folder in ("registry", "outbox", "owner")
        for path in (owner / folder).rglob("*")
        if path.is_file()
    }
    assert len(files) > 10
    found = []
    for terms, vector in carrier.masked.values():
        encoded = terms.encoding.to_bytes(encode_tensors(vector, terms.shapes, terms.encoding))
        needles = [encoded, encoded[: len(encoded) // 2]]
        for tensor in vector.values():
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                needles += [tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()[:64]]
        found += [path.name for path, raw in files.items() if any(needle in raw for needle in needles)]
    assert found == []
    assert not list((owner / "registry" / "bundles").iterdir())

    first = next(iter(carrier.masked.values()))[0]
    vectors = [vector for _, vector in carrier.masked.values()]
    step = first.encoding.step
    for name in vectors[0]:
        mean = torch.stack([one[name].double() for one in vectors]).mean(0)
        stored = state[name.replace(".lora_B", ".weight")].b.double()
        scale = float((stored.norm() / mean.norm()).round(decimals=6))
        assert torch.allclose(stored, scale * mean, rtol=1e-6, atol=scale * step)

    own = [path for path in owner.rglob("*.safetensors") if path.parent.name == "bundle" and "clients" in path.parts]
    assert len(own) == 3  # the search would have found one: each client's own disk holds what it tuned
    raw = own[0].read_bytes()
    assert any(
        tensor.contiguous().view(torch.uint8).numpy().tobytes()[:64] in raw
        for vector in vectors
        for tensor in vector.values()
    )
    assert "Traceback" not in capsys.readouterr().err


def test_what_came_from_one_client_looks_like_noise(carrier, monkeypatch):
    """Hardly a number of a masked vector is the update's, and its digits are even."""
    taken, add = [], ServerRound._add

    def adding(part, sender, message, vector):
        taken.append(np.frombuffer(vector, dtype="<u4"))
        return add(part, sender, message, vector)

    monkeypatch.setattr(ServerRound, "_add", adding)
    with carrier.federated.opened() as federation:
        carrier.run(federation)
    terms, _ = next(iter(carrier.masked.values()))
    for one, (_, vector) in zip(taken, carrier.masked.values(), strict=True):
        plain = encode_tensors(vector, terms.shapes, terms.encoding)
        assert np.mean(one == plain) < 0.01
        counts = np.bincount(one >> 28, minlength=16)
        assert ((counts - len(one) / 16) ** 2 / (len(one) / 16)).sum() < 60  # 15 degrees of freedom


# --- a lying owner


def test_two_stories_of_who_is_left(carrier, monkeypatch):
    """Two clients of three are told that the third is left, and the third that one of them is not."""

    def stories(part):
        everybody = sorted(part._masked)
        first, second = everybody, [everybody[0], everybody[2]]
        told = {everybody[0]: first, everybody[1]: first, everybody[2]: second}
        return {
            member: write_compact(make_message(Survivors, part.terms, survivors=tuple(listed)))
            for member, listed in told.items()
        }

    monkeypatch.setattr(ServerRound, "_send_survivors", stories)
    monkeypatch.setattr(
        ServerRound, "_take_statement", lambda part, signed: part._statements.__setitem__(signed.sender, signed)
    )
    monkeypatch.setattr(ServerRound, "_send_request", _request(lambda part, receiver: part._masked))
    attacked(carrier)


def _request(survivors):
    """The owner asks for what it likes, with every statement that it has."""

    def send(part):
        statements = tuple(part._statements[member] for member in sorted(part._statements))
        found = {}
        for receiver in part._statements:
            left = set(survivors(part, receiver))
            lost = part._shares.keys() - left
            message = make_message(
                UnmaskRequest,
                part.terms,
                self_masks=tuple(sorted(left)),
                masking_keys=tuple(sorted(lost)),
                statements=statements,
            )
            found[receiver] = write_compact(message)
        return found

    return send


def test_both_shares_of_one_client(carrier, monkeypatch):
    """Half of the clients are asked for her self-mask, half for her masking key."""

    def survivors(part, receiver):
        everybody = sorted(part._masked)
        return everybody if receiver == everybody[0] else everybody[1:]

    monkeypatch.setattr(ServerRound, "_send_request", _request(survivors))
    with carrier.federated.opened() as federation:
        with pytest.raises(RunFailed):
            carrier.run(federation)
        assert (federation.num_finished, federation.states) == (0, {})
    assert len(carrier.revealed) < 2  # one, who was asked what follows from the one list: no secret has so few shares


def test_too_few_statements(carrier, monkeypatch):
    send = _request(lambda part, receiver: part._masked)

    def one(part):
        part._statements = dict(list(part._statements.items())[:1])
        return send(part)

    monkeypatch.setattr(ServerRound, "_send_request", one)
    attacked(carrier)


def test_other_weights_for_everybody_but_one(carrier, monkeypatch):
    """With A = 0 a client's B has no gradient and stays 0: the sum would be the one's who was given another A.

    Source: Pasquini et al. 2022, "Eluding Secure Aggregation in Federated Learning via Model Inconsistency".
    """
    write = Federation._write_round

    def lying(federation, number, task, client, emulator, secure=None):
        found = write(federation, number, task, client, emulator, secure)
        if secure is None or client == min(federation.participants):
            return found
        start = {name: torch.zeros_like(tensor) for name, tensor in found.load_start().items()}
        folder = federation.folder / secrets.token_hex(4)
        made = write_round(folder, found.manifest.model_copy(update={"start": {}, "files": {}}), start=start)
        place = federation.registry.round_folder(made.digest)
        if not place.is_dir():
            made.path.rename(place)
        return open_round(place)

    monkeypatch.setattr(Federation, "_write_round", lying)
    attacked(carrier)
    assert carrier.masked == {}


def _as_member(carrier, monkeypatch, identity, *, instead):
    """The owner puts a key of its own among the members, or in place of one, and plays its part."""
    import server.federation.federation as module

    made = module.secure_terms

    def lying(config, **stated):
        clients = stated["clients"]
        members = [*([clients[0]] if instead else clients), identity.public.fingerprint]
        terms = read_terms(made(config, **stated).encode())
        given = {"members": tuple(sorted(members)), "threshold": len(members) // 2 + 1}
        return write_compact(terms.model_copy(update=given)).decode()

    monkeypatch.setattr(module, "secure_terms", lying)


@pytest.mark.parametrize("instead", [True, False])
@pytest.mark.parametrize("whose", ["the owner's own", "one that it made"])
def test_the_owner_among_the_members(carrier, monkeypatch, whose, instead):
    own = whose == "the owner's own"
    identity = open_identity(carrier.federated.config) if own else generate("sybil", days=30)
    keys = carrier.federated.config.keys
    if own:
        monkeypatch.setattr(TrustStore, "require", _trusting(TrustStore.require, identity))
    else:
        TrustStore(keys).add(identity.public.card, identity.public.fingerprint)
    _as_member(carrier, monkeypatch, identity, instead=instead)
    attacked(carrier)
    assert carrier.masked == {}


def _trusting(require, identity):
    def found(store, fingerprint, *, now):
        if fingerprint == identity.public.fingerprint and "owner" in str(store._folder):
            return identity.public
        return require(store, fingerprint, now=now)

    return found


def test_the_round_again_under_other_terms(carrier):
    """A second round of the same number, sealed anew, with another clip or for others: it was joined, once."""
    federated = carrier.federated
    with federated.opened() as federation:
        carried = lab.Carried(federated, federation).join(*federated.NAMES).close()
        other = federation._write_round(1, "train", federated.key("anna"), {}, None)
        job = federation.folder / "jobs" / federated.member("anna").job.job_id
        keyed = {"keys": federated.config.keys, "passphrase_file": federated.config.passphrase_file}
        manifest = carried.rounds["anna"].manifest.model_copy(update={"clip": 2.5, "start": {}, "files": {}})
        again = write_round(federated.folder / "again", manifest, start=other.load_start())
        sealed = federated.folder / "again.sealed"
        seal_run(SealConfig(input=again.path, output=sealed, job=job, round=1, **keyed))
        anna = federated.member("anna")
        with pytest.raises(Replayed, match="another content"):
            anna.take(sealed)
        elsewhere = federated.member("anna", work=str(federated.folder / "elsewhere"))
        with pytest.raises(Replayed, match="joined before"):
            elsewhere.answer(elsewhere.take(sealed))
        assert elsewhere.secure_round is None
        plain = federated.folder / "plain.sealed"
        seal_run(SealConfig(input=other.path, output=plain, job=job, round=1, **keyed))
        for member in (anna, elsewhere):
            with pytest.raises(PolicyError, match="the bundle itself"):
                member.take(plain)


# --- a lying client


def test_a_client_that_garbles_what_it_sends_is_left_out_with_a_reason(carrier, monkeypatch):
    """At every stage in turn: the others' sum is theirs, or there is none."""
    follow, bad = Member.follow, carrier.federated.key("cora")

    def garbled(member, sealed):
        if member.job.client != bad:
            return follow(member, sealed)
        return member._note(b"\x00" * 100, member._secure.round)

    monkeypatch.setattr(Member, "follow", garbled)
    with carrier.federated.opened() as federation:
        carrier.run(federation)
        content = federation.finished[0].content
    assert sorted(content["used"]) == sorted(carrier.federated.key(name) for name in ("anna", "bert"))
    assert content["left_out"][bad].startswith("BadSchema")


def test_a_client_with_no_node_whose_message_another_brings_takes_no_part(carrier, monkeypatch, capsys):
    """One hands in, sealed by itself, what another signed that is not there."""
    answer, federated, brought = Member.answer, carrier.federated, []
    advertise = ClientRound.advertise
    absent, _, bringer = sorted(federated.key(name) for name in federated.NAMES)  # the order in which they are asked

    def advertising(part):
        brought.append((part._own, advertise(part)))
        return brought[-1][1]

    def swapped(member, round_):
        sealed = answer(member, round_)
        if member.job.client == absent:
            raise RunFailed("not there")
        return member._note(dict(brought)[absent], round_) if member.job.client == bringer else sealed

    monkeypatch.setattr(ClientRound, "advertise", advertising)
    monkeypatch.setattr(Member, "answer", swapped)
    with federated.opened() as federation, pytest.raises(RunFailed, match="1 clients answered"):
        carrier.run(federation)
    assert "WrongBinding: a message that another client signed" in capsys.readouterr().err


def test_a_poisoned_box_ends_the_round_and_not_the_clients(carrier, monkeypatch):
    """Cora's shares for the others do not open: they refuse, give nothing, and the next round finds them there."""
    share, bad = ClientRound.share, carrier.federated.key("cora")

    def poisoned(part, roster):
        if part._own != bad:
            return share(part, roster)
        monkeypatch.setattr(ClientRound, "_seal", lambda *_: "A" * 110 + "==")
        try:
            return share(part, roster)
        finally:
            monkeypatch.setattr(ClientRound, "_seal", seal)

    seal = ClientRound._seal
    monkeypatch.setattr(ClientRound, "share", poisoned)
    attacked(carrier)
    for name in ("anna", "bert"):
        assert carrier.federated.member(name).secure_round is None
