"""A request is taken once, in time, from its signer, for its owner, and exactly as it was signed."""

from __future__ import annotations

import hashlib

import pytest

from offsite.errors import ArtefactError, BadSchema, BadSignature, Expired, Replayed, Untrusted
from offsite.exchange.requests import EMPTY_DIGEST, WINDOW_SECONDS, check_request, sign_request
from offsite.keys.identity import generate

NOW = 1_800_000_000
PATH = "/v1/bundles/" + "ab" * 32


@pytest.fixture(scope="module")
def client():
    return generate("client", days=1)


@pytest.fixture(scope="module")
def owner():
    return generate("owner", days=1)


class Desk:
    """The exchange's side: one trusted client, and nonces in memory."""

    def __init__(self, client, owner):
        self.client, self.owner, self.seen = client.public, owner.public, set()

    def lookup(self, fingerprint):
        if fingerprint != self.client.fingerprint:
            raise Untrusted("unknown")
        return self.client

    def admit(self, request):
        if request.nonce in self.seen:
            raise Replayed("again")
        self.seen.add(request.nonce)

    def check(self, headers, method="GET", path=PATH, now=NOW):
        pairs = headers if isinstance(headers, list) else [(k.encode(), v.encode()) for k, v in headers.items()]
        arguments = {"owner": self.owner, "lookup": self.lookup, "admit": self.admit, "now": now}
        return check_request(method, path, pairs, **arguments)


@pytest.fixture
def desk(client, owner):
    return Desk(client, owner)


def signed(client, owner, method="GET", path=PATH, body=b"", now=NOW):
    return sign_request(client, method, path, body, owner=owner.public.fingerprint, now=now)


def test_a_signed_request_says_who_asks_for_what(client, owner, desk):
    found = desk.check(signed(client, owner, "PUT", body=b"part"), "PUT")
    assert (found.key, found.method, found.path) == (client.public.fingerprint, "PUT", PATH)
    assert found.body_digest == hashlib.sha256(b"part").hexdigest()
    assert desk.check(signed(client, owner)).body_digest == EMPTY_DIGEST


def test_headers_fit_into_what_any_server_takes(client, owner):
    headers = signed(client, owner)
    assert sum(len(name) + len(value) + 4 for name, value in headers.items()) < 6000


CHANGES = {
    "another method": ({}, {"method": "POST"}),
    "another path": ({}, {"path": "/v1/bundles/" + "cd" * 32}),
    "another body": ({"offsite-body-sha256": "0" * 64}, {}),
    "another time": ({"offsite-time": str(NOW + 1)}, {}),
    "another nonce": ({"offsite-nonce": "0" * 32}, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_that_is_signed_can_be_changed(client, owner, desk, change):
    headers, arguments = CHANGES[change]
    with pytest.raises(BadSignature):
        desk.check({**signed(client, owner), **headers}, **arguments)
    assert not desk.seen


@pytest.mark.parametrize("name", ["ed25519", "mldsa65"])
def test_both_signatures_count(client, owner, desk, name):
    headers, other = signed(client, owner), signed(client, owner)
    header = f"offsite-signature-{name}"
    with pytest.raises(BadSignature, match=name):
        desk.check({**headers, header: other[header]})
    del headers[header]
    with pytest.raises(BadSignature, match=name):
        desk.check(headers)


def test_a_request_for_one_owner_is_none_for_another(client, owner, desk):
    with pytest.raises(BadSignature):
        desk.check(signed(client, generate("other owner", days=1)))


def test_a_stranger_costs_as_much_as_a_wrong_signature_and_is_named(client, owner, desk, monkeypatch):
    stranger, checked = generate("stranger", days=1), []
    monkeypatch.setattr(type(owner.public), "verify", lambda *_: checked.append(1))
    with pytest.raises(Untrusted):
        desk.check(signed(stranger, owner))
    assert checked == [1]


@pytest.mark.parametrize("late", [-WINDOW_SECONDS, 0, WINDOW_SECONDS])
def test_within_the_window_clocks_may_differ(client, owner, desk, late):
    assert desk.check(signed(client, owner), now=NOW + late).time == NOW


@pytest.mark.parametrize(
    ("late", "side"), [(WINDOW_SECONDS + 1, "ago"), (-WINDOW_SECONDS - 1, "ahead"), (10**9, "ago")]
)
def test_row_36_beyond_the_window_it_is_late(client, owner, desk, late, side):
    with pytest.raises(Expired, match=side):
        desk.check(signed(client, owner), now=NOW + late)
    assert not desk.seen


def test_once_is_once(client, owner, desk):
    headers = signed(client, owner)
    desk.check(headers)
    with pytest.raises(Replayed):
        desk.check(headers)


MALFORMED = {
    "offsite-key": ["", "x", "a" * 64, "../../etc"],
    "offsite-time": ["", "0", "-1", "1e9", "1" * 13, "١٨"],
    "offsite-nonce": ["", "0" * 31, "G" * 32, "0" * 33],
    "offsite-body-sha256": ["", "sha256:" + "0" * 64, "0" * 63],
    "offsite-signature-ed25519": ["", "!!!!", "AAAA", "A" * 100_000],
    "offsite-signature-mldsa65": ["", "!!!!", "AAAA"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in MALFORMED.items() for value in values])
def test_malformed_headers_are_refused_without_repeating_them(client, owner, desk, name, value):
    with pytest.raises(ArtefactError) as caught:
        desk.check({**signed(client, owner), name: value})
    assert isinstance(caught.value, BadSchema | BadSignature)
    assert len(str(caught.value)) < 100
    assert not value or value not in str(caught.value)


def test_doubled_and_missing_headers_are_refused(client, owner, desk):
    pairs = [(k.encode(), v.encode()) for k, v in signed(client, owner).items()]
    with pytest.raises(BadSchema, match="twice"):
        desk.check([*pairs, (b"offsite-nonce", b"0" * 32)])
    with pytest.raises(BadSchema, match="offsite-key is missing"):
        desk.check([])


@pytest.mark.parametrize(
    "path", ["", "/", "v1", "/v1/", "/v1/../x", "/v1/%2e", "/v1/a b", "/v1/A", "/v1/x\n/y", "/v1" * 9]
)
def test_only_plain_paths_can_be_signed_for(client, owner, desk, path):
    with pytest.raises(BadSchema, match="path"):
        desk.check(signed(client, owner, path=path), path=path)
    with pytest.raises(BadSchema, match="method"):
        desk.check(signed(client, owner, "DELETE"), "DELETE")
