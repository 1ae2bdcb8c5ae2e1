"""The library's primitives against published vectors: what is valid works, what is invalid is refused."""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
import zlib
from pathlib import Path

import pytest
from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from offsite.keys.identity import generate, is_sound

VECTORS = Path(__file__).parents[2] / "vectors" / "wycheproof"
REFUSED = (InvalidTag, InvalidSignature, ValueError)
AES_256_GCM, CHACHA20_POLY1305 = 2, 3


def load(name):
    return json.loads(gzip.decompress((VECTORS / f"{name}.json.gz").read_bytes()))


def check(name, works):
    """Every vector of the file: `works(group, test)` tells true, tells false, or is refused."""
    document, wrong = load(name), []
    tests = [(group, test) for group in document["testGroups"] for test in group["tests"]]
    for group, test in tests:
        try:
            outcome = works(group, test)
        except REFUSED:
            outcome = None
        expected = {"valid": {True}, "invalid": {None}, "acceptable": {True, None}}[test["result"]]
        if outcome not in expected:
            wrong.append((test["tcId"], test["result"], test["flags"], outcome))
    assert wrong == []
    assert len(tests) == document["numberOfTests"] >= 10


def raw(test, *names):
    return [bytes.fromhex(test.get(name, "")) for name in names]


def test_aes_256_gcm():
    def works(_, test):
        key, nonce, aad, message, body, tag = raw(test, "key", "iv", "aad", "msg", "ct", "tag")
        return AESGCM(key).decrypt(nonce, body + tag, aad) == message and (
            AESGCM(key).encrypt(nonce, message, aad) == body + tag
        )

    check("aes_gcm_256", works)


def test_x25519_and_that_keys_of_small_order_are_refused_on_cards():
    def works(_, test):
        public, private, shared = raw(test, "public", "private", "shared")
        if not any(shared):
            assert not is_sound("x25519", public)
        return (
            X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public)) == shared
        )

    check("x25519", works)


def test_ed25519_and_that_keys_of_small_order_are_refused_on_cards():
    def works(group, test):
        (public,) = raw(group["publicKey"], "pk")
        assert is_sound("ed25519", public) == ("SmallOrderPublicKey" not in test["flags"])
        message, signature = raw(test, "msg", "sig")
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
        return True

    check("ed25519", works)


def test_hkdf_sha256():
    def works(_, test):
        secret, salt, info, derived = raw(test, "ikm", "salt", "info", "okm")
        return HKDF(SHA256(), test["size"], salt, info).derive(secret) == derived

    check("hkdf_sha256", works)


def test_mlkem_768_decapsulation():
    def works(_, test):
        seed, public, wrapped, shared = raw(test, "seed", "ek", "c", "K")
        key = MLKEM768PrivateKey.from_seed_bytes(seed)
        return key.decapsulate(wrapped) == shared and key.public_key().public_bytes_raw() == public

    check("mlkem_768", works)


def test_mlkem_768_key_generation():
    def works(_, test):
        seed, public = raw(test, "seed", "ek")
        return MLKEM768PrivateKey.from_seed_bytes(seed).public_key().public_bytes_raw() == public

    check("mlkem_768_keygen", works)


def test_mlkem_768_refuses_malformed_public_keys_and_so_do_cards():
    def works(_, test):
        (public,) = raw(test, "ek")
        assert not is_sound("mlkem768", public)
        MLKEM768PublicKey.from_public_bytes(public)
        return True

    check("mlkem_768_encaps", works)


def test_mldsa_65_verification_and_that_keys_anybody_can_sign_for_are_refused_on_cards():
    def works(group, test):
        (public,) = raw(group, "publicKey")
        assert is_sound("mldsa65", public) == (len(public) == 1952 and "ZeroPublicKey" not in test["flags"])
        message, signature, context = raw(test, "msg", "sig", "ctx")
        MLDSA65PublicKey.from_public_bytes(public).verify(signature, message, context)
        return True

    check("mldsa_65_verify", works)


def test_mldsa_65_keys_and_signatures():
    def works(group, test):
        (seed,) = raw(group, "privateSeed")
        message, signature, context, digest = raw(test, "msg", "sig", "ctx", "mu")
        key = MLDSA65PrivateKey.from_seed_bytes(seed)
        assert key.public_key().public_bytes_raw().hex() == group["publicKey"]
        if "Internal" in test["flags"]:
            key.public_key().verify_mu(signature, digest)
            key.public_key().verify_mu(key.sign_mu(digest), digest)
        else:
            own = key.sign(message, context)
            key.public_key().verify(own, message, context)
            key.public_key().verify(signature, message, context)
        return True

    check("mldsa_65_sign", works)


@pytest.mark.parametrize("step", [1, 4099, 2**20])
def test_chunked_encryption(step):
    def works(_, test):
        sealed = zlib.decompress(bytes.fromhex(test["ct"]))
        decryptor = Cobblestone256Decryptor(*raw(test, "key", "ctx"))
        plain = b"".join(decryptor.update(sealed[at : at + step]) for at in range(0, len(sealed), step))
        plain += decryptor.finalize()
        return len(plain) == test["msgLength"] and hashlib.sha512(plain).hexdigest() == test["msgSha512"]

    check("chunked_encryption_256", works)


def test_chunked_encryption_opens_what_it_writes_and_nothing_shorter():
    key, context, plain = bytes(range(32)), b"context", bytes(40_000)
    encryptor = Cobblestone256Encryptor(key, context)
    sealed = encryptor.update(plain) + encryptor.finalize()

    def opened(part):
        decryptor = Cobblestone256Decryptor(key, context)
        return decryptor.update(part) + decryptor.finalize()

    assert opened(sealed) == plain
    for length in [0, 24, 55, 56, 16 * 1024 + 72, len(sealed) - 17, len(sealed) - 16, len(sealed) - 1]:
        with pytest.raises(InvalidTag):
            opened(sealed[:length])


class PlainHpke:
    """HPKE of RFC 9180, base mode, HKDF-SHA256, with MLKEM768-X25519 of draft-ietf-hpke-pq: an independent reading."""

    KEM, KDF = 0x647A, 1
    LABEL = bytes.fromhex("5c2e2f2f5e5c")

    def __init__(self, aead):
        self.aead = aead
        self.suite = b"HPKE" + b"".join(part.to_bytes(2, "big") for part in (self.KEM, self.KDF, aead))

    def shared(self, mlkem, x25519, enc):
        theirs = enc[1088:]
        first = mlkem.decapsulate(enc[:1088])
        second = x25519.exchange(X25519PublicKey.from_public_bytes(theirs))
        own = x25519.public_key().public_bytes_raw()
        return hashlib.sha3_256(first + second + theirs + own + self.LABEL).digest()

    def schedule(self, shared, info):
        psk, context = self.extract(b"", b"psk_id_hash", b""), self.extract(b"", b"info_hash", info)
        secret, bound = self.extract(shared, b"secret", b""), b"\0" + psk + context
        return self.expand(secret, b"key", bound, 32), self.expand(secret, b"base_nonce", bound, 12)

    def cipher(self, key):
        return {AES_256_GCM: AESGCM, CHACHA20_POLY1305: ChaCha20Poly1305}[self.aead](key)

    def extract(self, salt, label, secret):
        return hmac.digest(salt, b"HPKE-v1" + self.suite + label + secret, "sha256")

    def expand(self, secret, label, info, size):
        labelled = size.to_bytes(2, "big") + b"HPKE-v1" + self.suite + label + info
        return hmac.digest(secret, labelled + b"\1", "sha256")[:size]


def test_the_independent_hpke_reproduces_the_published_vector():
    vector, plain = load("hpke_mlkem768_x25519"), PlainHpke(CHACHA20_POLY1305)
    assert (vector["kem_id"], vector["kdf_id"], vector["aead_id"]) == (PlainHpke.KEM, PlainHpke.KDF, CHACHA20_POLY1305)
    info, seed, public, enc = raw(vector, "info", "skRm", "pkRm", "enc")
    seeds = hashlib.shake_256(seed).digest(96)
    mlkem, x25519 = MLKEM768PrivateKey.from_seed_bytes(seeds[:64]), X25519PrivateKey.from_private_bytes(seeds[64:])
    assert mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw() == public
    shared = plain.shared(mlkem, x25519, enc)
    assert shared.hex() == vector["shared_secret"]
    key, nonce = plain.schedule(shared, info)
    assert (key.hex(), nonce.hex()) == (vector["key"], vector["base_nonce"])
    for number, item in enumerate(vector["encryptions"]):
        turned = (int.from_bytes(nonce, "big") ^ number).to_bytes(12, "big")
        message, aad, body = raw(item, "pt", "aad", "ct")
        assert plain.cipher(key).decrypt(turned, body, aad) == message


def test_wrapped_keys_are_that_hpke_with_aes_256_gcm():
    identity, plain = generate("Clinic", days=1), PlainHpke(AES_256_GCM)
    wrapped = identity.public.wrap(b"a secret of 32 bytes or any else", b"info")
    shared = plain.shared(identity._mlkem768, identity._x25519, wrapped[:1120])
    key, nonce = plain.schedule(shared, b"info")
    assert plain.cipher(key).decrypt(nonce, wrapped[1120:], b"") == b"a secret of 32 bytes or any else"
    other = wrapped[:1120] + plain.cipher(key).encrypt(nonce, b"another", b"")
    assert identity.unwrap(other, b"info") == b"another"
