"""The exchange's process, and its parts: TLS, start and end, uploads within quotas, what is offered to whom."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from client.exchange.http import ExchangeClient
from offsite import cli, faults
from offsite.errors import BadKey, ConfigError, Replayed, RunFailed, TooLarge, Untrusted
from offsite.exchange.requests import SignedRequest
from offsite.exchange.wire import Offers
from offsite.sealed.folder import read_sealed
from offsite.sealed.manifest import SealedManifest
from server.exchange.authentication import Nonces, Rates
from server.exchange.config import ServeExchangeConfig
from server.exchange.outbox import Outbox
from server.exchange.serve import serve_run
from server.exchange.uploads import Quotas, UploadStore
from server.http.certificates import server_context, write_certificate
from server.http.refusals import Refusal

ROOM = Quotas(upload_bytes=10**6, disk_bytes=10**6, num_client_uploads=2, free_bytes=0)


def declared(store, sealed):
    raw = read_sealed(sealed)
    manifest = SealedManifest.model_validate_json(raw.manifest_raw)
    digest = raw.digest.removeprefix("sha256:")
    return store.declare(digest, manifest, (raw.manifest_raw, raw.signatures_raw, raw.keys_raw))


@pytest.fixture
def sealed(live_exchange, make_job, tmp_path):
    return live_exchange.seal(tmp_path / "sealed", make_job())


def test_an_upload_is_where_it_was_after_a_restart(sealed, tmp_path):
    store = UploadStore(tmp_path / "uploads", ROOM)
    upload = declared(store, sealed)
    name = max(upload.files, key=upload.files.get)
    data = (sealed / "payload" / name).read_bytes()
    assert store.append(upload, name, 0, data[:100]) == 100
    (tmp_path / "uploads" / f".{'1' * 64}.0123abcd.partial").mkdir()
    (tmp_path / "uploads" / ("0" * 64)).mkdir()
    again = UploadStore(tmp_path / "uploads", ROOM)
    found = again.get(upload.digest, upload.client)
    assert (found.offsets()[name], found.is_whole()) == (100, False)
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == [upload.digest]
    assert again.get(upload.digest, "another") is None
    for other in upload.files:
        whole = (sealed / "payload" / other).read_bytes()
        again.append(found, other, found.offsets()[other], whole[found.offsets()[other] :])
    assert found.is_whole()
    again.close(found)
    with pytest.raises(Refusal, match="no more parts"):
        again.append(found, name, len(data), b"x")
    again.discard(found)
    assert not list((tmp_path / "uploads").iterdir())


def test_a_disk_that_fails_leaves_the_offset_as_it_was(sealed, tmp_path, monkeypatch):
    store = UploadStore(tmp_path / "uploads", ROOM)
    upload = declared(store, sealed)
    name = max(upload.files, key=upload.files.get)
    store.append(upload, name, 0, b"x" * 10)
    pwrite = os.pwrite

    def full(handle, data, at):
        if at > 10:
            raise OSError(28, "No space left on device")
        return pwrite(handle, data[:5], at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunFailed, match="no space left"):
        store.append(upload, name, 10, b"y" * 10)
    monkeypatch.undo()
    assert upload.offsets()[name] == 10
    reached = []
    faults.set_hook(reached.append)
    try:
        assert store.append(upload, name, 10, b"y" * 10) == 20
    finally:
        faults.set_hook(None)
    assert reached == ["upload-part"]


def test_uploads_stay_within_their_quotas_and_idle_ones_are_collected(live_exchange, make_job, tmp_path):
    now = [1000.0]
    folders = [live_exchange.seal(tmp_path / str(number), make_job()) for number in range(3)]
    num_bytes = sum(path.stat().st_size for path in folders[0].rglob("*") if path.is_file())
    store = UploadStore(tmp_path / "uploads", ROOM, clock=lambda: now[0])
    first = declared(store, folders[0])
    assert declared(store, folders[0]) is first
    declared(store, folders[1])
    with pytest.raises(Refusal, match="2 uploads are under way"):
        declared(store, folders[2])
    now[0] += 100
    assert store.collect(99) == 2
    for quotas, error, message in (
        (Quotas(num_bytes - 1, 10**9, 9, 0), TooLarge, "declares"),
        (Quotas(10**9, num_bytes - 1, 9, 0), Refusal, "no room"),
        (Quotas(10**9, 10**9, 9, 2**62), Refusal, "no room"),
    ):
        with pytest.raises(error, match=message):
            declared(UploadStore(tmp_path / "uploads", quotas), folders[0])
    assert not list((tmp_path / "uploads").iterdir())


def test_the_outbox_offers_to_recipients_what_this_owner_sealed(live_exchange, make_job, capsys):
    owner, client = live_exchange.owner, live_exchange.client
    live_exchange.offer("package", make_job())
    live_exchange.offer("foreign", make_job(), issuer=client, identity=client.identity)
    (live_exchange.outbox / "notes").mkdir()
    outbox = Outbox(live_exchange.outbox, owner.fingerprint)
    for _ in range(2):
        assert [offer.folder.name for offer in outbox.offers(client.fingerprint)] == ["package"]
    assert outbox.offers(owner.fingerprint) == []
    assert len(capsys.readouterr().err.splitlines()) == 2
    digest = outbox.offers(client.fingerprint)[0].digest
    payload = next((live_exchange.outbox / "package" / "payload").iterdir())
    content = payload.read_bytes()
    payload.unlink()
    payload.symlink_to("/etc/passwd")
    with pytest.raises(Refusal, match="nothing"):
        outbox.open(client.fingerprint, digest, payload.name)
    payload.unlink()
    payload.write_bytes(content[:-1])
    with pytest.raises(Refusal, match="nothing"):
        outbox.open(client.fingerprint, digest, payload.name)
    with pytest.raises(ConfigError, match="no outbox folder"):
        Outbox(live_exchange.outbox / "nowhere", owner.fingerprint)


def test_nonces_are_kept_as_long_as_they_could_come_again(tmp_path):
    def request(nonce, key="k", now=10**10):
        return SignedRequest("GET", "/v1", "o", key, "0" * 64, now, nonce)

    nonces = Nonces(tmp_path / "nonces.db")
    nonces.admit(request("a"))
    nonces.admit(request("a", key="other"))
    nonces.close()
    nonces = Nonces(tmp_path / "nonces.db")
    with pytest.raises(Replayed):
        nonces.refuse_known(request("a"))
    with pytest.raises(Replayed):
        nonces.admit(request("a"))
    nonces.clean(10**10 + 300)
    assert len(nonces) == 2
    nonces.clean(10**10 + 301)
    assert len(nonces) == 0
    nonces.close()


def test_a_bucket_of_requests_refills():
    now = [0.0]
    rates = Rates(per_second=2, burst=3, clock=lambda: now[0])
    for _ in range(3):
        rates.take("a")
    with pytest.raises(Refusal, match="too many"):
        rates.take("a")
    rates.take("b")
    now[0] = 0.5
    rates.take("a")


def test_a_pinned_certificate_is_trusted_and_no_other(live_exchange, tmp_path):
    write_certificate(tmp_path / "tls", ["127.0.0.1", "owner.example"], days=2)
    write_certificate(tmp_path / "other", ["127.0.0.1"], days=2)
    key = tmp_path / "tls" / "certificate-key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    context = server_context(tmp_path / "tls" / "certificate.pem", key)
    live_exchange.start(tls=context)
    url = live_exchange.url.replace("http:", "https:")
    me = (live_exchange.client.identity, live_exchange.owner.fingerprint)
    with ExchangeClient(url, *me, certificate=tmp_path / "tls" / "certificate.pem") as exchange:
        assert exchange.ask("GET", "/v1/sealed", Offers).offers == ()
    for wrong in (tmp_path / "other" / "certificate.pem", None):
        with ExchangeClient(url, *me, certificate=wrong) as exchange, pytest.raises(Untrusted, match="TLS certificate"):
            exchange.ask("GET", "/v1/sealed", Offers)
    key.chmod(0o644)
    with pytest.raises(BadKey, match="open to others"):
        server_context(tmp_path / "tls" / "certificate.pem", key)
    with pytest.raises(ConfigError, match="not a certificate and its"):
        server_context(tmp_path / "tls" / "certificate.pem", tmp_path / "other" / "certificate-key.pem")
    with pytest.raises(ConfigError, match="neither a name nor an address"):
        write_certificate(tmp_path / "bad", ["no host"], days=2)


def test_other_machines_are_served_by_tls_alone(tmp_path):
    folders = {"registry": tmp_path, "outbox": tmp_path, "keys": tmp_path}
    with pytest.raises(ConfigError, match="there is no --certificate"):
        serve_run(ServeExchangeConfig(host="0.0.0.0", **folders))
    with pytest.raises(ValidationError, match="belong together"):
        ServeExchangeConfig(certificate=tmp_path / "c.pem", **folders)


def test_the_certificate_verb_writes_both_files(tmp_path, capsys):
    out = tmp_path / "tls"
    assert cli.run(["exchange", "certificate", "--host", "owner.example", "--host", "::1", "-o", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"].startswith("sha256:")
    assert sorted(path.name for path in out.iterdir()) == ["certificate-key.pem", "certificate.pem"]
    assert cli.run(["exchange", "certificate", "--host", "owner.example", "-o", str(out)]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_verb_says_where_it_serves_and_ends_cleanly(live_exchange, number):
    words = ["--registry", str(live_exchange.registry_folder), "--outbox", str(live_exchange.outbox), "--port", "0"]
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "offsite", "exchange", "serve", *words, *live_exchange.owner.flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stderr.readline() == "exchange serve: loading\n"
    line = process.stderr.readline()
    url = line.split(" at ")[1].split(";")[0]
    with ExchangeClient(url, live_exchange.client.identity, live_exchange.owner.fingerprint) as exchange:
        assert exchange.ask("GET", "/v1/sealed", Offers).offers == ()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    told = json.loads(out.splitlines()[-1])
    assert (told["url"], told["num_requests"], told["num_failed"]) == (url, 1, 0)
