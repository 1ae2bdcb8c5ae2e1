"""Messages of secure rounds over the exchange: whose, of which round, how large, how many; kept as they were sealed."""

from __future__ import annotations

import json
import shutil

import pytest

from client.exchange.http import ExchangeClient
from client.exchange.verbs import hand_in
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import JOB_NAME
from offsite.artefacts.round import ROUND_FORMAT, RoundManifest, write_round
from offsite.errors import (
    ArtefactError,
    BadSignature,
    ConfigError,
    Replayed,
    TooLarge,
    Untrusted,
    WrongBinding,
    WrongNames,
    WrongRecipient,
)
from offsite.exchange.verbs import open_run, seal_run
from offsite.keys.trust import TrustStore
from offsite.sealed.config import OpenConfig, SealConfig
from offsite.sealed.folder import read_sealed
from offsite.sealed.ledger import Ledger
from offsite.sealed.manifest import NOTE_NAME, SealedManifest
from offsite.secagg.fixedpoint import TensorShape
from offsite.secagg.terms import make_terms
from offsite.strictjson import write_compact
from server.registry.federations import FederationStore, is_finished
from server.registry.messages import MessageStore

SHAPES = (TensorShape(name="b", shape=(200, 100)),)
"""So that a masked vector is larger than any other message."""


class Owner:
    """The owner's side, of which one secure round was asked of one client, and what that client can send."""

    def __init__(self, live, job, folder):
        self.live, self.job, self.folder = live, live.add(job), folder
        self.numbers = iter(range(1, 1000))
        with live.registry() as registry:
            self.store = FederationStore(registry, "federation", {"jobs": [job.job_id]})
            self.terms = make_terms(
                federation=self.store.id,
                round=1,
                members=[job.client, job.owner],
                threshold=2,
                limit=1.0,
                shapes=SHAPES,
            )
            self.ask(registry, 1, write_compact(self.terms).decode())
            self.ask(registry, 2, None)

    def ask(self, registry, number, secure):
        plain = write_round(
            self.folder / f"round-{number}",
            RoundManifest(
                format=ROUND_FORMAT, federation_id=self.store.id, round=number, num_rounds=2, steps=1,
                package_digest=self.job.package_digest, base_digest=self.job.base_digest,
                adapter=AdapterSpec(kind="lora", rank=1), secure=secure, clip=secure and 1.0,
            ),
        )  # fmt: skip
        shutil.move(plain.path, registry.round_folder(plain.digest))
        store = FederationStore(registry, "federation", {"jobs": [self.job.job_id]})
        store.ask({self.job.client: self.job.job_id}, {self.job.client: plain.digest}, number)

    def note(self, content=b"{}", *, job=None, **changes):
        """What the client seals: sound, or as changed as nobody should."""
        number = next(self.numbers)
        plain = self.folder / f"note-{number}"
        plain.mkdir()
        (plain / NOTE_NAME).write_bytes(content)
        stated = {"kind": "note", "sequence": number, **changes}
        return self.live.seal(self.folder / f"note-{number}.sealed", job or self.job, bundle=plain, **stated)

    def hand_in(self, sealed, party=None):
        with ExchangeClient(
            self.live.url,
            (party or self.live.client).identity,
            self.live.owner.fingerprint,
            patience_seconds=5.0,
            timeout_seconds=5.0,
        ) as exchange:
            return hand_in(exchange, sealed, verdict_seconds=20.0)[0]

    def kept(self):
        return [path for path in (self.live.registry_folder / "notes").rglob("*") if path.name == "manifest.json"]


@pytest.fixture
def owner(live_exchange, make_job, tmp_path):
    made = Owner(live_exchange, make_job(), tmp_path)
    live_exchange.start()
    return made


def digest_of(sealed):
    return read_sealed(sealed).digest


def test_messages_are_kept_as_they_came_in_the_order_of_their_client(owner):
    sealed = [owner.note(b"one"), owner.note(b"two"), owner.note(b"three")]
    for one in (sealed[1], sealed[0], sealed[2], sealed[1]):  # again is no second one
        assert owner.hand_in(one).state == "accepted"
    with owner.live.registry() as registry:
        found = MessageStore(registry).of(owner.job.job_id, 1)
        assert [digest_of(path) for path in found] == [digest_of(one) for one in sealed]
        assert [path.name for path in found[0].rglob("*.enc")] == [path.name for path in sealed[0].rglob("*.enc")]
        assert [*registry.entries(), *(registry.folder / "bundles").iterdir()] == []
        assert MessageStore(registry).of(owner.job.job_id, 2) == MessageStore(registry).of("0" * 32, 1) == []


def test_what_is_no_message_of_that_client_s_round_is_refused_before_its_payload_comes(owner, make_job, monkeypatch):
    live, other = owner.live, make_job()
    live.add(other)
    with monkeypatch.context() as patch:  # the sealing side refuses it as well
        patch.setattr("offsite.sealed.encryption.check_names", lambda _: None)
        bundle = live.seal(owner.folder / "bundle-as-note", owner.job, kind="note")
    rows = [
        (WrongBinding, "no secure round that was asked", owner.note(round=2)),  # asked, and no secure one
        (WrongBinding, "no secure round that was asked", owner.note(job=other)),  # nothing was asked of it
        (Untrusted, "the key is unknown", owner.note(issuer=live.owner)),
        (WrongBinding, "the job has 2", owner.note(round=3)),
        (WrongRecipient, "", owner.note(recipients=[live.client.identity.public])),
        (TooLarge, "a message of this round", owner.note(bytes(owner.terms.num_vector_bytes + 16 * 2**10 + 1))),
        (WrongNames, "a note may not hold", bundle),
        (ArtefactError, "", owner.note(job=make_job())),  # a job that is nowhere
    ]
    for expected, why, sealed in rows:
        with pytest.raises(expected, match=why or None):
            owner.hand_in(sealed)
    assert owner.kept() == []
    assert list((live.registry_folder / "uploads").glob("*")) == []


def test_a_note_by_hand_of_another_client_is_refused(owner, make_party):
    """A client that the owner trusts as well, and whose job it is not."""
    stranger = make_party("stranger")
    TrustStore(owner.live.owner.keys).add(stranger.identity.public.card, stranger.fingerprint)
    for sealed, party in ((owner.note(issuer=stranger), stranger), (owner.note(), stranger)):
        with pytest.raises(ArtefactError):
            owner.hand_in(sealed, party)
    assert owner.kept() == []


def test_a_signature_that_is_none_is_refused_before_anything_is_read(owner):
    sealed = owner.note()
    manifest = json.loads((sealed / "manifest.json").read_text())
    (sealed / "manifest.json").write_text(json.dumps({**manifest, "round": 2}, sort_keys=True))
    with pytest.raises(BadSignature):
        owner.hand_in(sealed)
    assert owner.kept() == []


def test_a_flood_ends_at_sixteen_and_at_one_masked_vector(owner):
    large = bytes(owner.terms.num_vector_bytes + 1000)
    assert len(large) > owner.terms.limit_bytes
    first = owner.note(large)
    owner.hand_in(first)
    with pytest.raises(Replayed, match="a masked vector of round 1 has come already"):
        owner.hand_in(owner.note(large))
    for _ in range(15):
        owner.hand_in(owner.note())
    with pytest.raises(Replayed, match="16 notes of round 1"):
        owner.hand_in(owner.note())
    assert owner.hand_in(first).state == "accepted"  # which is there
    assert len(owner.kept()) == 16


def test_a_round_that_is_closed_takes_no_more(owner):
    owner.hand_in(owner.note())
    with owner.live.registry() as registry:
        store = FederationStore(registry, "federation", {"jobs": [owner.job.job_id]})
        assert not is_finished(registry, store.id, 1)
        store.finish(1, {"used": []})
        assert is_finished(registry, store.id, 1)
        MessageStore(registry).clear(1)
    with pytest.raises(WrongBinding, match="is closed"):
        owner.hand_in(owner.note())
    assert owner.kept() == []


def test_a_payload_that_is_not_what_was_signed(owner):
    sealed = owner.note(b"x" * 100)
    payload = next((sealed / "payload").iterdir())
    with owner.live.registry() as registry:
        box = MessageStore(registry)
        manifest = SealedManifest.model_validate_json((sealed / "manifest.json").read_bytes())
        box.check(manifest, owner.job)
        sound = payload.read_bytes()
        for changed in (sound[:-1] + bytes([sound[-1] ^ 1]), sound[:-1], None):
            payload.unlink(missing_ok=True)
            if changed is not None:
                payload.write_bytes(changed)
            with pytest.raises(ArtefactError):
                box.keep(sealed, manifest)
        assert not box.has(manifest)
        payload.write_bytes(sound)
        box.keep(sealed, manifest)
        box.keep(sealed, manifest)
        assert box.has(manifest)
    assert len(owner.kept()) == 1


# --- the sealed kind, by either side


@pytest.fixture
def known_job(live_exchange, make_job, tmp_path):
    """A job that both sides know, as its folder, and how either of them seals and opens."""
    job = live_exchange.add(make_job())
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / JOB_NAME).write_bytes(write_compact(job))
    parties = {"owner": live_exchange.owner, "client": live_exchange.client}
    keyed = {name: {"keys": one.keys, "passphrase_file": one.passphrase} for name, one in parties.items()}
    seal_run(SealConfig(input=folder, output=tmp_path / "job.sealed", **keyed["owner"]))
    open_run(OpenConfig(sealed=tmp_path / "job.sealed", output=tmp_path / "opened", **keyed["client"]))
    return folder, keyed


def test_a_note_is_sealed_and_opened_by_either_side(known_job, tmp_path):
    folder, keyed = known_job
    for sender, receiver in (("owner", "client"), ("client", "owner")):
        plain = tmp_path / sender
        plain.mkdir()
        (plain / NOTE_NAME).write_bytes(f"from {sender}".encode())
        sealed, out = tmp_path / f"{sender}.sealed", tmp_path / f"{sender}.opened"
        told = seal_run(SealConfig(input=plain, output=sealed, job=folder, round=2, **keyed[sender]))
        assert (told["kind"], told["round"]) == ("note", 2)
        open_run(OpenConfig(sealed=sealed, output=out, **keyed[receiver]))
        assert (out / NOTE_NAME).read_bytes() == f"from {sender}".encode()
        assert [path.name for path in out.iterdir()] == [NOTE_NAME]
        with pytest.raises(ArtefactError):  # not one's own
            open_run(OpenConfig(sealed=sealed, output=tmp_path / "own", **keyed[sender]))
        with Ledger(keyed[sender]["keys"]) as ledger:
            assert ledger.last_round(told["job_id"], "note") == 2


@pytest.mark.parametrize(("number", "expected"), [(0, ConfigError), (3, ConfigError), (None, None)])
def test_a_note_is_of_a_round_of_the_job(known_job, tmp_path, number, expected):
    folder, keyed = known_job
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / NOTE_NAME).write_bytes(b"")
    sealing = SealConfig(input=plain, output=tmp_path / "sealed", job=folder, round=number, **keyed["client"])
    if expected is None:
        assert seal_run(sealing)["round"] == 1
        return
    with pytest.raises(expected, match="has rounds 1 to 2"):
        seal_run(sealing)


@pytest.mark.parametrize("change", ["another file", "a link", "a folder"])
def test_a_folder_that_is_no_note(known_job, tmp_path, change):
    folder, keyed = known_job
    plain = tmp_path / "plain"
    plain.mkdir()
    if change == "another file":
        (plain / NOTE_NAME).write_bytes(b"x")
        (plain / "more.bin").write_bytes(b"x")
    elif change == "a link":
        (plain / NOTE_NAME).symlink_to(folder / JOB_NAME)
    else:
        (plain / NOTE_NAME).mkdir()
    with pytest.raises(ArtefactError):
        seal_run(SealConfig(input=plain, output=tmp_path / "sealed", job=folder, **keyed["client"]))
    assert not (tmp_path / "sealed").exists()
