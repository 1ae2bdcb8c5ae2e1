"""Pulling and pushing against a running exchange: resumed where it broke off, checked on arrival, refused in a line."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from offsite import cli
from offsite.keys.trust import TrustStore
from offsite.sealed.folder import check_payload, read_sealed
from offsite.sealed.manifest import verify_sealed


def run(capsys, *words):
    code = cli.run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else None, err


def pull(capsys, live, out, *words):
    return run(capsys, "exchange", "pull", live.url, "-o", out, *words, *live.flags())


def push(capsys, live, sealed, *words):
    return run(capsys, "exchange", "push", live.url, sealed, *words, *live.flags())


def test_a_package_is_pulled_whole_and_opens_as_one_that_came_by_hand(capsys, live_exchange, make_job, tmp_path):
    offered = live_exchange.offer("package", make_job())
    live_exchange.start()
    code, told, err = pull(capsys, live_exchange, tmp_path / "out")
    assert (code, told["kind"], told["resumed_bytes"]) == (0, "package", 0), err
    for path in offered.rglob("*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(offered)).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("out", "."))) == ["out"]
    raw = read_sealed(tmp_path / "out")
    trust = TrustStore(live_exchange.client.keys)
    lookup = {live_exchange.owner.fingerprint: live_exchange.owner.identity.public}.__getitem__
    assert trust.peers()
    manifest = verify_sealed(raw.manifest_raw, raw.signatures_raw, lookup, now=make_job().created)
    check_payload(tmp_path / "out", manifest)


def test_a_pull_goes_on_where_it_broke_off(capsys, live_exchange, make_job, tmp_path):
    offered = live_exchange.offer("package", make_job())
    exchange = live_exchange.start()
    work = tmp_path / "out.work"
    shutil.copytree(offered, work)
    largest = max((work / "payload").iterdir(), key=lambda path: path.stat().st_size)
    size = largest.stat().st_size
    with largest.open("r+b") as handle:
        handle.truncate(size - 1000)
    (work / "payload" / ("0" * 64 + ".enc")).write_bytes(b"foreign")
    code, told, err = pull(capsys, live_exchange, tmp_path / "out")
    assert (code, told["resumed_bytes"]) == (0, told["bytes"] - 1000), err
    assert exchange.counts.num_bytes_out < 100_000
    assert not work.exists()
    assert len(list((tmp_path / "out" / "payload").iterdir())) == len(list((offered / "payload").iterdir()))


def test_what_is_left_of_another_download_is_not_mixed_in(capsys, live_exchange, make_job, tmp_path):
    job = make_job()
    shutil.copytree(live_exchange.offer("old", job), tmp_path / "out.work")
    shutil.rmtree(live_exchange.outbox / "old")
    live_exchange.offer("new", job, sequence=2)
    live_exchange.start()
    code, told, _ = pull(capsys, live_exchange, tmp_path / "out")
    assert (code, told["resumed_bytes"]) == (0, 0)


def test_changed_bytes_are_refused_and_nothing_stands_at_the_output(capsys, live_exchange, make_job, tmp_path):
    offered = live_exchange.offer("package", make_job())
    payload = min((offered / "payload").iterdir(), key=lambda path: path.stat().st_size)
    raw = bytearray(payload.read_bytes())
    raw[-1] ^= 1
    payload.write_bytes(raw)
    live_exchange.start()
    code, told, err = pull(capsys, live_exchange, tmp_path / "out")
    assert (code, told) == (3, None)
    assert "what arrived is not what was signed" in err
    assert not (tmp_path / "out").exists()
    payload_there = [path.name for path in (tmp_path / "out.work" / "payload").iterdir()]
    assert payload.name not in payload_there


def test_the_newest_of_one_kind_is_taken_and_several_kinds_must_be_told_apart(
    capsys, live_exchange, make_job, tmp_path
):
    job = make_job()
    live_exchange.offer("first", job)
    newest = live_exchange.offer("second", job, sequence=2)
    live_exchange.offer("other", make_job())
    live_exchange.start()
    code, _, err = pull(capsys, live_exchange, tmp_path / "out")
    assert code == 2
    assert "3 are offered" in err
    assert "--kind, --job or --digest" in err
    code, told, _ = pull(capsys, live_exchange, tmp_path / "out", "--job", job.job_id)
    assert (code, told["digest"]) == (0, read_sealed(newest).digest)
    code, _, err = pull(capsys, live_exchange, tmp_path / "none", "--kind", "report")
    assert (code, "nothing of that sort is offered" in err) == (2, True)
    code, told, _ = run(capsys, "exchange", "status", live_exchange.url, *live_exchange.flags())
    assert (code, len(told["offers"])) == (0, 3)


def test_a_bundle_is_pushed_once_and_again_is_the_same_answer(capsys, live_exchange, make_job, tmp_path):
    sealed = live_exchange.seal(tmp_path / "sealed", live_exchange.add(make_job()))
    exchange = live_exchange.start()
    code, told, err = push(capsys, live_exchange, sealed)
    assert (code, told["state"]) == (0, "verified"), err
    assert told["sent_bytes"] == sum(path.stat().st_size for path in (sealed / "payload").iterdir())
    code, again, _ = push(capsys, live_exchange, sealed)
    assert (code, again["state"], again["id"], again["sent_bytes"]) == (0, "verified", told["id"], 0)
    for word in (sealed, told["digest"]):
        code, status, _ = run(capsys, "exchange", "status", live_exchange.url, word, *live_exchange.flags())
        assert (code, status["state"], status["id"]) == (0, "verified", told["id"])
    assert exchange.counts.num_bundles_taken_in == 1
    with live_exchange.registry() as registry:
        assert [entry.state for entry in registry.entries()] == ["verified"]
    assert not list((live_exchange.registry_folder / "exchange" / "uploads").iterdir())


def test_a_push_goes_on_after_either_side_stopped(capsys, live_exchange, make_job, tmp_path, monkeypatch):
    from client.exchange.http import ExchangeClient

    sealed = live_exchange.seal(tmp_path / "sealed", live_exchange.add(make_job()))
    total = sum(path.stat().st_size for path in (sealed / "payload").iterdir())
    live_exchange.start(limit_part_bytes=1000)
    ask, parts = ExchangeClient.ask, []

    def broken(self, method, path, cls, body=b""):
        if method == "PUT":
            parts.append(len(body))
            if len(parts) == 3:
                raise KeyboardInterrupt
        return ask(self, method, path, cls, body)

    monkeypatch.setattr(ExchangeClient, "ask", broken)
    assert cli.run(["exchange", "push", live_exchange.url, str(sealed), *live_exchange.flags()]) == 130
    capsys.readouterr()
    live_exchange.stop()
    live_exchange.start(limit_part_bytes=1000)
    code, status, _ = run(capsys, "exchange", "status", live_exchange.url, sealed, *live_exchange.flags())
    assert (code, status["state"]) == (0, "receiving")
    code, told, err = push(capsys, live_exchange, sealed)
    assert (code, told["state"], told["sent_bytes"]) == (0, "verified", total - sum(parts[:2])), err


def test_a_push_begins_a_file_anew_when_the_exchange_lost_it(capsys, live_exchange, make_job, tmp_path, monkeypatch):
    from client.exchange.http import ExchangeClient

    sealed = live_exchange.seal(tmp_path / "sealed", live_exchange.add(make_job()))
    live_exchange.start(limit_part_bytes=1000)
    ask, parts = ExchangeClient.ask, []

    def lossy(self, method, path, cls, body=b""):
        if method == "PUT":
            parts.append(path)
            if len(parts) == 3:
                folder = live_exchange.registry_folder / "exchange" / "uploads"
                for payload in folder.glob("*/payload/*"):
                    payload.write_bytes(b"")
        return ask(self, method, path, cls, body)

    monkeypatch.setattr(ExchangeClient, "ask", lossy)
    code, told, err = push(capsys, live_exchange, sealed)
    assert (code, told["state"]) == (0, "verified"), err


REFUSED = {
    "another round": ({"round": 3}, "WrongBinding"),
    "another package": ({"package_digest": "sha256:" + "0" * 64}, "WrongBinding"),
    "expired": ({"created": 1000, "expires": 2000}, "Expired"),
    "from the future": ({"created": 2**33, "expires": 2**33 + 1}, "Expired"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_the_envelope_tells_is_refused_before_any_payload_is_sent(
    capsys, live_exchange, make_job, tmp_path, change
):
    changes, _ = REFUSED[change]
    sealed = live_exchange.seal(tmp_path / "sealed", live_exchange.add(make_job()), **changes)
    exchange = live_exchange.start()
    code, told, err = push(capsys, live_exchange, sealed)
    assert (code, told) == (3, None)
    assert len(err.splitlines()) == 1
    assert "the exchange refuses: this bundle" in err
    assert exchange.counts.num_bytes_in < 100_000
    assert not list((live_exchange.registry_folder / "exchange" / "uploads").iterdir())


def test_a_bundle_that_fails_later_is_refused_with_class_and_reason(
    capsys, live_exchange, make_job, tmp_path, tiny_bundle
):
    job = live_exchange.add(make_job(policy={"max_relative_frobenius": 1e-3, "max_relative_spectral": 1e-3}))
    sealed = live_exchange.seal(tmp_path / "sealed", job, bundle=tiny_bundle.path)
    live_exchange.start()
    for _ in range(2):
        code, told, err = push(capsys, live_exchange, sealed)
        assert (code, told) == (3, None)
        assert "the owner refused this bundle: NormTooLarge: " in err
    code, told, _ = run(capsys, "exchange", "status", live_exchange.url, sealed, *live_exchange.flags())
    assert (code, told["state"], told["reason"]) == (0, "refused", "NormTooLarge")


def test_another_bundle_for_the_same_round_is_refused(capsys, live_exchange, make_job, tmp_path):
    job = live_exchange.add(make_job())
    live_exchange.start()
    assert push(capsys, live_exchange, live_exchange.seal(tmp_path / "one", job))[0] == 0
    code, _, err = push(capsys, live_exchange, live_exchange.seal(tmp_path / "two", job, sequence=2))
    assert code == 3
    assert f"round 1 of job {job.job_id[:12]} is taken" in err


def test_local_faults_are_told_before_anything_is_sent(capsys, live_exchange, make_job, tmp_path):
    job = make_job()
    sealed, package = live_exchange.seal(tmp_path / "sealed", job), live_exchange.offer("package", job)
    live_exchange.url = "http://127.0.0.1:9"  # nobody is asked
    payload = next((sealed / "payload").iterdir())
    payload.write_bytes(hashlib.sha256(payload.read_bytes()).digest() + payload.read_bytes()[32:])
    rows = {
        sealed: (3, "is not the signed one"),
        package: (3, "an exchange takes bundles"),
        tmp_path / "nowhere": (3, "no sealed folder"),
        live_exchange.seal(tmp_path / "other", job, issuer=live_exchange.owner): (3, "sealed by another key"),
    }
    for folder, (expected, message) in rows.items():
        code, _, err = push(capsys, live_exchange, folder)
        assert (code, message in err) == (expected, True), err


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://owner.example:8443", "without encryption"),
        ("ftp://127.0.0.1", "not the address of an exchange"),
        ("https://name:word@owner.example", "not the address of an exchange"),
        ("https://owner.example/path", "has a path"),
        ("owner.example", "not the address"),
        ("http://[::1", "not an address"),
    ],
)
def test_an_address_that_is_none_is_a_setting_gone_wrong(capsys, live_exchange, tmp_path, url, message):
    live_exchange.url = url
    code, _, err = pull(capsys, live_exchange, tmp_path / "out")
    assert (code, message in err) == (2, True), err


def test_nobody_at_home_is_a_run_that_failed_and_can_be_repeated(capsys, live_exchange, tmp_path):
    live_exchange.url = "http://127.0.0.1:9"
    code, _, err = pull(capsys, live_exchange, tmp_path / "out")
    assert (code, "the exchange cannot be used: no connection" in err) == (5, True), err
    assert not list(tmp_path.glob("out*"))


def test_the_owner_must_be_clear(capsys, live_exchange, make_party, tmp_path):
    third = make_party("third")
    TrustStore(live_exchange.client.keys).add(third.identity.public.card, third.fingerprint)
    live_exchange.start()
    code, _, err = pull(capsys, live_exchange, tmp_path / "out")
    assert (code, "--owner is missing; 2 parties are trusted" in err) == (2, True), err
    code, _, err = pull(capsys, live_exchange, tmp_path / "out", "--owner", third.fingerprint)
    assert (code, "does not accept this request" in err) == (3, True), err
