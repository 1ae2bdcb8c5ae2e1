"""A client's part in a round: begun once, gone on with from anywhere, answered once, refused by its own rules."""

from __future__ import annotations

import json
import shutil

import pytest

from client.federation.config import JoinConfig, MemberConfig
from client.federation.join import join_run
from client.privacy.budget import BudgetLedger
from offsite.artefacts.bundle import open_bundle
from offsite.config import build
from offsite.errors import (
    ArtefactError,
    BadDigest,
    ConfigError,
    DataError,
    PolicyError,
    Replayed,
    RunFailed,
    Untrusted,
    WrongBinding,
    WrongRecipient,
)
from offsite.exchange.packing import pack
from offsite.keys.trust import TrustStore


@pytest.fixture
def counted(monkeypatch):
    """How often the client tuned and sealed."""
    import client.federation.member as module

    found = {"tune": 0, "seal_run": 0}
    for name in found:
        monkeypatch.setattr(module, name, counting(found, name, getattr(module, name)))
    return found


def counting(found, name, function):
    def counted(*args, **kwargs):
        found[name] += 1
        return function(*args, **kwargs)

    return counted


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- an answer, and going on with one


def test_a_round_is_taken_tuned_on_sealed_and_verified(federated, asked, counted):
    member = federated.member("anna")
    round_ = member.take(asked["anna"])
    sealed = member.answer(round_)
    assert round_.path == member.config.work / "round-0001" / "round"
    assert sealed == member.config.work / "round-0001" / "sealed"
    assert open_bundle(sealed.parent / "bundle").manifest.round_digest == round_.digest
    assert not (sealed.parent / "bundle.work").exists()
    assert json.loads((sealed.parent / "sealed.release.json").read_text())["accepted_leakage"] is True
    with federated.opened() as federation:
        assert federation.take_in(pack(sealed)).state == "verified"
    before = files(member.config.work)
    assert member.answer(member.take(asked["anna"])) == sealed
    assert files(member.config.work) == before
    assert counted == {"tune": 1, "seal_run": 1}


POINTS = {
    "opened, not in its place": ("client.federation.member.Member._place", 0, {"tune": 1, "seal_run": 1}),
    "in its place": ("client.federation.member.Member._answered", 0, {"tune": 1, "seal_run": 1}),
    "tuned, not written": ("client.tuning.verb.write_bundle", 1, {"tune": 2, "seal_run": 1}),
    "written, its checkpoints there": ("client.tuning.verb._finish", 1, {"tune": 1, "seal_run": 1}),
    "bundle, not sealed": ("offsite.exchange.verbs.encrypt_files", 1, {"tune": 1, "seal_run": 2}),
    "sealed, not in its place": ("offsite.exchange.verbs.write_release", 1, {"tune": 1, "seal_run": 2}),
}


@pytest.mark.parametrize("point", POINTS)
def test_broken_off_anywhere_it_goes_on(federated, asked, counted, point, monkeypatch):
    where, num_tuned, expected = POINTS[point]

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    member = federated.member("anna")
    with monkeypatch.context() as patch:
        patch.setattr(where, stop)
        with pytest.raises(KeyboardInterrupt):
            member.answer(member.take(asked["anna"]))
    assert counted["tune"] == num_tuned
    fresh = federated.member("anna", limit_steps=9)  # as after a restart
    sealed = fresh.answer(fresh.take(asked["anna"]))
    assert counted == expected
    assert not (sealed.parent / "bundle.work").exists()
    with federated.opened() as federation:
        assert federation.take_in(pack(sealed)).state == "verified"


def test_a_killed_tuning_gives_the_bundle_of_one_that_was_not(federated, asked, monkeypatch, tmp_path):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    member, other = federated.member("anna"), federated.member("anna", work=str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr("client.tuning.verb.write_bundle", stop)
        with pytest.raises(KeyboardInterrupt):
            member.answer(member.take(asked["anna"]))
    found = member.answer(member.take(asked["anna"])).parent / "bundle"
    whole = other.answer(other.take(asked["anna"])).parent / "bundle"
    assert files(found) == files(whole)


def test_a_bundle_of_another_round_in_its_place_is_not_sealed(federated, asked, seal_round, tmp_path):
    member, round_ = federated.member("anna"), federated.member("anna").take(asked["anna"])
    federated.bundle(round_.path.parent / "bundle", round_, round_digest="sha256:" + "0" * 64)
    with pytest.raises(BadDigest, match="answers another round"):
        member.answer(round_)
    assert not (round_.path.parent / "sealed").exists()


def test_one_process_at_a_time(federated, asked):
    member, again = federated.member("anna"), federated.member("anna", limit_steps=9)
    round_ = member.take(asked["anna"])
    with member._alone():
        for step in (lambda: again.take(asked["anna"]), lambda: again.answer(round_)):
            with pytest.raises(RunFailed, match="another process answers"):
                step()
    assert again.take(asked["anna"]) == round_


# --- rounds that are refused


def test_the_same_round_with_another_content(federated, seal_round):
    member = federated.member("anna")
    taken = member.take(seal_round())
    for changes in ({"steps": 3}, {"proximal": 0.5}, {"learning_rate": None}):
        with pytest.raises(Replayed, match="round 1 came before with another content"):
            member.take(seal_round(**changes))
    assert member.take(seal_round()).digest == taken.digest  # sealed anew, the same content
    assert [path.name for path in member.config.work.iterdir() if path.name.startswith(".round")] == []


def test_an_older_seal_after_a_newer(federated, seal_round):
    member = federated.member("anna")
    first, second = seal_round(1), seal_round(2)
    member.take(second)
    with pytest.raises(Replayed, match="number 2 came before it"):
        member.take(first)
    assert sorted(path.name for path in member.config.work.iterdir()) == [".lock", "round-0002"]


def test_a_work_folder_of_another_federation(federated, seal_round):
    member = federated.member("anna")
    member.take(seal_round(federation_id="5" * 32))
    with pytest.raises(ConfigError, match="holds rounds of another federation"):
        member.take(seal_round(federation_id="6" * 32))


def test_too_many_steps(federated, seal_round):
    sealed = seal_round(steps=11)
    with pytest.raises(PolicyError, match="asks for 11 steps, --limit-steps 10"):
        federated.member("anna", limit_steps=10).take(sealed)
    assert not (federated.member("anna").config.work / "round-0001").exists()
    assert federated.member("anna", limit_steps=11).take(sealed).manifest.steps == 11


def test_the_end(federated, seal_round):
    member = federated.member("anna")
    assert member.take(seal_round(3, task="finish", num_rounds=3)).manifest.task == "finish"
    assert [path.name for path in member.config.work.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"package_digest": "sha256:" + "0" * 64}, "package_digest"),
        ({"base_digest": "sha256:" + "0" * 64}, "base_digest"),
        ({"adapter": {"rank": 3}}, "another adapter"),
    ],
)
def test_an_owner_who_changes_what_was_agreed(federated, seal_round, changes, match, monkeypatch):
    """The owner's own program would not seal it; another one does, and the client's does not open it."""
    if "adapter" in changes:
        job = federated.member("anna").job
        changes = {"adapter": job.adapter.model_copy(update=changes["adapter"])}
    with monkeypatch.context() as patch:
        patch.setattr("offsite.exchange.verbs.check_content", lambda *_: None)
        sealed = seal_round(**changes)
    with pytest.raises(WrongBinding, match=match):
        federated.member("anna").take(sealed)
    assert [path.name for path in federated.member("anna").config.work.iterdir()] == [".lock"]


def test_another_client_s_round(federated, asked):
    with pytest.raises((WrongRecipient, WrongBinding)):
        federated.member("anna").take(asked["bert"])


def test_an_owner_who_is_trusted_no_longer(federated, asked):
    member = federated.member("anna")
    TrustStore(member.config.keys).revoke(member.job.owner)
    with pytest.raises(Untrusted):
        member.take(asked["anna"])


def test_a_round_that_was_changed_on_its_way(federated, asked):
    payload = next((asked["anna"] / "payload").iterdir())
    payload.write_bytes(payload.read_bytes()[:-1])
    with pytest.raises(ArtefactError):
        federated.member("anna").take(asked["anna"])
    assert [path.name for path in federated.member("anna").config.work.iterdir()] == [".lock"]


# --- settings


def test_another_client_s_job(federated):
    other = json.loads(federated.settings["bert"].read_text())["job"]
    with pytest.raises(WrongBinding, match="is for another client than these keys"):
        federated.member("anna", job=other)


def test_another_package(federated, dropped_package):
    with pytest.raises(WrongBinding, match="is about package"):
        federated.member("anna", package=str(dropped_package.path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accept_leakage": False}, "on which not all was measured"),
        ({"accept_leakage": False, "audit": True, "tune": {"audit_share": 0.3}}, "rounds have no canaries"),
        ({"audit_rows": 0}, "audit-rows"),
        ({"audit": True}, "none are set aside"),
        ({"audit": True, "audit_rows": 999, "tune": {"audit_share": 0.3}}, "no gate could fail"),
        ({"tune": {"steps": 5}}, r"tune\.steps: the owner's round and job say it"),
        ({"tune": {"rank": 5}}, r"tune\.rank: the owner's round and job say it"),
        ({"tune": {"output": "x"}}, r"tune\.output: it is given beside tune"),
        ({"tune": {"canaries": "x"}}, r"tune\.canaries: a federation's rounds do not go with it"),
        ({"tune": {"disclose": ["steps"]}}, r"tune\.disclose: a federation's rounds do not go with it"),
        ({"tune": {"batch_sice": 5}}, r"tune\.batch_sice: offsite tune has no such setting"),
        ({"tune": {"batch_size": 0}}, "batch-size"),
        ({"tune": {"dp": {"epsilon": 8, "noise_multiplier": 1}}}, "one of the two"),
        ({"limit_steps": 0}, "limit-steps"),
    ],
)
def test_settings_that_do_not_fit(federated, changes, message):
    with pytest.raises(ConfigError, match=message):
        federated.member("anna", **changes)


def test_text_that_is_not_there(federated):
    with pytest.raises(DataError, match=r"^nowhere\.txt: no such file$"):
        federated.member("anna", data="nowhere.txt")


def test_join_s_settings_are_the_member_s(federated):
    stated = json.loads(federated.settings["anna"].read_text())
    joined = build(JoinConfig, flags={**stated, "url": "http://127.0.0.1:1"})
    assert joined.member() == build(MemberConfig, flags=stated)


def test_joining_another_owner_s_exchange(federated, make_party):
    stranger = make_party("stranger")
    stated = json.loads(federated.settings["anna"].read_text())
    TrustStore(federated.member("anna").config.keys).add(stranger.identity.public.card, stranger.fingerprint)
    with pytest.raises(WrongBinding, match="from another owner than --owner"):
        join_run(build(JoinConfig, flags={**stated, "url": "http://127.0.0.1:1", "owner": stranger.fingerprint}))


# --- the privacy budget


def test_rounds_add_up_in_the_ledger_until_the_budget_is_spent(federated, seal_round, tmp_path, monkeypatch):
    """A round that the budget does not allow is refused before anything is trained, and costs nothing."""
    import client.tuning.tune as module

    ledger = tmp_path / "privacy"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {number} of many"}) + "\n" for number in range(400)))
    dp = {"noise_multiplier": 4.0, "delta": 1e-4, "budget": 0.3, "ledger": str(ledger)}
    tune = {"batch_size": 40, "block_tokens": 16, "precision": "fp32", "dp": dp}
    member = federated.member("anna", data=str(data), tune=tune)
    totals, trained = [], []
    monkeypatch.setattr(module, "train", counting_call(trained, module.train))
    for number in (1, 2, 3):
        round_ = member.take(seal_round(number, steps=6))
        if number == 3:
            with pytest.raises(PolicyError, match=r"the budget of this data set is 0\.3"):
                member.answer(round_)
            break
        member.answer(round_)
        totals.append(total(ledger))
        again = member.take(seal_round(number, steps=6))
        member.answer(again)  # asked again: neither trained nor charged again
        assert total(ledger) == totals[-1]
    assert totals == sorted(set(totals))
    assert len(totals) == 2
    assert len(trained) == len(totals)
    assert total(ledger) == totals[-1] <= 0.3
    with pytest.raises(PolicyError):
        member.answer(round_)
    assert total(ledger) == totals[-1]
    assert not (round_.path.parent / "bundle").exists()


def counting_call(calls, function):
    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return counted


def total(ledger):
    with BudgetLedger(ledger) as opened:
        run = opened._store.rows("SELECT id FROM runs ORDER BY number DESC LIMIT 1")[0]["id"]
        return opened.account(run).epsilon_total


def test_a_round_with_a_proximal_term_is_not_tuned_privately(federated, seal_round, tmp_path):
    tune = {"batch_size": 8, "precision": "fp32", "dp": {"epsilon": 8.0, "ledger": str(tmp_path / "privacy")}}
    member = federated.member("anna", tune=tune)
    with pytest.raises(ConfigError, match="proximal"):
        member.answer(member.take(seal_round(proximal=0.1)))
    assert not (tmp_path / "privacy").exists()


def test_nothing_of_the_text_or_of_paths_is_said(federated, asked, capsys):
    member = federated.member("anna")
    capsys.readouterr()
    sealed = member.answer(member.take(asked["anna"]))
    captured = capsys.readouterr()
    assert "anna 3 anna" not in captured.err + captured.out
    assert str(federated.folder) not in captured.err + captured.out
    shutil.rmtree(sealed)
