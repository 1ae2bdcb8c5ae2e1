"""``docs/format.md`` is enough to read what is sealed: the frozen vectors, opened by a decoder made from it alone.

The decoder uses hashes, AES-GCM, the two signature schemes, ML-KEM and X25519, and nothing of offsite. Then offsite
opens the same vectors, and what the decoder would refuse is refused.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import shutil
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ROOT = Path(__file__).resolve().parents[3]
VECTORS = ROOT / "tests" / "vectors" / "sealed"
EXPECTED = json.loads((VECTORS / "expected.json").read_bytes())
KEYS = json.loads((VECTORS / "test-keys.json").read_bytes())
NAMES = sorted(EXPECTED["sealed"])


# The decoder. Numbers of sections refer to docs/format.md.


def expand(name: str, key: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand of RFC 5869."""
    found, block, counter = b"", b"", 1
    while len(found) < length:
        block = hmac.new(key, block + info + bytes([counter]), name).digest()
        found, counter = found + block, counter + 1
    return found[:length]


def card_keys(raw: bytes) -> dict[str, bytes]:
    """Section 1: the public keys of a card that its own keys signed."""
    card = json.loads(raw)
    assert card["format"] == "offsite/card/1"
    body = base64.b64decode(card["body"], validate=True)
    stated = json.loads(body)
    keys = {name: base64.b64decode(stated[name]) for name in ("ed25519", "mldsa65", "mlkem768", "x25519")}
    check_signatures(keys, "card", body, card["signatures"])
    return keys


def fingerprint(keys: dict[str, bytes]) -> str:
    """Section 1."""
    joined = b"offsite/v1/fingerprint\0" + keys["ed25519"] + keys["mldsa65"] + keys["mlkem768"] + keys["x25519"]
    text = base64.b32encode(hashlib.sha256(joined).digest()).decode().lower().rstrip("=")
    return "-".join(re.findall("....", text))


def check_signatures(keys: dict[str, bytes], purpose: str, message: bytes, signatures: dict[str, str]) -> None:
    """Section 1: both verify."""
    label = b"offsite/v1/" + purpose.encode()
    framed = b"DSSEv1 %d %b %d %b" % (len(label), label, len(message), message)
    Ed25519PublicKey.from_public_bytes(keys["ed25519"]).verify(base64.b64decode(signatures["ed25519"]), framed)
    MLDSA65PublicKey.from_public_bytes(keys["mldsa65"]).verify(base64.b64decode(signatures["mldsa65"]), framed)


def unwrap(private: dict[str, str], public: dict[str, bytes], wrapped: bytes, info: bytes) -> bytes:
    """Section 6: HPKE with X-Wing, HKDF-SHA256 and AES-256-GCM."""
    ct_m, ct_x, sealed = wrapped[:1088], wrapped[1088:1120], wrapped[1120:]
    ss_m = MLKEM768PrivateKey.from_seed_bytes(bytes.fromhex(private["mlkem768"])).decapsulate(ct_m)
    curve = X25519PrivateKey.from_private_bytes(bytes.fromhex(private["x25519"]))
    ss_x = curve.exchange(X25519PublicKey.from_public_bytes(ct_x))
    shared = hashlib.sha3_256(ss_m + ss_x + ct_x + public["x25519"] + bytes.fromhex("5c2e2f2f5e5c")).digest()
    suite = b"HPKE" + bytes.fromhex("647a00010002")

    def extract(salt: bytes, label: bytes, value: bytes) -> bytes:
        return hmac.new(salt, b"HPKE-v1" + suite + label + value, "sha256").digest()

    def expanded(label: bytes, length: int) -> bytes:
        context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
        labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + context
        return expand("sha256", extract(shared, b"secret", b""), labelled, length)

    return AESGCM(expanded(b"key", 32)).decrypt(expanded(b"base_nonce", 12), sealed, None)


def decrypt(data_key: bytes, context: bytes, content: bytes) -> bytes:
    """Section 5."""
    salt, commitment, chunks = content[:24], content[24:56], content[56:]
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context
    derived = expand("sha512", data_key, info, 76)
    key, nonce = derived[:32], int.from_bytes(derived[32:44], "big")
    assert derived[44:] == commitment
    plain, number = b"", 0
    while True:
        piece = chunks[number * 16400 : (number + 1) * 16400]
        opened = AESGCM(key).decrypt((nonce ^ number).to_bytes(12, "big"), piece, None)
        plain, number = plain + opened, number + 1
        if len(opened) < 16384:
            assert len(chunks) == (number - 1) * 16400 + len(piece)
            return plain


def decode(folder: Path, who: str, cards: dict[str, bytes]) -> dict[str, bytes]:
    """Sections 2 to 8: the plain files by name."""
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "signatures.json", "keys.json", "payload"}
    raw = (folder / "manifest.json").read_bytes()
    digest = hashlib.sha256(raw).digest()
    signatures = json.loads((folder / "signatures.json").read_bytes())
    assert signatures["format"] == "offsite/signatures/1"
    check_signatures(card_keys(cards[signatures["issuer"]]), "sealed", raw, signatures)
    manifest = json.loads(raw)
    assert manifest["format"] == "offsite/sealed/1"
    assert manifest["suite"] == "ed25519+mldsa65/mlkem768x25519-hkdfsha256-aes256gcm/cobblestone256"
    assert manifest["issuer"] == signatures["issuer"]
    assert manifest["created"] - 300 <= EXPECTED["now"] <= manifest["expires"] + 300
    own_public = card_keys(KEYS[who]["card"].encode())
    own = fingerprint(own_public)
    wraps = json.loads((folder / "keys.json").read_bytes())
    assert wraps["format"] == "offsite/keys/1"
    (wrap,) = [wrap for wrap in wraps["wraps"] if wrap["recipient"] == own]
    if own not in manifest["recipients"]:
        rotation = wrap["rotation"]
        old = card_keys(base64.b64decode(rotation["card"]))
        assert fingerprint(old) == rotation["named"] in manifest["recipients"]
        statement = f"sha256:{digest.hex()}\0{rotation['named']}\0{own}".encode()
        check_signatures(old, "rotation", statement, rotation["by_named"])
        check_signatures(own_public, "rotation", statement, rotation["by_recipient"])
    info = b"offsite/v1/data-keys\0" + digest + own.encode()
    keys = unwrap(KEYS[who]["private"], own_public, base64.b64decode(wrap["wrapped"]), info)
    assert len(keys) == 32 * len(manifest["files"])
    found = {}
    for index, file in enumerate(manifest["files"]):
        content = (folder / "payload" / f"{file['sealed_sha256'].removeprefix('sha256:')}.enc").read_bytes()
        words = [b"offsite/v1/payload", manifest["job_id"], manifest["kind"], file["name"]]
        context = b"\0".join(word if isinstance(word, bytes) else word.encode() for word in words)
        context += b"\0" + index.to_bytes(4, "big")
        plain = decrypt(keys[32 * index : 32 * index + 32], context, content)
        for what, (size, stated) in {
            content: (file["sealed_bytes"], file["sealed_sha256"]),
            plain: (file["bytes"], file["sha256"]),
        }.items():
            assert (len(what), "sha256:" + hashlib.sha256(what).hexdigest()) == (size, stated)
        assert file["sealed_bytes"] == file["bytes"] + 56 + 16 * (file["bytes"] // 16384 + 1)
        assert file["tensors_sha256"] == (tensors_digest(plain) if file["name"].endswith(".safetensors") else None)
        found[file["name"]] = plain
    assert list(found) == sorted(found)
    assert len(list((folder / "payload").iterdir())) == len(found)
    return found


def tensors_digest(content: bytes) -> str:
    """Section 3."""
    dtypes = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64"}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    whole = hashlib.sha256(b"offsite/v1/tensor-schema\0")
    for name in sorted(name for name in header if name != "__metadata__"):
        shape = ",".join(map(str, header[name]["shape"]))
        whole.update(f"{name}\0{dtypes[header[name]['dtype']]}\0{shape}\n".encode())
    return "sha256:" + whole.hexdigest()


CARDS = {KEYS[who]["fingerprint"]: KEYS[who]["card"].encode() for who in KEYS}


@pytest.mark.parametrize("who", sorted(KEYS))
def test_cards_have_their_fingerprints(who):
    assert fingerprint(card_keys(KEYS[who]["card"].encode())) == KEYS[who]["fingerprint"]


@pytest.mark.parametrize("name", NAMES)
def test_the_document_is_enough_to_read_the_vectors(name):
    found = decode(VECTORS / name, EXPECTED["for"][name], CARDS)
    assert {file: hashlib.sha256(plain).hexdigest() for file, plain in found.items()} == EXPECTED["plain"][name]
    raw = (VECTORS / name / "manifest.json").read_bytes()
    assert EXPECTED["sealed"][name] == "sha256:" + hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize(
    ("path", "error"),
    [("manifest.json", InvalidSignature), ("keys.json", InvalidTag), ("payload", (InvalidTag, AssertionError))],
)
def test_the_decoder_notices_a_change(tmp_path, path, error):
    shutil.copytree(VECTORS / "report-second", tmp_path / "copy")
    target = tmp_path / "copy" / path
    if path == "payload":
        (target,) = target.iterdir()
    content = bytearray(target.read_bytes())
    position = content.index(b"wrapped") + 400 if path == "keys.json" else 70
    content[position] = ord("A") if content[position] != ord("A") else ord("B")
    target.write_bytes(content)
    with pytest.raises(error):
        decode(tmp_path / "copy", "client", CARDS)


def identity_of(who):
    from offsite.keys.identity import Identity, read_card

    private = {name: bytes.fromhex(raw) for name, raw in KEYS[who]["private"].items()}
    return Identity(
        read_card(KEYS[who]["card"].encode()),
        ed25519=Ed25519PrivateKey.from_private_bytes(private["ed25519"]),
        mldsa65=MLDSA65PrivateKey.from_seed_bytes(private["mldsa65"]),
        mlkem768=MLKEM768PrivateKey.from_seed_bytes(private["mlkem768"]),
        x25519=X25519PrivateKey.from_private_bytes(private["x25519"]),
    )


@pytest.mark.parametrize("name", NAMES)
def test_offsite_still_opens_the_vectors(tmp_path, name):
    from offsite.sealed.encryption import decrypt_files
    from offsite.sealed.folder import read_sealed
    from offsite.sealed.manifest import verify_sealed

    raw = read_sealed(VECTORS / name)
    lookup = {KEYS[who]["fingerprint"]: identity_of(who).public for who in KEYS}
    manifest = verify_sealed(raw.manifest_raw, raw.signatures_raw, lookup.__getitem__, now=EXPECTED["now"])
    decrypt_files(VECTORS / name, raw, manifest, identity_of(EXPECTED["for"][name]), tmp_path)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert found == EXPECTED["plain"][name]


def test_the_vectors_open_in_order_as_their_kinds(tmp_path):
    """Through the whole of opening, with trust and ledger: job, package, reports; and the bundle at the owner's."""
    from offsite.exchange.verbs import open_sealed
    from offsite.keys.identity import save_identity
    from offsite.keys.trust import TrustStore
    from offsite.sealed.ledger import Ledger

    for who, peer, names in (
        ("client", "owner", ["job", "package", "report", "report-second"]),
        ("owner", "client", ["bundle"]),
        ("client-new", "owner", ["report-rewrapped"]),
    ):
        save_identity(tmp_path / who, identity_of(who), b"test")
        trust = TrustStore(tmp_path / who)
        trust.add(KEYS[peer]["card"].encode(), KEYS[peer]["fingerprint"], now=EXPECTED["now"])
        with Ledger(tmp_path / who) as ledger:
            if who != "client":
                from offsite.artefacts.job import read_job

                ledger.remember(read_job(tmp_path / "client-job"))
            for name in names:
                out = tmp_path / f"{who}-{name}"
                opened = open_sealed(
                    VECTORS / name, out, identity=identity_of(who), trust=trust, ledger=ledger, now=EXPECTED["now"]
                )
                assert opened.admission == "new"
                assert opened.sealed_digest == EXPECTED["sealed"][name]


def test_the_document_states_what_the_code_has():
    from offsite.sealed import manifest as sealed
    from offsite.sealed.recipients import KEYS_FORMAT

    text = (ROOT / "docs" / "format.md").read_text()
    for word in (sealed.SEALED_FORMAT, sealed.SUITE, sealed.SIGNATURES_FORMAT, KEYS_FORMAT, "offsite/job/1"):
        assert f'"{word}"' in text
    for number in (sealed.MAX_SKEW_SECONDS, sealed.MAX_FILES, sealed.CHUNK_BYTES):
        assert str(number) in text
    for name in (*sealed.SealedManifest.model_fields, *sealed.SealedFile.model_fields):
        assert f"`{name}`" in text
