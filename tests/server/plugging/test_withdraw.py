"""One client's adapter is taken out again: of the registry, of what is served, of adapted folders; and it is signed."""

from __future__ import annotations

import asyncio
import json
import shutil
from types import SimpleNamespace

import httpx
import pytest

from offsite import cli
from offsite.digests import model_digest, sha256_file
from offsite.errors import BadSchema, BadSignature, ConfigError, PolicyError, RunFailed, WrongBinding
from offsite.keys.trust import TrustStore
from offsite.modelling.load import load_model
from offsite.sealed.withdrawal import read_withdrawal
from server.plugging.config import PlugConfig, WithdrawConfig
from server.plugging.plug import run as plug_in
from server.plugging.withdraw import run as withdraw
from server.registry.federations import FederationStore
from server.registry.registry import Registry
from server.serving.config import ServeConfig
from server.serving.serve import mark_served, serve


@pytest.fixture(scope="module")
def low_rank(make_bundle, dropped_package, tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("made") / "bundle", dropped_package, kind="lora", rank=2, shake=0.02)


@pytest.fixture
def owner(shelve, low_rank, dropped_package, make_party, tmp_path):
    """An owner with one accepted bundle in its registry."""
    party = make_party("owner")
    named = shelve(low_rank.path, dropped_package.path, tmp_path / "shelf")
    shutil.copytree(party.keys, named["keys"], dirs_exist_ok=True)
    return SimpleNamespace(**named, party=party)


def settings(owner, tmp_path, **changes):
    common = {"id": owner.id, "registry": owner.registry, "keys": owner.keys}
    stated = {"output": tmp_path / "withdrawal.json", "passphrase_file": owner.party.passphrase, **common}
    return WithdrawConfig(**{**stated, **changes})


def test_what_was_plugged_in_and_served_is_gone_and_the_statement_says_so(owner, llama_folder, tmp_path):
    named = {"id": owner.id, "registry": owner.registry, "keys": owner.keys}
    plug_in(PlugConfig(model=str(llama_folder), output=tmp_path / "adapted", **named))
    mark_served(tmp_path / "adapted", owner.registry, owner.keys)
    manifest = sha256_file(tmp_path / "adapted" / "offsite.json")
    config = settings(owner, tmp_path, adapted=(tmp_path / "adapted",), model=str(llama_folder))
    told = withdraw(config)
    assert not (tmp_path / "adapted").exists()
    with Registry.open(owner.registry, owner.keys) as registry:
        assert registry.entry(owner.id).state == "withdrawn"
        assert not registry.bundle_folder(owner.id).exists()
        registry.verify_log()
        for forbidden in (lambda: registry.advance(owner.id, "plugged-in"), lambda: registry.refuse(owner.id)):
            with pytest.raises(PolicyError, match="was withdrawn"):
                forbidden()
    with pytest.raises(PolicyError, match="was withdrawn"):
        plug_in(PlugConfig(model=str(llama_folder), output=tmp_path / "again", **named))

    statement, verify = read_withdrawal((tmp_path / "withdrawal.json").read_bytes())
    verify(owner.party.identity.public)
    assert (statement.was, statement.removed, statement.model_checked) == ("served", (manifest,), True)
    assert statement.base_digest == model_digest(load_model(str(llama_folder)))  # as before anything was plugged in
    assert statement.sums == ()
    assert told["bundle"] == statement.bundle
    text = (tmp_path / "withdrawal.json").read_text()
    assert "adapted" not in text
    assert str(tmp_path) not in text


def test_again_it_only_signs_what_is_so(owner, tmp_path):
    withdraw(settings(owner, tmp_path))
    again = settings(owner, tmp_path, output=tmp_path / "second.json", adapted=(tmp_path / "was-here",))
    assert withdraw(again)["was"] == "withdrawn"
    with pytest.raises(ConfigError, match="exists"):
        withdraw(again)


def test_a_folder_of_another_bundle_or_another_model_stops_it_before_anything_is_done(
    owner, plug_in, make_bundle, dropped_package, llama_folder, make_package, full_llama, save_model, tmp_path
):
    other = make_bundle(tmp_path / "other", dropped_package, kind="lora", rank=1, shake=0.02)
    plug_in(llama_folder, other, tmp_path / "theirs", package=dropped_package.path)
    with pytest.raises(WrongBinding, match="holds another bundle"):
        withdraw(settings(owner, tmp_path, adapted=(tmp_path / "theirs",)))
    changed = load_model(str(llama_folder))
    changed.model.norm.weight.data += 1
    save_model(changed, tmp_path / "changed")
    with pytest.raises(WrongBinding, match="has digest"):
        withdraw(settings(owner, tmp_path, model=str(tmp_path / "changed")))
    assert (tmp_path / "theirs").exists()
    assert not (tmp_path / "withdrawal.json").exists()
    with Registry.open(owner.registry, owner.keys) as registry:
        assert registry.entry(owner.id).state == "accepted"


def test_what_was_never_accepted_is_refused_instead(shelve, low_rank, dropped_package, make_party, tmp_path):
    party = make_party("owner")
    named = shelve(low_rank.path, dropped_package.path, tmp_path / "shelf", state="verified")
    shutil.copytree(party.keys, named["keys"], dirs_exist_ok=True)
    owner = SimpleNamespace(**named, party=party)
    with pytest.raises(PolicyError, match="nothing to take out again") as found:
        withdraw(settings(owner, tmp_path))
    assert found.value.hint == f"offsite registry refuse {owner.id}"
    with pytest.raises(ConfigError, match="needs an id"):
        withdraw(settings(owner, tmp_path, id="latest"))


def test_a_round_stays_taken_and_files_do_not_come_back(owner, tmp_path):
    withdraw(settings(owner, tmp_path))
    with Registry.open(owner.registry, owner.keys) as registry:
        entry = registry.entry(owner.id)
        verdict = registry.verdict(entry.digest)
        assert (verdict.state, verdict.is_again, verdict.is_final) == ("withdrawn", True, True)
        seen = registry.seen(SimpleNamespace(job_id=entry.job_id, issuer=entry.client, round=1, sequence=2))
        assert seen.holder == entry.digest
        registry.bundle_folder(owner.id).mkdir()
        registry.collect()  # as the next opening does with what a crash left
        assert not registry.bundle_folder(owner.id).exists()


def test_what_a_federation_summed_up_is_named(owner, tmp_path):
    with Registry.open(owner.registry, owner.keys) as registry:
        entry = registry.entry(owner.id)
        ours = FederationStore(registry, "ours", {"jobs": [entry.job_id]})
        left_out = FederationStore(registry, "left-out", {"jobs": [entry.job_id]})
        FederationStore(registry, "elsewhere", {"jobs": ["0" * 32]}).finish(1, {"used": [entry.client]})
        for number in (1, 2, 3):
            ours.finish(number, {"used": [entry.client] if number == 1 else []})
        left_out.finish(1, {"used": []})
    (found,) = withdraw(settings(owner, tmp_path))["sums"]
    assert found == {"federation": ours.id, "round": 1, "rounds_since": 2}


def test_the_client_reads_it_and_one_that_was_changed_is_refused(owner, make_party, capsys, tmp_path):
    withdraw(settings(owner, tmp_path))
    client, public = make_party("client"), owner.party.identity.public
    shown = ["inspect", str(tmp_path / "withdrawal.json"), "--keys", str(client.keys)]
    assert cli.run(shown) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["verified"] is False
    assert "not pinned" in err
    TrustStore(client.keys).add(public.card, public.fingerprint)
    assert cli.run(shown) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verified"] is True

    whole = json.loads((tmp_path / "withdrawal.json").read_text())
    forged = {**whole, "statement": whole["statement"].replace('"model_checked":false', '"model_checked":true')}
    assert forged != whole
    (tmp_path / "withdrawal.json").write_text(json.dumps(forged))
    assert cli.run(shown) == 3
    assert "signature over the withdrawal does not verify" in capsys.readouterr().err
    for bad in ({**whole, "path": "x"}, {**whole, "statement": "{}"}, {"format": whole["format"]}):
        with pytest.raises(BadSchema):
            read_withdrawal(json.dumps(bad).encode())
    _, verify = read_withdrawal(json.dumps(whole).encode())
    with pytest.raises(BadSignature, match="another issuer"):
        verify(client.identity.public)


def asked_while_served(owner, tmp_path, monkeypatch):
    """What a server lists before and after the bundle is withdrawn, once one was started."""
    found = []

    async def models(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            answer = await client.get("/v1/models", headers={"Authorization": "Bearer a-key"})
        found.append([one["id"] for one in answer.json()["data"]])

    class Asked:
        def __init__(self, app):
            self.app, self.should_exit = app, False

        def run(self, sockets):
            asyncio.run(models(self.app))
            withdraw(settings(owner, tmp_path))
            asyncio.run(models(self.app))

    monkeypatch.setattr("server.serving.serve.Process", Asked)
    monkeypatch.setenv("OFFSITE_API_KEY", "a-key")
    return found


def test_a_folder_is_served_no_longer_once_its_bundle_is_withdrawn(owner, llama_folder, monkeypatch, tmp_path):
    named = {"id": owner.id, "registry": owner.registry, "keys": owner.keys}
    plug_in(PlugConfig(model=str(llama_folder), output=tmp_path / "adapted", **named))
    found = asked_while_served(owner, tmp_path, monkeypatch)
    serve(ServeConfig(adapted=tmp_path / "adapted", registry=owner.registry, keys=owner.keys, model_id="m", port=0))
    assert found == [["m"], []]
    with pytest.raises(PolicyError, match="was withdrawn"):
        serve(ServeConfig(adapted=tmp_path / "adapted", registry=owner.registry, keys=owner.keys, port=0))


def test_nothing_is_signed_of_what_still_stands(owner, llama_folder, monkeypatch, tmp_path):
    named = {"id": owner.id, "registry": owner.registry, "keys": owner.keys}
    plug_in(PlugConfig(model=str(llama_folder), output=tmp_path / "adapted", **named))
    (tmp_path / "link").symlink_to(tmp_path / "adapted")
    with pytest.raises(ConfigError, match="is a link"):
        withdraw(settings(owner, tmp_path, adapted=(tmp_path / "link",)))
    with monkeypatch.context() as patch:
        patch.setattr("server.plugging.withdraw.remove", lambda path: None)
        with pytest.raises(RunFailed, match="could not be deleted whole"):
            withdraw(settings(owner, tmp_path, adapted=(tmp_path / "adapted",)))
    assert not (tmp_path / "withdrawal.json").exists()
    twice = (tmp_path / "adapted", tmp_path / "shelf" / ".." / "adapted")
    assert len(withdraw(settings(owner, tmp_path, adapted=twice))["removed"]) == 1


def test_an_adapter_that_is_named_is_served_no_longer_either(owner, llama_folder, monkeypatch, tmp_path):
    named = {"id": owner.id, "registry": owner.registry, "keys": owner.keys}
    plug_in(PlugConfig(model=str(llama_folder), output=tmp_path / "adapted", **named))
    monkeypatch.setattr("server.serving.catalogue._LOOK_SECONDS", 0)
    found = asked_while_served(owner, tmp_path, monkeypatch)
    common = {"adapted": llama_folder, "adapter": {"x": tmp_path / "adapted"}, "port": 0, "model_id": "m"}
    serve(ServeConfig(registry=owner.registry, keys=owner.keys, **common))
    assert [name for name in found[0] if name in ("m", "x")] == ["m", "x"]
    assert found[1] == ["m"]
    with pytest.raises(PolicyError, match="was withdrawn"):
        serve(ServeConfig(registry=owner.registry, keys=owner.keys, **common))
