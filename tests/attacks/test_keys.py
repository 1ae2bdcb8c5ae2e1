"""Attempts on keys, cards and trust: rows 7, 9, 35 and 38 of the attack table. None may be taken in, none may tell."""

from __future__ import annotations

import base64
import json
import logging
import os
import traceback

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from offsite import cli
from offsite.errors import (
    ArtefactError,
    BadKey,
    BadSignature,
    OffsiteError,
    TooLarge,
    Untrusted,
    WrongBinding,
    WrongRecipient,
)
from offsite.keys import files as keyfiles
from offsite.keys.identity import (
    CARD_LIMIT_BYTES,
    PublicKeys,
    Signatures,
    generate,
    load_identity,
    read_card,
    save_identity,
)
from offsite.keys.trust import MAX_SKEW_SECONDS, TrustStore

PASSPHRASE = b"a-passphrase-nobody-may-see"
KEY_FILES = ("signing-ed25519.pem", "signing-mldsa65.pem", "receiving-mlkem768.pem", "receiving-x25519.pem")
FIELD = 2**255 - 19
ORDER_8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")


@pytest.fixture(scope="module")
def victim():
    return generate("Clinic", days=30)


@pytest.fixture(scope="module")
def attacker():
    return generate("Clinic", days=30)  # the same name: names prove nothing


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    monkeypatch.setattr(keyfiles, "SCRYPT_COST", 2)
    monkeypatch.delenv("OFFSITE_PASSPHRASE", raising=False)


@pytest.fixture
def folder(tmp_path, victim):
    save_identity(tmp_path / "keys", victim, PASSPHRASE)
    return tmp_path / "keys"


def b64(raw):
    return base64.b64encode(raw).decode()


def make_card(signer, *, signatures=None, outer=None, raw_body=None, **changes):
    """A card with one change in its body, signed again by `signer` unless `signatures` replaces theirs."""
    card = json.loads(signer.public.card)
    body = json.loads(base64.b64decode(card["body"]))
    raw = json.dumps({**body, **changes}).encode() if raw_body is None else raw_body
    signed = signer.sign("card", raw).to_json()
    whole = {**card, "body": b64(raw), "signatures": {**signed, **(signatures or {})}, **(outer or {})}
    return json.dumps({name: value for name, value in whole.items() if value is not None}).encode()


# Row 7: who may issue


def test_row_07_unknown_issuer(folder, victim, attacker):
    store = TrustStore(folder)
    store.add(attacker.public.card, attacker.public.fingerprint)
    with pytest.raises(Untrusted, match="is not pinned here"):
        store.require(victim.public.fingerprint, now=victim.public.created)


def test_row_07_valid_signature_by_a_revoked_key(folder, victim):
    store, public = TrustStore(folder), victim.public
    store.add(public.card, public.fingerprint)
    store.require(public.fingerprint, now=public.created).verify("manifest", b"x", victim.sign("manifest", b"x"))
    store.revoke(public.fingerprint)
    for now in (public.created, public.expires - 1, 0):
        with pytest.raises(Untrusted, match="is revoked"):
            store.require(public.fingerprint, now=now)
    with pytest.raises(Untrusted, match="was revoked here"):
        store.add(public.card, public.fingerprint)


def test_row_07_valid_signature_by_an_expired_or_future_key(folder, victim):
    store, public = TrustStore(folder), victim.public
    store.add(public.card, public.fingerprint)
    for now in (public.expires, public.expires + 10**9, public.created - MAX_SKEW_SECONDS - 1):
        with pytest.raises(Untrusted, match=r"is (expired|not yet valid)"):
            store.require(public.fingerprint, now=now)


def test_row_07_a_card_changed_on_its_way_is_not_the_fingerprint_that_was_told(folder, victim, attacker):
    store = TrustStore(folder)
    with pytest.raises(Untrusted, match="not the one given"):
        store.add(attacker.public.card, victim.public.fingerprint)
    assert store.peers() == []


# Row 8, the part that is about signatures: neither of the two can be left out


def test_row_08_a_signature_stripped_of_either_half(victim, attacker):
    mine, theirs = victim.sign("manifest", b"x"), attacker.sign("manifest", b"x")
    for half in ("ed25519", "mldsa65"):
        stripped = {name: text for name, text in mine.to_json().items() if name != half}
        with pytest.raises(BadSignature):
            Signatures.from_json(stripped)
    for forged, broken in [
        (Signatures(mine.ed25519, theirs.mldsa65), "mldsa65"),
        (Signatures(theirs.ed25519, mine.mldsa65), "ed25519"),
        (Signatures(mine.ed25519, b""), "mldsa65"),
        (Signatures(b"", mine.mldsa65), "ed25519"),
        (Signatures(mine.ed25519, bytes(3309)), "mldsa65"),
        (Signatures(bytes(64), mine.mldsa65), "ed25519"),
    ]:
        with pytest.raises(BadSignature, match=f"the {broken} signature"):
            victim.public.verify("manifest", b"x", forged)


# Row 9: keys that must not be registered


SMALL_ORDER_ED25519 = [
    (y | sign << 255).to_bytes(32, "little")
    for y in (0, 1, FIELD - 1, ORDER_8, FIELD - ORDER_8, FIELD, FIELD + 1)
    for sign in (0, 1)
]


@pytest.mark.parametrize("public", SMALL_ORDER_ED25519, ids=lambda raw: raw.hex()[:8] + raw.hex()[-2:])
def test_row_09_small_order_ed25519(attacker, public):
    with pytest.raises(BadKey, match="ed25519 is not a sound public key"):
        read_card(make_card(attacker, ed25519=b64(public)))


def test_row_09_the_attack_is_real_one_signature_for_every_message(attacker):
    """The library accepts what the check on cards keeps out."""
    identity_point = (1).to_bytes(32, "little")
    anything = identity_point + bytes(32)
    key = Ed25519PublicKey.from_public_bytes(identity_point)
    key.verify(anything, b"pay one")
    key.verify(anything, b"pay a million")
    forged = make_card(attacker, ed25519=b64(identity_point), signatures={"ed25519": b64(anything)})
    with pytest.raises(BadKey, match="ed25519 is not a sound public key"):
        read_card(forged)


SMALL_ORDER_X25519 = [
    0,
    1,
    FIELD - 1,
    FIELD,
    FIELD + 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
]


@pytest.mark.parametrize("point", SMALL_ORDER_X25519)
@pytest.mark.parametrize("high_bit", [0, 1])
def test_row_09_small_order_x25519(attacker, point, high_bit):
    raw = (point | high_bit << 255).to_bytes(32, "little")
    with pytest.raises(BadKey, match="x25519 is not a sound public key"):
        read_card(make_card(attacker, x25519=b64(raw)))


def test_row_09_a_second_spelling_of_a_sound_x25519_key(attacker):
    """The curve ignores the highest bit, so that one key would have two fingerprints."""
    raw = bytearray(attacker.public.x25519)
    raw[31] |= 0x80
    with pytest.raises(BadKey, match="x25519 is not a sound public key"):
        read_card(make_card(attacker, x25519=b64(raw)))


def test_row_09_an_mldsa_key_that_anybody_can_sign_for(attacker):
    with pytest.raises(BadKey, match="mldsa65 is not a sound public key"):
        read_card(make_card(attacker, mldsa65=b64(attacker.public.mldsa65[:32] + bytes(1920))))


def test_row_09_an_mlkem_key_beyond_its_modulus(attacker):
    for raw in (b"\xff" * 1184, b"\xff\xff" + attacker.public.mlkem768[2:]):
        with pytest.raises(BadKey, match="mlkem768 is not a sound public key"):
            read_card(make_card(attacker, mlkem768=b64(raw)))


@pytest.mark.parametrize("name", ["ed25519", "mldsa65", "mlkem768", "x25519"])
def test_row_09_malformed_keys(attacker, name):
    good = getattr(attacker.public, name)
    text = b64(good)
    for bad in ("", b64(good[:-1]), b64(good + b"\0"), text + "=", " " + text, text[:-4] + "????", good.hex(), None, 5):
        with pytest.raises(BadKey, match="card"):
            read_card(make_card(attacker, **{name: bad}))


def test_row_09_no_possession_of_a_signing_key(victim, attacker):
    """Another party's signing key in one's own card, whatever is signed with what one has."""
    for name in ("ed25519", "mldsa65"):
        taken = make_card(attacker, **{name: b64(getattr(victim.public, name))})
        with pytest.raises(BadSignature, match=f"the {name} signature over the card does not verify"):
            read_card(taken)
    borrowed = victim.sign("manifest", base64.b64decode(json.loads(victim.public.card)["body"])).to_json()
    with pytest.raises(BadSignature):
        read_card(make_card(victim, signatures=borrowed))  # signed by the right keys, for another purpose


def test_row_09_anothers_receiving_key_gives_another_fingerprint_and_opens_nothing(victim, attacker):
    """A card may name receiving keys its holder cannot use: what is wrapped for it is then lost to the holder."""
    kem = {name: b64(getattr(victim.public, name)) for name in ("mlkem768", "x25519")}
    mixed = read_card(make_card(attacker, **kem))
    assert mixed.fingerprint not in (victim.public.fingerprint, attacker.public.fingerprint)
    with pytest.raises(WrongRecipient):
        attacker.unwrap(mixed.wrap(b"secret", b"info"), b"info")


def test_row_10_cards_of_another_form(attacker):
    body = base64.b64decode(json.loads(attacker.public.card)["body"])
    card = attacker.public.card
    for bad, error in [
        (b"", BadKey),
        (b"null", BadKey),
        (b"[" * 15000, BadKey),
        (card[:-10], BadKey),
        (card + b"{}", BadKey),
        (b"\xef\xbb\xbf" + card, BadKey),
        (card.replace(b'"format"', b'"format": "offsite/card/1", "format"'), BadKey),
        (card.replace(b"offsite/card/1", b"offsite/card/2"), WrongBinding),
        (make_card(attacker, outer={"extra": 1}), BadKey),
        (make_card(attacker, outer={"body": None}), BadKey),
        (make_card(attacker, outer={"body": "%%%"}), BadKey),
        (make_card(attacker, extra=1), BadKey),
        (make_card(attacker, created=-1), BadKey),
        (make_card(attacker, created=True), BadKey),
        (make_card(attacker, expires=1e9), BadKey),
        (make_card(attacker, expires=2**40), BadKey),
        (make_card(attacker, expires=attacker.public.created), BadKey),
        (make_card(attacker, name="\x1b[2Jtrusted"), BadKey),
        (make_card(attacker, name="a" * 65), BadKey),
        (make_card(attacker, raw_body=body.replace(b'"name"', b'"name": "other", "name"')), BadKey),
        (make_card(attacker, raw_body=body.replace(b'"created": ', b'"created": NaN, "x": ')), BadKey),
        (make_card(attacker, raw_body=b"[]"), BadKey),
        (card + b" " * CARD_LIMIT_BYTES, TooLarge),
    ]:
        with pytest.raises(error):
            read_card(bad)


def test_row_10_a_body_written_again_is_not_the_body_that_was_signed(attacker):
    """The same values in other bytes: only the bytes that were signed count."""
    card = json.loads(attacker.public.card)
    body = json.loads(base64.b64decode(card["body"]))
    again = json.dumps(body, separators=(",", ":")).encode()
    with pytest.raises(BadSignature):
        read_card(json.dumps({**card, "body": b64(again)}).encode())


def test_row_01_any_bit_of_a_card_flipped(attacker):
    raw = attacker.public.card
    for position in range(0, len(raw), 29):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(ArtefactError):
            read_card(bytes(flipped))


# Row 35: key files on disk


@pytest.mark.parametrize("name", [*KEY_FILES, "card.json"])
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602])
def test_row_35_files_open_to_others(folder, name, mode):
    (folder / name).chmod(mode)
    with pytest.raises(BadKey, match=f"'{name}' is open to others") as caught:
        load_identity(folder, PASSPHRASE)
    assert caught.value.exit_code == 3


def test_row_35_a_folder_open_to_others(folder):
    for mode in (0o755, 0o770, 0o711):
        folder.chmod(mode)
        with pytest.raises(BadKey, match="keys folder 'keys' is open to others"):
            load_identity(folder, PASSPHRASE)


def test_row_35_wrong_passphrase(folder):
    for wrong in (PASSPHRASE[:-1], PASSPHRASE + b"\n", PASSPHRASE.upper(), b"", b"\0" * 2000):
        with pytest.raises(BadKey, match=r"key file 'signing-ed25519.pem' does not open: wrong passphrase, or"):
            load_identity(folder, wrong)


@pytest.mark.parametrize("name", KEY_FILES)
def test_row_35_truncated_or_missing_keys(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for length in (0, 1, 30, 60, len(whole) // 2, len(whole) - 30, len(whole) - 5):
        path.write_bytes(whole[:length])
        with pytest.raises(BadKey, match=f"key file '{name}'"):
            load_identity(folder, PASSPHRASE)
    path.unlink()
    with pytest.raises(BadKey, match=f"cannot read key file '{name}'"):
        load_identity(folder, PASSPHRASE)
    os.mkfifo(path, 0o600)
    with pytest.raises(BadKey, match="not a plain file"):
        load_identity(folder, PASSPHRASE)


@pytest.mark.parametrize("name", KEY_FILES)
def test_row_35_a_damaged_key_never_becomes_another_key(folder, victim, name):
    """Nothing authenticates the file itself, so a flip may hit what the public key does not depend on: the envelope's
    version, or the part of an ML-KEM seed that answers to wrong ciphertexts. What the card states decides.
    """
    path = folder / name
    whole, refused, num_flips = path.read_bytes(), 0, 0
    wrapped = victim.public.wrap(b"secret", b"")
    for position in range(30, len(whole) - 38, 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        num_flips += 1
        try:
            loaded = load_identity(folder, PASSPHRASE)
        except BadKey:
            refused += 1
            continue
        victim.public.verify("manifest", b"x", loaded.sign("manifest", b"x"))
        assert loaded.unwrap(wrapped, b"") == b"secret"
    assert refused >= (num_flips // 2 if name == "receiving-mlkem768.pem" else num_flips - 3)


def test_row_35_a_key_that_lies_there_unencrypted(folder, victim):
    plain = victim._ed25519.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "signing-ed25519.pem").write_bytes(plain)
    with pytest.raises(BadKey, match="is not encrypted"):
        load_identity(folder, PASSPHRASE)


def test_row_35_a_card_put_in_place_of_ours(folder, attacker):
    """Whoever can swap the card alone must not make us send theirs as ours."""
    (folder / "card.json").write_bytes(attacker.public.card)
    with pytest.raises(BadKey, match="does not belong to the card beside it"):
        load_identity(folder, PASSPHRASE)


# Row 38: no failure tells a secret


def secrets_of(identity):
    raw = [getattr(identity, f"_{name}").private_bytes_raw() for name in ("ed25519", "mldsa65", "mlkem768", "x25519")]
    shown = [PASSPHRASE.decode(), repr(PASSPHRASE), PASSPHRASE.hex(), b64(PASSPHRASE)]
    for secret in (*raw, raw[2][:32], raw[2][32:]):
        shown += [secret.hex(), secret.hex().upper(), b64(secret)[:40], repr(secret)[2:-1], str(list(secret))[1:-1]]
    return shown


def damaged(path, change):
    path.write_bytes(change(path.read_bytes()))


FAILURES = {
    "wrong passphrase": lambda f, v, a: load_identity(f, PASSPHRASE[::-1]),
    "open to others": lambda f, v, a: ((f / KEY_FILES[0]).chmod(0o644), load_identity(f, PASSPHRASE)),
    "folder open to others": lambda f, v, a: (f.chmod(0o755), load_identity(f, PASSPHRASE)),
    "truncated": lambda f, v, a: (damaged(f / KEY_FILES[1], lambda raw: raw[:99]), load_identity(f, PASSPHRASE)),
    "missing": lambda f, v, a: ((f / KEY_FILES[2]).unlink(), load_identity(f, PASSPHRASE)),
    "unencrypted": lambda f, v, a: (
        damaged(
            f / KEY_FILES[0], lambda _: v._ed25519.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        ),
        load_identity(f, PASSPHRASE),
    ),
    "of another kind": lambda f, v, a: (
        (f / KEY_FILES[0]).write_bytes((f / KEY_FILES[3]).read_bytes()),
        load_identity(f, PASSPHRASE),
    ),
    "another's card": lambda f, v, a: (
        (f / "card.json").write_bytes(a.public.card),
        load_identity(f, PASSPHRASE),
    ),
    "folder taken": lambda f, v, a: save_identity(f, v, PASSPHRASE),
    "wrong recipient": lambda f, v, a: v.unwrap(a.public.wrap(PASSPHRASE, b""), b""),
    "bad signature": lambda f, v, a: v.public.verify("manifest", PASSPHRASE, a.sign("manifest", PASSPHRASE)),
    "name that is none": lambda f, v, a: generate(PASSPHRASE.decode() + "\n", days=1),
    "secret taken for a file": lambda f, v, a: keyfiles.read_passphrase(f / PASSPHRASE.decode()),
    "passphrase file open to others": lambda f, v, a: (
        (f / "p").write_bytes(PASSPHRASE),
        (f / "p").chmod(0o644),
        keyfiles.read_passphrase(f / "p"),
    ),
    "passphrase too long": lambda f, v, a: (
        keyfiles.write_private(f / "p", PASSPHRASE * 38),
        keyfiles.read_passphrase(f / "p"),
    ),
    "secret taken for a card": lambda f, v, a: read_card(PASSPHRASE),
    "secret as a fingerprint": lambda f, v, a: TrustStore(f).add(v.public.card, PASSPHRASE.decode()),
    "secret as a peer": lambda f, v, a: TrustStore(f).require(PASSPHRASE.decode(), now=0),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_row_38_no_failure_tells_a_secret(folder, victim, attacker, failure, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(OffsiteError) as caught:
        FAILURES[failure](folder, victim, attacker)
    error = caught.value
    told = [str(error), repr(error), str(error.hint), "".join(traceback.format_exception(error))]
    told += [caplog.text, *capfd.readouterr(), repr(error.__context__), repr(error.__cause__)]
    for secret in secrets_of(victim) + secrets_of(attacker):
        assert secret not in "".join(told)
    assert str(error).count("\n") == 0


def test_row_38_objects_that_get_logged_show_no_key(victim):
    signatures = victim.sign("manifest", b"x")
    public = victim.public
    whole = "".join(f"{item} {item!r} {[item]} {{'x': {item}}}" for item in (victim, public, signatures, PublicKeys))
    for secret in secrets_of(victim):
        assert secret not in whole
    assert b64(public.mlkem768)[:40] not in whole  # public, but nobody wants 4 kB of it in a log either
    for attribute in victim.__slots__:
        assert "object at 0x" in repr(getattr(victim, attribute)) or attribute == "public"


COMMANDS = [
    ["keygen", "-o", "{keys}"],
    ["keygen", "-o", "{tmp}/new", "--passphrase-file", "{secret}"],
    ["keygen", "-o", "{tmp}/new", "--passphrase={secret}"],
    ["keygen", "-o", "{tmp}/new", "--passphrase", "{secret}"],
    ["keygen", "-o", "{tmp}/new", "passphrase={secret}"],
    ["keygen", "-o", "{tmp}/new", "--days", "0"],
    ["trust", "add", "{keys}/card.json", "--keys", "{tmp}/nowhere"],
    ["trust", "add", "{keys}/signing-ed25519.pem", "--keys", "{keys}", "--fingerprint", "x"],
    ["trust", "revoke", "{secret}", "--keys", "{keys}"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_row_38_no_command_tells_a_secret(folder, tmp_path, victim, words, capfd, monkeypatch):
    monkeypatch.setenv("OFFSITE_PASSPHRASE", PASSPHRASE.decode())
    before = sorted(tmp_path.rglob("*"))
    names = {"keys": folder, "tmp": tmp_path, "secret": PASSPHRASE.decode()}
    assert cli.run([word.format(**names) for word in words]) in (2, 3)
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("offsite: error: ")
    assert told.err.count("\n") <= 2
    for secret in secrets_of(victim):
        assert secret not in told.err
    assert sorted(tmp_path.rglob("*")) == before
