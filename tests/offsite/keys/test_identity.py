from __future__ import annotations

import base64
import copy
import json
import os
import pickle
import re
import time

import pytest

from offsite import cli
from offsite.errors import BadKey, BadSignature, ConfigError, RunFailed, WrongRecipient
from offsite.keys import files as keyfiles
from offsite.keys import identity as keys
from offsite.keys.identity import (
    FINGERPRINT_PATTERN,
    Signatures,
    generate,
    is_sound,
    load_identity,
    read_card,
    save_identity,
)

FILES = {"card.json", "signing-ed25519.pem", "signing-mldsa65.pem", "receiving-mlkem768.pem", "receiving-x25519.pem"}


@pytest.fixture(scope="module")
def clinic():
    return generate("Clinic", days=30)


@pytest.fixture(scope="module")
def model_co():
    return generate("Model Co", days=30)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    monkeypatch.setattr(keyfiles, "SCRYPT_COST", 2)


def test_a_signature_is_two_and_fits_one_purpose_and_message(clinic, model_co):
    signatures = clinic.sign("manifest", b"the bytes")
    clinic.public.verify("manifest", b"the bytes", signatures)
    assert (len(signatures.ed25519), len(signatures.mldsa65)) == (64, 3309)
    for party, purpose, message in [
        (clinic, "manifest", b"the byteS"),
        (clinic, "manifest", b""),
        (clinic, "request", b"the bytes"),
        (model_co, "manifest", b"the bytes"),
    ]:
        with pytest.raises(BadSignature, match=f"^the ed25519 signature over the {purpose} does not verify$"):
            party.public.verify(purpose, message, signatures)


def test_what_is_signed_is_framed_as_dsse_says(clinic):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PublicKey

    signatures, framed = clinic.sign("card", b"hello world"), b"DSSEv1 15 offsite/v1/card 11 hello world"
    Ed25519PublicKey.from_public_bytes(clinic.public.ed25519).verify(signatures.ed25519, framed)
    MLDSA65PublicKey.from_public_bytes(clinic.public.mldsa65).verify(signatures.mldsa65, framed)


@pytest.mark.parametrize("purpose", ["", "Card", "a b", "../x", "a" * 33, "card\n"])
def test_a_purpose_is_one_short_word(clinic, purpose):
    with pytest.raises(ValueError, match="short word"):
        clinic.sign(purpose, b"")


def test_signatures_cross_as_json(clinic):
    signatures = clinic.sign("manifest", b"x")
    assert Signatures.from_json(json.loads(json.dumps(signatures.to_json()))) == signatures
    assert len(repr(signatures)) < 40


def test_signatures_of_another_form_are_refused(clinic):
    good = clinic.sign("manifest", b"x").to_json()
    first = good["ed25519"]
    for bad in (
        None,
        [],
        "",
        {},
        {"ed25519": first},
        {**good, "rsa": first},
        {**good, "ed25519": None},
        {**good, "ed25519": first[:-4]},
        {**good, "ed25519": first + "AAAA"},
        {**good, "ed25519": first[:-3] + "B=="},  # the unused bits of the last letter set: not canonical
        {**good, "ed25519": "\n" + first},
        {**good, "ed25519": first.replace("=", "")},
        {**good, "mldsa65": first},
        {**good, "ed25519": first[:-6] + "\u0430" * 4 + "=="},
    ):
        with pytest.raises(BadSignature, match=r"^signatures: "):
            Signatures.from_json(bad)


def test_a_secret_is_wrapped_for_one_party_and_one_use(clinic, model_co):
    wrapped = clinic.public.wrap(b"k" * 32, b"manifest digest")
    assert len(wrapped) == 1168
    assert wrapped != clinic.public.wrap(b"k" * 32, b"manifest digest")
    assert clinic.unwrap(wrapped, b"manifest digest") == b"k" * 32
    changed = bytearray(wrapped)
    changed[600] ^= 1
    for party, parcel, info in [
        (model_co, wrapped, b"manifest digest"),
        (clinic, wrapped, b"other digest"),
        (clinic, bytes(changed), b"manifest digest"),
        (clinic, wrapped[:-1], b"manifest digest"),
        (clinic, wrapped[:1120], b"manifest digest"),
        (clinic, wrapped + b"x", b"manifest digest"),
        (clinic, b"", b"manifest digest"),
    ]:
        with pytest.raises(WrongRecipient, match="does not open with these keys"):
            party.unwrap(parcel, info)


def test_a_fingerprint_is_of_the_keys_alone(clinic, model_co):
    public = clinic.public
    assert re.fullmatch(FINGERPRINT_PATTERN, public.fingerprint)
    assert public.fingerprint != model_co.public.fingerprint
    assert read_card(public.card) == public
    import hashlib

    raw = public.ed25519 + public.mldsa65 + public.mlkem768 + public.x25519
    digest = hashlib.sha256(b"offsite/v1/fingerprint\0" + raw).digest()
    assert base64.b32decode(public.fingerprint.replace("-", "").upper() + "====") == digest


def test_a_card_tells_what_others_need_and_no_more(clinic):
    card = json.loads(clinic.public.card)
    assert set(card) == {"format", "body", "signatures"}
    body = json.loads(base64.b64decode(card["body"]))
    assert set(body) == {"name", "ed25519", "mldsa65", "mlkem768", "x25519", "created", "expires"}
    assert body["expires"] - body["created"] == 30 * 86400
    assert abs(body["created"] - time.time()) < 600
    for private in (clinic._ed25519, clinic._mldsa65, clinic._mlkem768, clinic._x25519):
        secret = private.private_bytes_raw()
        assert secret not in clinic.public.card
        assert base64.b64encode(secret)[:-3] not in base64.b64decode(card["body"])


def test_generate_refuses_a_name_that_no_card_may_bear():
    with pytest.raises(BadKey, match="card body: 'name'"):
        generate("a\nb", days=1)


def test_the_order_8_constant_is_the_y_of_a_point_of_order_8():
    prime, coordinate = 2**255 - 19, keys._ORDER_8
    curve = -121665 * pow(121666, -1, prime) % prime
    # doubling gives y = 0, a point of order 4, exactly when x squared is minus y squared; put into the curve's equation
    assert (curve * coordinate**4 + 2 * coordinate**2 - 1) % prime == 0


def test_sound_keys_are_of_their_length(clinic):
    for name in ("ed25519", "mldsa65", "mlkem768", "x25519"):
        raw = getattr(clinic.public, name)
        assert is_sound(name, raw)
        assert not is_sound(name, raw[:-1])
        assert not is_sound(name, raw + b"\0")
        assert not is_sound(name, b"")


def test_an_identity_survives_its_folder(clinic, tmp_path):
    old = os.umask(0)
    try:
        save_identity(tmp_path / "keys", clinic, b"open sesame")
    finally:
        os.umask(old)
    assert {path.name for path in (tmp_path / "keys").iterdir()} == FILES
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()} == {0o600}
    loaded = load_identity(tmp_path / "keys", b"open sesame")
    assert loaded.public == clinic.public
    clinic.public.verify("manifest", b"x", loaded.sign("manifest", b"x"))
    assert loaded.unwrap(clinic.public.wrap(b"secret", b""), b"") == b"secret"


def test_no_folder_is_left_when_saving_fails(clinic, tmp_path, monkeypatch):
    real, calls = keys.write_private, []

    def full_disk(path, content):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(keys, "write_private", full_disk)
    with pytest.raises(RunFailed, match="cannot write 'keys': no space left on device"):
        save_identity(tmp_path / "keys", clinic, b"open sesame")
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_is_not_the_cards_is_refused(clinic, model_co, tmp_path):
    save_identity(tmp_path / "clinic", clinic, b"x")
    save_identity(tmp_path / "model", model_co, b"x")
    for name in sorted(FILES - {"card.json"}):
        mine = (tmp_path / "clinic" / name).read_bytes()
        (tmp_path / "clinic" / name).write_bytes((tmp_path / "model" / name).read_bytes())
        with pytest.raises(BadKey, match=f"^key file '{name}' does not belong to the card beside it$"):
            load_identity(tmp_path / "clinic", b"x")
        (tmp_path / "clinic" / name).write_bytes(mine)
    load_identity(tmp_path / "clinic", b"x")


def test_an_identity_shows_and_gives_away_nothing_but_its_fingerprint(clinic):
    assert repr(clinic) == str(clinic) == f"Identity({clinic.public.fingerprint})"
    assert repr(clinic.public) == f"PublicKeys('Clinic', {clinic.public.fingerprint})"
    assert not hasattr(clinic, "__dict__")
    for steal in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not copied or serialised"):
            steal(clinic)


def test_keygen_prints_the_fingerprint_for_people_and_json_for_programs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OFFSITE_PASSPHRASE", "open sesame")
    out = tmp_path / "keys"
    assert cli.run(["keygen", "-o", str(out), "--name", "Clinic", "--days", "7"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    public = read_card((out / "card.json").read_bytes())
    assert result["fingerprint"] == public.fingerprint
    assert f"fingerprint of Clinic: {public.fingerprint}\n" in told.err
    assert set(result) == {"card", "expires", "fingerprint", "keys", "name"}
    assert load_identity(out, b"open sesame").public.expires == result["expires"]
    assert cli.run(["keygen", "-o", str(out)]) == 2
    assert "output 'keys' already exists" in capsys.readouterr().err


def test_keygen_asks_for_no_passphrase_it_could_not_use(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "read_passphrase", lambda *_, **__: pytest.fail("asked"))
    (tmp_path / "keys").mkdir()
    assert cli.run(["keygen", "-o", str(tmp_path / "keys")]) == 2


def test_opening_an_identity_asks_only_where_there_is_one(tmp_path, monkeypatch):
    from offsite.keys.config import IdentityConfig

    monkeypatch.setattr(keys, "read_passphrase", lambda *_: pytest.fail("asked"))
    with pytest.raises(ConfigError, match=r"no keys folder at .*keys'"):
        keys.open_identity(IdentityConfig(keys=tmp_path / "keys"))
