"""Wrapped data keys: for the recipient the manifest names, or for the key that both of theirs say comes after it."""

from __future__ import annotations

import base64
import json

import pytest

from offsite.errors import BadEncryption, BadSchema, BadSignature, TooLarge, WrongBinding, WrongRecipient
from offsite.sealed.manifest import SealedFile, SealedManifest, sealed_size
from offsite.sealed.recipients import (
    KEYS_LIMIT_BYTES,
    Rotation,
    SignaturePair,
    read_keys,
    rotate,
    unwrap_keys,
    wrap_keys,
    write_keys,
)

DIGEST = "sha256:" + "ab" * 32
KEYS = [bytes([number]) * 32 for number in range(2)]


@pytest.fixture(scope="module")
def people(key_ring):
    return {name: key_ring(name)[1] for name in ("owner", "client", "client-new", "stranger")}


@pytest.fixture(scope="module")
def manifest(people):
    def file(number, name):
        digest = f"sha256:{number:064x}"
        return SealedFile(
            name=name, bytes=1, sha256=digest, sealed_bytes=sealed_size(1), sealed_sha256=digest, tensors_sha256=None
        )

    return SealedManifest(
        kind="package",
        job_id="0" * 32,
        issuer=people["owner"].public.fingerprint,
        recipients=(people["client"].public.fingerprint,),
        created=1,
        expires=2,
        sequence=1,
        round=0,
        previous=None,
        base_digest=DIGEST,
        package_digest=DIGEST,
        files=(file(0, "config.json"), file(1, "offsite.json")),
    )


def reopened(wraps, manifest, identity, digest=DIGEST):
    return unwrap_keys(read_keys(write_keys(wraps)), manifest, digest, identity)


def test_the_named_recipient_unwraps(people, manifest):
    wrap = wrap_keys(KEYS, DIGEST, people["client"].public)
    assert reopened([wrap], manifest, people["client"]) == KEYS
    assert len(base64.b64decode(wrap.wrapped)) == 1120 + 64 + 16


def test_nobody_else_does(people, manifest):
    wrap = wrap_keys(KEYS, DIGEST, people["client"].public)
    with pytest.raises(WrongRecipient, match="sealed for another key"):
        reopened([wrap], manifest, people["stranger"])
    with pytest.raises(WrongRecipient):
        reopened(
            [wrap.model_copy(update={"recipient": people["stranger"].public.fingerprint})], manifest, people["stranger"]
        )
    with pytest.raises(WrongRecipient):
        reopened([wrap], manifest, people["client"], "sha256:" + "cd" * 32)


def test_row_06_a_wrap_for_whom_the_manifest_does_not_name(people, manifest):
    wrap = wrap_keys(KEYS, DIGEST, people["stranger"].public)
    with pytest.raises(WrongRecipient, match="does not name key"):
        reopened([wrap], manifest, people["stranger"])


@pytest.mark.parametrize("keys", [KEYS[:1], [*KEYS, KEYS[0]], [b"short"]])
def test_a_key_for_each_file_and_no_more(people, manifest, keys):
    with pytest.raises(BadEncryption, match="the manifest has 2 files"):
        reopened([wrap_keys(keys, DIGEST, people["client"].public)], manifest, people["client"])


def test_a_recipient_moves_to_a_new_key(people, manifest):
    rotation = rotate(manifest, DIGEST, people["client"], people["client-new"])
    wrap = wrap_keys(KEYS, DIGEST, people["client-new"].public, rotation)
    assert reopened([wrap], manifest, people["client-new"]) == KEYS


def moved(people, manifest, *, old="client", new="client-new", to=None, **changes):
    rotation = rotate(manifest, DIGEST, people[old], people[new]).model_copy(update=changes)
    return wrap_keys(KEYS, DIGEST, people[to or new].public, rotation)


def pair(identity, statement):
    return SignaturePair(**identity.sign("rotation", statement).to_json())


def test_row_06_the_old_key_alone_cannot_name_a_stranger(people, manifest):
    """The recipient says that a stranger's key is theirs: without that key's own word it does not count."""
    old, stranger = people["client"], people["stranger"]
    statement = "\0".join([DIGEST, old.public.fingerprint, stranger.public.fingerprint]).encode()
    rotation = Rotation(
        named=old.public.fingerprint,
        card=base64.b64encode(old.public.card).decode(),
        by_named=pair(old, statement),
        by_recipient=pair(old, statement),
    )
    with pytest.raises(BadSignature):
        reopened([wrap_keys(KEYS, DIGEST, stranger.public, rotation)], manifest, stranger)


def test_a_rotation_is_for_one_manifest_and_one_key(people, manifest):
    new = people["client-new"]
    elsewhere = rotate(manifest, "sha256:" + "cd" * 32, people["client"], new)
    with pytest.raises(BadSignature):
        reopened([wrap_keys(KEYS, DIGEST, new.public, elsewhere)], manifest, new)
    with pytest.raises(BadSignature):
        reopened([moved(people, manifest, to="stranger")], manifest, people["stranger"])


def test_a_rotation_needs_the_named_key(people, manifest):
    new, stranger = people["client-new"], people["stranger"]
    card = base64.b64encode(stranger.public.card).decode()
    with pytest.raises(BadSignature, match="another card"):
        reopened([moved(people, manifest, card=card)], manifest, new)
    with pytest.raises(WrongRecipient, match="does not name"):
        reopened([moved(people, manifest, named=stranger.public.fingerprint)], manifest, new)
    statement = "\0".join([DIGEST, people["client"].public.fingerprint, new.public.fingerprint]).encode()
    with pytest.raises(BadSignature):
        reopened([moved(people, manifest, by_named=pair(new, statement))], manifest, new)


def test_what_cannot_be_rotated(people, manifest):
    with pytest.raises(WrongRecipient, match="does not name key"):
        rotate(manifest, DIGEST, people["stranger"], people["client-new"])
    with pytest.raises(WrongRecipient, match="already"):
        rotate(manifest, DIGEST, people["client"], people["client"])
    rotation = rotate(manifest, DIGEST, people["client"], people["client-new"])
    with pytest.raises(BadSchema, match="names itself"):
        reopened([wrap_keys(KEYS, DIGEST, people["client"].public, rotation)], manifest, people["client"])


def test_there_is_one_form_of_the_file(people):
    wrap = wrap_keys(KEYS, DIGEST, people["client"].public)
    raw = write_keys([wrap])
    assert read_keys(raw).wraps == (wrap,)
    stated = json.loads(raw)
    for other in (raw + b" ", json.dumps(stated).encode(), raw.replace(b'"rotation":null', b'"rotation": null')):
        with pytest.raises(BadSchema, match="one form"):
            read_keys(other)
    with pytest.raises(BadSchema, match="two wraps"):
        read_keys(write_keys([wrap, wrap]))
    with pytest.raises(WrongBinding, match="offsite/keys/2"):
        read_keys(raw.replace(b"offsite/keys/1", b"offsite/keys/2"))
    with pytest.raises(TooLarge):
        read_keys(b" " * (KEYS_LIMIT_BYTES + 1))


@pytest.mark.parametrize("change", [lambda text: text[:-1], lambda text: text + "====", lambda _: "!", lambda _: ""])
def test_base64_has_one_form(people, manifest, change):
    wrap = wrap_keys(KEYS, DIGEST, people["client"].public)
    with pytest.raises((BadSchema, WrongRecipient)):
        reopened([wrap.model_copy(update={"wrapped": change(wrap.wrapped)})], manifest, people["client"])
