"""The federation on the owner's side: who is asked, what counts, what is left on disk, and going on from it."""

from __future__ import annotations

import json

import pytest
import torch

from adapters.norms import adapted_names, base_tensors
from adapters.rounds import grown
from adapters.updates import combined, dense, to_tensors
from offsite.artefacts.job import Job
from offsite.artefacts.round import open_round
from offsite.errors import BadDigest, ConfigError, NormTooLarge, RunFailed, WrongBinding
from offsite.exchange.packing import pack
from offsite.keys.trust import TrustStore
from server.federation.state import SHARED
from server.plugging.config import PlugConfig
from server.plugging.plug import run as plug
from server.registry.intake import asked_round
from server.registry.verify import adapter_tensors, expected_tensors, verify_adapter


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, part in wanted.items():
        torch.testing.assert_close(dense(found[name]), dense(part), rtol=1e-5, atol=1e-7)


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- asking


def test_asked_again_it_is_the_same(federated):
    with federated.opened() as federation:
        first = {client: bytes_of(folder) for client, folder in federation.ask(1).items()}
        assert first.keys() == set(map(federated.key, federated.NAMES))
    with federated.opened() as federation:
        assert {client: bytes_of(folder) for client, folder in federation.ask(1).items()} == first


def test_an_outbox_that_was_lost_is_filled_anew(federated):
    """The seal is another, the round is the same: the client's ledger takes it, its work is not done twice."""
    with federated.opened() as federation:
        asked = federation.ask(1)[federated.key("anna")]
        sealed = bytes_of(federated.answer("anna", asked))
        for path in asked.rglob("*"):
            if path.is_file():
                path.unlink()
        (asked / "payload").rmdir()
        asked.rmdir()
        again = federation.ask(1)[federated.key("anna")]
        assert bytes_of(federated.answer("anna", again)) == sealed


def test_a_share_is_drawn_once(make_federated):
    federated = make_federated(fraction=0.34, min_clients=1)
    with federated.opened() as federation:
        (drawn,) = federation.ask(1)
    for _ in range(4):
        with federated.opened() as federation:
            assert list(federation.ask(1)) == [drawn]
    drawn_ever = set()
    with federated.opened() as federation:
        for _ in range(60):
            drawn_ever |= set(federation._draw())
    assert len(drawn_ever) == 3


def test_at_least_as_many_are_drawn_as_are_needed(make_federated):
    federated = make_federated(fraction=0.01, min_clients=2)
    with federated.opened() as federation:
        assert len(federation.ask(1)) == 2


def test_coins_that_came_to_nobody_are_not_thrown_again(make_federated, monkeypatch):
    """The accountant knows of one throw a round; of several, those that came to nobody would never count."""
    privacy = {"noise_multiplier": 1.0, "clip": 1.0, "delta": 0.01, "fraction": 0.5, "min_clients": 1}
    federated = make_federated(**privacy)
    monkeypatch.setattr("server.federation.federation.drawn", lambda _keys, _rate: ())
    with federated.opened() as federation:
        assert federation.ask(1) == {}
    monkeypatch.setattr("server.federation.federation.drawn", lambda keys, _rate: tuple(keys))
    with federated.opened() as federation:
        assert federation.ask(1) == {}
        federation.close_round(1, {})
        assert len(federation.ask(2)) == len(federated.NAMES)


def test_only_the_newest_round_is_offered(federated):
    with federated.opened() as federation:
        federated.round(federation, 1)
        federation.ask(2)
        assert sorted({path.name[-4:] for path in federated.outbox.iterdir()}) == ["0002"]
        assert len(list(federated.outbox.iterdir())) == 3


def test_what_a_round_asks(make_federated):
    federated = make_federated(proximal=0.25, learning_rate=1e-3, share_a=True)
    with federated.opened() as federation:
        federated.round(federation, 1)
        asked = {name: federated.member(name).take(federation.ask(2)[federated.key(name)]) for name in federated.NAMES}
        found = asked["anna"].manifest
        assert (found.round, found.num_rounds, found.steps, found.task) == (2, 3, 2, "train")
        assert (found.learning_rate, found.proximal, found.federation_id) == (1e-3, 0.25, federation.store.id)
        assert len({one.digest for one in asked.values()}) == 1
        wanted = to_tensors(federation.states[SHARED])
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in asked["anna"].load_update().items())
        first = open_round(
            federation.registry.round_folder(federation.registry.asked(federated.member("anna").job.job_id, 1))
        ).load_start()
        second = asked["anna"].load_start()
        assert first.keys() == second.keys() == {name for name in second if name.endswith(".lora_A")}
        assert all(not torch.equal(first[name], second[name]) for name in first)


def test_the_end_is_told(federated):
    with federated.opened() as federation:
        federation.say_finished()
        federation.say_finished()
        folders = sorted(federated.outbox.iterdir())
        assert [path.name[:6] for path in folders] == ["finish"] * 3
        job = federated.member("anna").job.job_id
        (own,) = [path for path in folders if job[:12] in path.name]
        assert federated.member("anna").take(own).manifest.task == "finish"


# --- closing


@pytest.mark.parametrize("rate", [1.0, 1.5])
def test_the_sum_of_rounds_is_the_sum_of_means_times_the_server_s_rate(make_federated, rate):
    federated, total = make_federated(server_learning_rate=rate), None
    with federated.opened() as federation:
        for number in (1, 2):
            federated.round(federation, number)
            updates = [federation.contribution(entry).update for entry in federation.answers(number).values()]
            step = combined(updates, [rate / 3] * 3)
            total = step if total is None else combined([total, step], [1.0, 1.0])
            same(federation.states[SHARED], total)
            assert {entry.state for entry in federation.answers(number).values()} == {"accepted"}
    with federated.opened() as federation:
        same(federation.states[SHARED], total)
        assert federation.num_finished == 2


def test_rounds_on_every_kept_block_of_a_dropped_package(make_federated, kept_package):
    federated = make_federated(package=kept_package, placement="all")
    with federated.opened() as federation:
        federated.round(federation, 1)
        federated.round(federation, 2)
        updates = [federation.contribution(entry).update for entry in federation.answers(2).values()]
        middle = {name.split(".")[1] for name in combined(updates, [1 / 3] * 3) if name.startswith("middle.")}
        assert middle == {name.split(".")[1] for name in federation.states[SHARED] if name.startswith("middle.")}
        assert middle == {"0", "1"}


def test_personal_states_are_each_client_s_own(make_federated):
    federated = make_federated(mode="personal")
    with federated.opened() as federation:
        federated.round(federation, 1)
        federated.round(federation, 2, names=("anna", "bert"))
        assert federation.states.keys() == set(map(federated.key, federated.NAMES))
        for name, rounds in (("anna", (1, 2)), ("cora", (1,))):
            own = [federation.contribution(federation.answers(n)[federated.key(name)]).update for n in rounds]
            same(federation.states[federated.key(name)], combined(own, [1.0] * len(own)))
        asked = federation.ask(3)
        found = federated.member("cora").take(asked[federated.key("cora")]).load_update()
        wanted = to_tensors(federation.states[federated.key("cora")])
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_too_few_change_nothing(federated):
    with federated.opened() as federation:
        with pytest.raises(RunFailed, match="1 sound answer"):
            federated.round(federation, 1, names=("anna",))
        assert (federation.states, federation.finished) == ({}, [])
        assert not list(federation.registry.folder.glob("federations/*/after-*"))
        federated.round(federation, 1, names=("bert",))
        assert sorted(federation.finished[0].content["used"]) == sorted(map(federated.key, ("anna", "bert")))


def test_a_state_that_was_changed_is_not_gone_on_from(federated):
    with federated.opened() as federation:
        federated.round(federation, 1)
        (path,) = federation.registry.folder.glob("federations/*/after-0001/*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BadDigest, match="what round 1 left"), federated.opened():
        pass
    path.unlink()
    with pytest.raises(BadDigest, match="what round 1 left"), federated.opened():
        pass
    path.write_bytes(whole)
    with federated.opened() as federation:
        assert federation.num_finished == 1


def test_a_round_that_was_changed_in_the_registry_is_the_owner_s_fault(federated):
    """No client is refused for it, and what it sealed counts once the round is put back."""
    with federated.opened() as federation:
        federated.round(federation, 1)
        asked = federation.ask(2)
        parts = pack(federated.answer("anna", asked[federated.key("anna")]))
        job = federated.member("anna").job.job_id
        folder = federation.registry.round_folder(federation.registry.asked(job, 2))
        kept = (folder / "offsite.json").read_bytes()
        for broken in (kept.replace(b'"steps": 2', b'"steps": 3'), kept[:-9]):
            (folder / "offsite.json").write_bytes(broken)
            with pytest.raises(ConfigError, match="round 2 of job"):
                federation.take_in(parts)
        (folder / "offsite.json").write_bytes(kept)
        assert federation.take_in(parts).state == "verified"
        assert asked_round(federation.registry, job, 3) is None


# --- who takes part


def add_job(federated, federation, name, **changes):
    job = federated.member(name).job
    other = Job(**{**dict(job), "job_id": "f" * 32, **changes})
    federation.registry.add_job(other, package=federated.package.path, client_name=name)
    return other


def test_two_jobs_of_one_client(federated):
    with federated.opened() as federation:
        other = add_job(federated, federation, "anna")
    with pytest.raises(ConfigError, match="client 'anna' has 2 jobs"), federated.opened(jobs=()):
        pass
    others = tuple(federated.member(name).job.job_id for name in ("bert", "cora"))
    with federated.opened(jobs=(other.job_id, *others), name="second") as federation:
        assert federation.participants[federated.key("anna")].job == other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 2}, "allows 2 round"),
        ({"adapter": {"rank": 3}}, "ask for different adapters"),
        ({"expires": 2}, "is no valid job"),
    ],
)
def test_jobs_that_do_not_fit(federated, changes, message):
    with federated.opened() as federation:
        job = federated.member("anna").job
        if "adapter" in changes:
            changes = {"adapter": job.adapter.model_copy(update=changes["adapter"])}
        if "expires" in changes:
            changes = {**changes, "created": 1}
        other = add_job(federated, federation, "anna", **changes)
    jobs = (other.job_id, *(federated.member(name).job.job_id for name in ("bert", "cora")))
    with pytest.raises(ConfigError, match=message), federated.opened(jobs=jobs, name="second"):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": ("dead",)}, "'dead' is no valid job"),
        ({"min_clients": 4}, "3 client"),
        ({"rounds": 4}, "allows 3 round"),
        ({"rule": "krum", "num_byzantine": 1}, "krum"),
        ({"steps": 3}, "begun with other settings: steps differ"),
        ({"name": "no registry", "registry": "nowhere"}, "is no registry"),
        ({"package": "nowhere"}, "no package folder named 'nowhere'"),
    ],
)
def test_settings_that_do_not_fit(federated, changes, message):
    from pathlib import Path

    changes = {name: Path(value) if name in ("registry", "package") else value for name, value in changes.items()}
    with federated.opened():
        pass
    with pytest.raises(ConfigError, match=message), federated.opened(**changes):
        pass


def test_a_client_that_is_revoked_takes_part_no_more(federated):
    with federated.opened() as federation:
        federated.round(federation, 1)
        TrustStore(federated.config.keys).revoke(federated.key("cora"))
        asked = federation.ask(2)  # in the middle of a run: it is left out, and the others are asked
        assert asked.keys() == set(map(federated.key, ("anna", "bert")))
        federated.round(federation, 2, names=("anna", "bert"))
    others = tuple(federated.member(name).job.job_id for name in ("anna", "bert"))
    with federated.opened(jobs=others) as federation:
        assert federation.participants.keys() == set(map(federated.key, ("anna", "bert")))
        federated.round(federation, 3, names=("anna", "bert"))
        federation.say_finished()


def test_another_federation_does_not_take_the_answers_of_the_first(federated):
    with federated.opened() as federation:
        federated.round(federation, 1)
    message = "has rounds of another federation than 'second'"
    with pytest.raises(ConfigError, match=message), federated.opened(name="second", steps=9):
        pass
    with federated.opened() as federation:
        assert federation.num_finished == 1


def test_one_process_at_a_time(federated):
    with federated.opened(), pytest.raises(ConfigError, match="a federation is running"), federated.opened():
        pass
    with federated.opened():
        pass


# --- what the registry makes of its bundles


def test_a_later_round_s_bundle_is_not_plugged_into_the_full_model(federated, llama_folder, tmp_path):
    with federated.opened() as federation:
        federated.round(federation, 1)
        federated.round(federation, 2)
        ids = [federation.answers(number)[federated.key("anna")].id for number in (1, 2)]

    def plug_in(number):
        config = federated.config
        plug(PlugConfig(id=ids[number - 1], model=str(llama_folder), output=tmp_path / "out", registry=config.registry,
                        keys=config.keys))  # fmt: skip

    with pytest.raises(ConfigError, match="answers round 2 of a federation"):
        plug_in(2)
    assert not (tmp_path / "out").exists()
    plug_in(1)


@pytest.mark.parametrize(("stated", "asked"), [(None, "sha256:" + "1" * 64), ("sha256:" + "1" * 64, None)])
def test_a_bundle_s_round_is_the_one_that_was_asked(federated, stated, asked):
    with federated.opened() as federation:
        round_ = federated.member("anna").take(federation.ask(1)[federated.key("anna")])
        bundle = federated.bundle(federated.folder / "own", round_, round_digest=stated)
        job, record = federated.member("anna").job, federation.record
        with pytest.raises(WrongBinding, match=r"answers .*round.* it was asked for"):
            expected_tensors("bundle x", bundle.manifest, record, job, asked)
        assert expected_tensors("bundle x", bundle.manifest, record, job, stated)


def test_whole_blocks_are_measured_from_what_rounds_added(make_federated):
    """The update's norm counts, not the distance from the package: rounds may go far in small steps, none at once."""
    federated = make_federated(adapter="blocks", max_relative_frobenius=0.5, max_relative_spectral=5.0, rounds=6)
    with federated.opened() as federation:
        spec, record = federation.spec, federation.record
        names = adapted_names(spec, record.layout, record.block_tensors)
        package = base_tensors(federated.package, names)
        for number in (1, 2, 3, 4):
            federated.round(federation, number, size=0.05, names=("anna", "bert"), seed=1)
        round_ = federated.member("anna").take(federation.ask(5)[federated.key("anna")])
        base = grown(package, round_)
        for name in names:
            wanted = package[name].double() + dense(federation.states[SHARED][name]).double()
            torch.testing.assert_close(base[name].double(), wanted, rtol=1e-6, atol=1e-6)
        bundle = federated.bundle(federated.folder / "own", round_, size=0.05)
        job = federated.member("anna").job
        envelope = type("Envelope", (), {"job_id": job.job_id, "issuer": job.client, "round": 5})()
        given = {
            "envelope": envelope, "job": job, "record": record, "bundle_digest": "d", "round_digest": round_.digest,
        }  # fmt: skip
        tensors = bundle.load_tensors(adapter_tensors(spec, record))
        found = verify_adapter("bundle x", bundle.manifest, tensors, base, **given)
        assert max(norms.relative_frobenius for norms in found.norms.values()) < 0.5
        with pytest.raises(NormTooLarge):
            verify_adapter("bundle x", bundle.manifest, tensors, package, **given)


def test_what_is_told_of_a_round_is_json(federated):
    with federated.opened() as federation:
        finished = federated.round(federation, 1, names=("anna", "bert"))
        assert json.loads(json.dumps(finished.content)) == finished.content
        assert set(finished.content["norms"]) == set(finished.content["used"])
