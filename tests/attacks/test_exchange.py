"""Attempts on a running exchange: requests that are not in order, bodies without end, races for one round."""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from client.exchange.http import ExchangeClient
from offsite.errors import ArtefactError, Replayed, Untrusted, WrongBinding
from offsite.exchange import requests
from offsite.exchange.requests import sign_request
from offsite.exchange.wire import Offers, Status, declare
from offsite.keys.identity import generate
from offsite.keys.trust import TrustStore
from offsite.sealed.folder import read_sealed
from offsite.state.chain import read_log

DENIED = {"reason": "Untrusted", "message": "this request is not accepted"}
QUICK = {"head_seconds": 0.6, "body_seconds": 0.6, "min_rate": 1e6, "stall_seconds": 0.6}


def signed(live, method="GET", path="/v1/sealed", body=b"", *, identity=None, now=None, owner=None):
    identity, owner = identity or live.client.identity, owner or live.owner.fingerprint
    return sign_request(identity, method, path, body, owner=owner, now=now or int(time.time()))


def send(live, headers, method="GET", path="/v1/sealed", body=b""):
    with httpx.Client(trust_env=False) as client:
        return client.request(method, live.url + path, headers=headers, content=body or None)


def dialled(live, **changes):
    return ExchangeClient(
        live.url, live.client.identity, live.owner.fingerprint, **{"patience_seconds": 30.0, **changes}
    )


def raw_exchange(live, head, body=b"", *, pause_seconds=0.0, wait_seconds=10.0):
    """Send bytes as they are and return what comes back until the other side ends it."""
    host, port = live.url.removeprefix("http://").split(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=wait_seconds) as sock:
        try:
            sock.sendall(head)
            for start in range(0, len(body), 1000) if pause_seconds else (0,):
                sock.sendall(body[start : start + 1000] if pause_seconds else body)
                time.sleep(pause_seconds)
            while piece := sock.recv(65536):
                found += piece
        except (BrokenPipeError, ConnectionResetError):
            pass
    return found


def head_of(method, path, headers):
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def uploaded_bytes(live):
    folder = live.registry_folder / "exchange" / "uploads"
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_unknown_revoked_replayed_late_and_tampered_requests_get_one_answer_and_the_log_says_which(
    live_exchange, make_party
):
    revoked, stranger = make_party("third").identity, generate("stranger", days=1)
    trust = TrustStore(live_exchange.owner.keys)
    trust.add(revoked.public.card, revoked.public.fingerprint)
    live_exchange.start()
    assert send(live_exchange, signed(live_exchange, identity=revoked)).status_code == 200
    trust.revoke(revoked.public.fingerprint)
    replayed = signed(live_exchange)
    assert send(live_exchange, replayed).status_code == 200
    rows = {
        "Untrusted: unknown": signed(live_exchange, identity=stranger),
        "Untrusted: revoked": signed(live_exchange, identity=revoked),
        "Replayed": replayed,
        "Expired": signed(live_exchange, now=int(time.time()) - 301),
        "BadSignature": {**signed(live_exchange), "offsite-nonce": "0" * 32},
        "BadSignature: another owner": signed(live_exchange, owner=stranger.public.fingerprint),
        "BadSchema": {},
    }
    answers = [send(live_exchange, headers) for headers in rows.values()]
    answers.append(send(live_exchange, signed(live_exchange), path="/v1/sealed?x=1"))
    assert {answer.status_code for answer in answers} == {401}
    assert {answer.content for answer in answers} == {answers[0].content}
    assert answers[0].json() == DENIED
    heads = [{name for name in answer.headers if name != "date"} for answer in answers]
    assert all(head == heads[0] for head in heads)
    live_exchange.stop()
    denied = [
        line["fields"]
        for line in read_log(live_exchange.registry_folder / "registry.log")
        if line["event"] == "exchange-denied"
    ]
    assert [line["check"] for line in denied] == [*(name.split(":")[0] for name in rows), "BadSchema"]
    assert "unknown" in denied[0]["detail"]
    assert "revoked" in denied[1]["detail"]
    assert denied[0]["client"] == stranger.public.fingerprint


def test_a_restart_lets_nobody_repeat_a_request(live_exchange):
    live_exchange.start()
    headers = signed(live_exchange)
    assert send(live_exchange, headers).status_code == 200
    live_exchange.stop()
    live_exchange.start()
    assert send(live_exchange, headers).status_code == 401


def test_a_body_that_is_not_the_signed_one_is_denied(live_exchange):
    live_exchange.start()
    headers = signed(live_exchange, "POST", "/v1/bundles", b"{}")
    answer = send(live_exchange, headers, "POST", "/v1/bundles", b"[]")
    assert (answer.status_code, answer.json()) == (401, DENIED)


def test_a_flood_of_denied_requests_does_not_fill_the_log(live_exchange):
    live_exchange.start()
    with httpx.Client(trust_env=False) as client:
        for _ in range(80):
            assert client.get(live_exchange.url + "/v1/sealed").status_code == 401
    live_exchange.stop()
    events = [line["event"] for line in read_log(live_exchange.registry_folder / "registry.log")]
    assert (events.count("exchange-denied"), events.count("exchange-denied-more")) == (60, 1)


def test_what_is_sealed_for_another_is_nowhere(live_exchange, make_job, make_party):
    other = make_party("third").identity
    live_exchange.offer("package", make_job(), recipients=[other.public])
    digest = read_sealed(live_exchange.outbox / "package").digest.removeprefix("sha256:")
    live_exchange.start()
    with dialled(live_exchange) as asked:
        assert asked.ask("GET", "/v1/sealed", Offers).offers == ()
        for path in (f"/v1/sealed/{digest}/manifest.json", f"/v1/sealed/{'0' * 64}/manifest.json"):
            with pytest.raises(ArtefactError, match="nothing at this address for you"):
                asked.fetch(path, 1000)


@pytest.mark.parametrize("name", ["passwd", "offsite.json", "payload", "..", "%2e%2e%2fx", "a" * 64 + ".enc"])
def test_row_14_no_name_from_the_wire_is_a_path(live_exchange, make_job, name):
    live_exchange.offer("package", make_job())
    digest = read_sealed(live_exchange.outbox / "package").digest.removeprefix("sha256:")
    (live_exchange.outbox / "package" / "passwd").write_text("secret")
    live_exchange.start()
    for path in (f"/v1/sealed/{digest}/{name}", f"/v1/sealed/{digest}/payload/{name}"):
        answer = raw_exchange(
            live_exchange, head_of("GET", path, {**signed(live_exchange, path=path), "Connection": "close"})
        )
        assert answer.split()[1] in (b"401", b"404")
        assert b"secret" not in answer


def test_row_23_thirty_two_identical_at_once_are_one(live_exchange, make_job, tmp_path):
    sealed = live_exchange.seal(tmp_path / "sealed", live_exchange.add(make_job()))
    exchange = live_exchange.start()
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda _: pushed(live_exchange, sealed), range(32)))
    assert {status.state for status in found} == {"verified"}
    assert len({status.id for status in found}) == 1
    assert (exchange.counts.num_bundles_taken_in, exchange.counts.num_failed) == (1, 0)
    with live_exchange.registry() as registry:
        assert len(registry.entries()) == 1


def test_row_23_of_thirty_two_different_for_one_round_one_is_accepted(live_exchange, make_job, tmp_path):
    job = live_exchange.add(make_job())
    folders = [live_exchange.seal(tmp_path / str(number), job) for number in range(32)]
    exchange = live_exchange.start()
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda sealed: pushed(live_exchange, sealed), folders))
    accepted = [status for status in found if isinstance(status, Status) and status.state == "verified"]
    assert len(accepted) == 1
    others = [status for status in found if status is not accepted[0]]
    for other in others:
        assert isinstance(other, Replayed) or (other.state, other.reason) == ("refused", "Replayed")
        assert f"is taken by sha256:{accepted[0].digest[:12]}" in str(getattr(other, "message", other))
    assert exchange.counts.num_failed == 0
    assert not uploaded_bytes(live_exchange)


def pushed(live, sealed):
    """Push as the verb does, without its files and words; an error is returned."""
    from client.exchange.verbs import _awaited, _upload
    from offsite.sealed.manifest import SealedManifest

    raw = read_sealed(sealed)
    manifest = SealedManifest.model_validate_json(raw.manifest_raw)
    with dialled(live, patience_seconds=60.0) as asked:
        try:
            status, _ = _upload(asked, sealed, raw, manifest)
            return _awaited(asked, status, 60.0)
        except ArtefactError as error:
            return error


def test_row_27_slow_heads_are_cut_off(live_exchange):
    live_exchange.start(**QUICK)
    began = time.monotonic()
    assert raw_exchange(live_exchange, b"GET /v1/sealed HT", wait_seconds=8) == b""
    assert (
        raw_exchange(live_exchange, b"GET / HTTP/1.1\r\n", b"X: y\r\n" * 500, pause_seconds=0.3, wait_seconds=8) == b""
    )
    assert time.monotonic() - began < 8


def test_row_27_endless_heads_are_cut_off(live_exchange):
    live_exchange.start()
    answer = raw_exchange(live_exchange, b"GET / HTTP/1.1\r\n", b"X-Filler: " + b"y" * 200_000)
    assert answer == b"" or answer.split()[1] in (b"400", b"431")


def test_row_27_a_slow_body_is_cut_off(live_exchange):
    live_exchange.start(**QUICK)
    headers = {**signed(live_exchange, "POST", "/v1/bundles", b"x" * 9000), "Content-Length": "9000"}
    began = time.monotonic()
    answer = raw_exchange(live_exchange, head_of("POST", "/v1/bundles", headers), b"x" * 8000, pause_seconds=0.3)
    assert time.monotonic() - began < 6
    assert answer == b"" or answer.split()[1] == b"408"


def test_row_27_slow_strangers_get_no_slot(live_exchange):
    live_exchange.start(limit_bodies=1)
    headers = {**signed(live_exchange, "POST", "/v1/bundles", identity=generate("x", days=1)), "Content-Length": "99"}
    answer = raw_exchange(live_exchange, head_of("POST", "/v1/bundles", headers))
    assert answer.split()[1] == b"401"
    assert b"connection: close" in answer.lower()


def test_row_27_a_reader_that_does_not_read_is_cut_off(live_exchange, make_job, tmp_path):
    big = tmp_path / "big"
    big.mkdir()
    (big / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}" + b"\0" * 2)
    (big / "offsite.json").write_bytes(b"{}" + b" " * 24_000_000)
    (big / "model.safetensors").unlink()
    offered = live_exchange.offer("big", make_job(), source=big)
    digest = read_sealed(offered).digest.removeprefix("sha256:")
    path = f"/v1/sealed/{digest}/payload/{next((offered / 'payload').iterdir()).name}"
    live_exchange.start(**QUICK)
    host, port = live_exchange.url.removeprefix("http://").split(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        sock.sendall(head_of("GET", path, signed(live_exchange, path=path)))
        time.sleep(3)
        sock.settimeout(5)
        num_bytes = 0
        try:
            while piece := sock.recv(65536):
                num_bytes += len(piece)
        except ConnectionResetError:
            pass
    assert num_bytes < 24_000_000


BAD_BODIES = {
    "no length": ({}, b"411"),
    "chunked": ({"Transfer-Encoding": "chunked"}, b"411"),
    "ten gigabytes": ({"Content-Length": str(10**10)}, b"413"),
    "more digits than any size": ({"Content-Length": "9" * 19}, b"41"),
    "gzip": ({"Content-Length": "20", "Content-Encoding": "gzip"}, b"415"),
    "negative": ({"Content-Length": "-1"}, b"400"),
}


@pytest.mark.parametrize("which", BAD_BODIES)
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_row_27_bodies_of_another_form_are_refused_unread(live_exchange, make_job, tmp_path, which, method):
    more, expected = BAD_BODIES[which]
    sealed = live_exchange.seal(tmp_path / "sealed", live_exchange.add(make_job()))
    exchange = live_exchange.start()
    raw = read_sealed(sealed)
    with dialled(live_exchange) as asked:
        status = asked.ask("POST", "/v1/bundles", Status, declare(raw))
    name = next(iter(status.parts))
    path = "/v1/bundles" if method == "POST" else f"/v1/bundles/{status.digest}/payload/{name}/0"
    before, num_in = uploaded_bytes(live_exchange), exchange.counts.num_bytes_in
    bomb = gzip.compress(b"\0" * 10_000_000)
    body = b"ffff\r\n" + bomb if which == "chunked" else bomb
    answer = raw_exchange(live_exchange, head_of(method, path, {**signed(live_exchange, method, path), **more}), body)
    assert answer == b"" or answer.split()[1].startswith(expected), answer[:200]
    assert (uploaded_bytes(live_exchange), exchange.counts.num_bytes_in) == (before, num_in)
    assert send(live_exchange, signed(live_exchange)).status_code == 200


def test_row_27_requests_without_a_body_take_none(live_exchange):
    live_exchange.start()
    for more in ({"Content-Length": "10000000000"}, {"Transfer-Encoding": "chunked"}):
        answer = raw_exchange(
            live_exchange, head_of("GET", "/v1/sealed", {**signed(live_exchange), **more}), b"x" * 100_000
        )
        assert answer == b"" or answer.split()[1] in (b"413", b"400")


def test_row_27_an_upload_declared_larger_than_the_job_allows_is_refused_at_once(live_exchange, make_job, tmp_path):
    from offsite.sealed.manifest import SIGN_PURPOSE, sealed_size, write_signatures

    sealed = live_exchange.seal(tmp_path / "sealed", live_exchange.add(make_job()))
    content = json.loads((sealed / "manifest.json").read_text())
    content["files"][0].update(bytes=10**10, sealed_bytes=sealed_size(10**10))
    manifest = json.dumps(content).encode()
    (sealed / "manifest.json").write_bytes(manifest)
    client = live_exchange.client
    signatures = client.identity.sign(SIGN_PURPOSE, manifest)
    (sealed / "signatures.json").write_bytes(write_signatures(client.fingerprint, signatures))
    live_exchange.start()
    with dialled(live_exchange) as asked, pytest.raises(ArtefactError, match="10000000000"):
        asked.ask("POST", "/v1/bundles", Status, declare(read_sealed(sealed)))
    assert not uploaded_bytes(live_exchange)


def test_row_27_parts_beyond_the_declared_size_or_out_of_place_are_refused(live_exchange, make_job, tmp_path):
    from client.exchange.http import WrongOffset

    sealed = live_exchange.seal(tmp_path / "sealed", live_exchange.add(make_job()))
    live_exchange.start()
    with dialled(live_exchange) as asked:
        status = asked.ask("POST", "/v1/bundles", Status, declare(read_sealed(sealed)))
        name, part = next(iter(status.parts.items()))
        path = f"/v1/bundles/{status.digest}/payload/{name}"
        with pytest.raises(ArtefactError, match="limit"):
            asked.ask("PUT", f"{path}/0", Status, b"x" * (part.bytes + 1))
        with pytest.raises(WrongOffset) as caught:
            asked.ask("PUT", f"{path}/5", Status, b"x")
        assert caught.value.offset == 0
        with pytest.raises(ArtefactError):
            asked.ask("PUT", f"/v1/bundles/{status.digest}/payload/{'0' * 64}.enc/0", Status, b"x")
        with pytest.raises(WrongOffset):
            asked.ask("POST", f"/v1/bundles/{status.digest}/complete", Status)


def test_row_27_a_client_that_asks_too_often_hears_when_to_come_again(live_exchange):
    live_exchange.start(limit_rate=1.0)
    answers = [send(live_exchange, signed(live_exchange)) for _ in range(8)]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert int(answers[-1].headers["retry-after"]) >= 1


def test_row_27_more_connections_than_allowed_are_cut(live_exchange):
    live_exchange.start(limit_connections=4)
    host, port = live_exchange.url.removeprefix("http://").split(":")
    held = [socket.create_connection((host, int(port))) for _ in range(8)]
    try:
        time.sleep(0.5)
        cut = 0
        for sock in held:
            sock.settimeout(0.3)
            try:
                cut += sock.recv(1) == b""
            except ConnectionResetError:
                cut += 1
            except TimeoutError:
                continue
        assert cut == 4
    finally:
        for sock in held:
            sock.close()


@pytest.mark.parametrize("other", [0, 2])
def test_row_37_another_version_of_the_protocol_is_named_by_both_sides(live_exchange, monkeypatch, other):
    live_exchange.start()
    answer = send(live_exchange, {}, path=f"/v{other}/sealed")
    assert answer.status_code == 400
    expected = f"this exchange speaks protocol 1, the request is of protocol {other}"
    assert answer.json() == {"reason": "WrongBinding", "message": expected}
    monkeypatch.setattr(requests, "PROTOCOL", other)
    monkeypatch.setattr("client.exchange.http.PROTOCOL", other)
    with (
        dialled(live_exchange) as asked,
        pytest.raises(WrongBinding, match=f"protocol 1, this offsite protocol {other}"),
    ):
        asked.ask("GET", f"/v{other}/sealed", Offers)


def test_row_37_what_is_no_exchange_is_named(live_exchange, tmp_path):
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        live_exchange.url = f"http://127.0.0.1:{other.server_port}"
        try:
            with dialled(live_exchange) as asked, pytest.raises(WrongBinding, match="no offsite exchange"):
                asked.ask("GET", "/v1/sealed", Offers)
        finally:
            other.shutdown()
            thread.join()


def test_row_36_a_clock_that_is_off_is_named_to_its_owner_alone(live_exchange):
    live_exchange.start()
    with dialled(live_exchange, clock=lambda: time.time() - 86400) as asked, pytest.raises(Untrusted) as caught:
        asked.ask("GET", "/v1/sealed", Offers)
    assert "clock" in caught.value.hint
    assert re.search(r"(86400|86399) seconds", caught.value.hint)


def test_row_38_neither_log_nor_terminal_nor_answers_hold_secrets(live_exchange, make_job, tmp_path, capfd):
    live, job = live_exchange, live_exchange.add(make_job())
    live.start(**QUICK)
    answers = [
        send(live, {}),
        send(live, {"offsite-key": "\x1b[31mred", "offsite-nonce": "very-secret"}),
        send(live, signed(live, "POST", "/v1/bundles", b"very-secret"), "POST", "/v1/bundles", b"very-secret"),
        send(live, signed(live), path="/nowhere"),
    ]
    pushed(live, live.seal(tmp_path / "late", job, created=1000, expires=2000))
    pushed(live, live.seal(tmp_path / "good", job))
    live.stop()
    out, err = capfd.readouterr()
    seen = out + err + "".join(answer.text for answer in answers)
    seen += (live.registry_folder / "registry.log").read_text()
    secrets = ["very-secret", "red", "correct horse", str(tmp_path), "Traceback", "PRIVATE KEY"]
    for party in (live.owner, live.client):
        secrets += [path.read_text().splitlines()[1] for path in party.keys.glob("*.pem")]
    assert [secret for secret in secrets if secret in seen] == []
