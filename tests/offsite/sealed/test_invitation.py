"""An invitation is what its owner signed, whole, or it is refused; and words say what letters say."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from offsite.audits.wordlist import WORDS
from offsite.errors import (
    BadKey,
    BadSchema,
    BadSignature,
    ConfigError,
    Expired,
    TooLarge,
    WrongBinding,
)
from offsite.sealed.invitation import (
    INVITATION_LIMIT_BYTES,
    Invitation,
    fingerprint_words,
    parse_invitation,
    read_invitation,
    write_invitation,
)

NOW = 1_800_000_000


@pytest.fixture
def owner(key_ring):
    return key_ring("owner")[1]


@pytest.fixture
def stated(owner):
    card = base64.b64encode(owner.public.card).decode()
    job = {"job_id": "5" * 32, "job_digest": f"sha256:{'6' * 64}", "client": owner.public.fingerprint}
    package = {"package_digest": f"sha256:{'7' * 64}", "created": NOW, "expires": NOW + 100}
    return {"title": "a trial", "card": card, "url": "https://owner.example:8443", **job, **package}


def signed(body: dict, identity) -> bytes:
    raw = json.dumps(body).encode()
    file = {"format": "offsite/invitation/1", "body": base64.b64encode(raw).decode()}
    return json.dumps({**file, "signatures": identity.sign("invitation", raw).to_json()}).encode()


def test_what_is_written_is_read_back(tmp_path, owner, stated):
    out = tmp_path / "invitation.offsite.json"
    digest = write_invitation(out, Invitation(**stated), owner)
    found = read_invitation(out, now=NOW)
    assert (found.invitation.model_dump(exclude_none=True), found.digest) == (stated, digest)
    assert (found.owner.fingerprint, out.stat().st_mode & 0o777) == (owner.public.fingerprint, 0o644)
    for now, told in ((NOW + 101, "past its date"), (NOW - 301, "in the future")):
        with pytest.raises(Expired, match=told):
            read_invitation(out, now=now)


TAMPERED = {
    "another format": (lambda file: file | {"format": "offsite/invitation/2"}, WrongBinding),
    "no signatures": (lambda file: {name: file[name] for name in ("format", "body")}, BadSchema),
    "one signature": (lambda file: file | {"signatures": {"ed25519": file["signatures"]["ed25519"]}}, BadSignature),
    "a key more": (lambda file: file | {"token": "secret"}, BadSchema),
    "no base64": (lambda file: file | {"body": "~"}, BadSchema),
    "another base64": (lambda file: file | {"body": file["body"] + "AAAA"}, BadSchema),
    "a body more": (lambda file: file | {"body": base64.b64encode(b"{}").decode()}, BadSchema),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_a_file_that_was_changed_is_refused(owner, stated, change):
    alter, error = TAMPERED[change]
    file = json.loads(signed(stated, owner))
    with pytest.raises(error):
        parse_invitation(json.dumps(alter(file)).encode())


BODIES = {
    "half a job": ({"job_digest": None}, BadSchema),
    "a certificate without an exchange": ({"url": None, "certificate": "x"}, BadSchema),
    "a certificate that is none": ({"certificate": "-----BEGIN"}, BadSchema),
    "an address with a path": ({"url": "https://owner.example/in"}, BadSchema),
    "an address with a name and a word": ({"url": "https://me:word@owner.example"}, BadSchema),
    "another scheme": ({"url": "file://owner.example"}, BadSchema),
    "over before it begins": ({"expires": NOW}, BadSchema),
    "a title of two lines": ({"title": "a\nb"}, BadSchema),
    "a title that turns": ({"title": "a\u202eb"}, BadSchema),
    "a setting more": ({"folder": "/etc"}, BadSchema),
    "a card that is none": ({"card": base64.b64encode(b'{"format": "offsite/card/1"}').decode()}, BadKey),
}


@pytest.mark.parametrize("change", BODIES)
def test_what_is_signed_and_wrong_is_refused(owner, stated, change):
    changes, error = BODIES[change]
    with pytest.raises(error):
        parse_invitation(signed({**stated, **changes}, owner))


def test_who_signs_is_whose_card_it_is(key_ring, owner, stated):
    other = key_ring("third")[1]
    with pytest.raises(BadSignature):
        parse_invitation(signed(stated, other))
    found = json.loads(signed(stated, owner))
    body = base64.b64encode(json.dumps({**stated, "title": "another"}).encode()).decode()
    with pytest.raises(BadSignature):
        parse_invitation(json.dumps(found | {"body": body}).encode())


def test_what_is_too_large_is_not_looked_at():
    with pytest.raises(TooLarge):
        parse_invitation(b" " * (INVITATION_LIMIT_BYTES + 1))


def test_an_owner_is_told_of_a_certificate_that_is_none(tmp_path, owner, stated):
    with pytest.raises(ConfigError, match="not one in PEM"):
        write_invitation(tmp_path / "out", Invitation(**{**stated, "certificate": "no"}), owner)
    assert list(tmp_path.iterdir()) == []


def test_one_of_an_earlier_version_is_read():
    found = parse_invitation((Path(__file__).parents[2] / "vectors/invitation/invitation.offsite.json").read_bytes())
    assert (found.owner.name, found.invitation.title, found.invitation.url) == ("owner", "a trial", None)
    assert found.invitation.job_id == "ce15ccb8418618598780553719f98e70"


def test_words_and_letters_say_the_same(key_ring):
    found = {name: fingerprint_words(key_ring(name)[1].public.fingerprint) for name in ("owner", "client")}
    assert {len(words) for words in found.values()} == {32}
    raw = bytes(WORDS.index(word) for word in found["owner"])
    letters = base64.b32encode(raw).decode().lower().rstrip("=")
    assert letters == key_ring("owner")[1].public.fingerprint.replace("-", "")
