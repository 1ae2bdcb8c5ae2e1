"""A party's keys: what it signs with, what it receives with, and the card it shows to others.

A party signs with Ed25519 and ML-DSA-65, and a signature counts only when both verify. It receives with the HPKE
hybrid of ML-KEM-768 and X25519. Its *card* holds the four public keys, a name and dates, signed by both signing keys
over the exact bytes; the *fingerprint*, a hash of the four keys, is what people compare and what manifests name.
Private keys lie one to a file, encrypted under the passphrase (`offsite.keys.files`).

Sources: RFC 8032 (Ed25519), FIPS 204 (ML-DSA), FIPS 203 (ML-KEM), RFC 9180 (HPKE), the DSSE pre-authentication
encoding (https://github.com/secure-systems-lab/dsse).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pydantic import Field

from offsite.console import say
from offsite.errors import BadKey, BadSignature, TooLarge, WrongRecipient
from offsite.keys.config import NAME_PATTERN
from offsite.keys.files import (
    PEM_LIMIT_BYTES,
    check_folder,
    decrypt_pkcs8,
    encrypt_pkcs8,
    parse_keys,
    read_passphrase,
    read_private,
    require_strong,
    write_private,
)
from offsite.staging import refuse_existing, staged_folder
from offsite.strictjson import Strict

if TYPE_CHECKING:
    from offsite.keys.config import IdentityConfig, KeygenConfig

__all__ = [
    "CARD_LIMIT_BYTES",
    "CARD_NAME",
    "FINGERPRINT_PATTERN",
    "Identity",
    "PublicKeys",
    "Signatures",
    "generate",
    "is_sound",
    "load_identity",
    "make_identity",
    "open_identity",
    "read_card",
    "run",
    "save_identity",
]

CARD_NAME = "card.json"
CARD_FORMAT = "offsite/card/1"
CARD_LIMIT_BYTES = 16 * 2**10
FINGERPRINT_PATTERN = r"^[a-z2-7]{4}(-[a-z2-7]{4}){12}$"

_FILES: dict[str, tuple[str, type[Any]]] = {
    "ed25519": ("signing-ed25519.pem", Ed25519PrivateKey),
    "mldsa65": ("signing-mldsa65.pem", MLDSA65PrivateKey),
    "mlkem768": ("receiving-mlkem768.pem", MLKEM768PrivateKey),
    "x25519": ("receiving-x25519.pem", X25519PrivateKey),
}
_SIZES = {"ed25519": 32, "mldsa65": 1952, "mlkem768": 1184, "x25519": 32}
_SIGNATURE_SIZES = {"ed25519": 64, "mldsa65": 3309}
_HPKE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_PURPOSE = re.compile(r"[a-z][a-z0-9-]{0,31}")

_FIELD = 2**255 - 19
# The y of the points whose order divides 8: 0 and -1 and 1, and +-y of the four points of order 8. A signature under
# such a key fits every message, and OpenSSL accepts it.
_ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER = frozenset({0, 1, _FIELD - 1, _ORDER_8, _FIELD - _ORDER_8})


@dataclass(frozen=True)
class Signatures:
    """One signature by each signing key over the same bytes; neither counts without the other."""

    ed25519: bytes = field(repr=False)
    mldsa65: bytes = field(repr=False)

    def to_json(self) -> dict[str, str]:
        """Return both in base64, ready for a JSON object."""
        return {"ed25519": _encoded(self.ed25519), "mldsa65": _encoded(self.mldsa65)}

    @classmethod
    def from_json(cls, found: object) -> Signatures:
        """Return the two signatures of a parsed JSON object that holds exactly these, in canonical base64.

        Raises:
            BadSignature: when one is missing, something else is there, or a length is not the algorithm's.
        """
        if not isinstance(found, Mapping) or set(found) != set(_SIGNATURE_SIZES):
            raise BadSignature("signatures: expected exactly ed25519 and mldsa65")
        parts = {name: _decoded(found[name], size) for name, size in _SIGNATURE_SIZES.items()}
        for name, part in parts.items():
            if part is None:
                raise BadSignature(f"signatures: {name} is not {_SIGNATURE_SIZES[name]} bytes in base64")
        return cls(**{name: part for name, part in parts.items() if part is not None})


@dataclass(frozen=True, repr=False)
class PublicKeys:
    """A party's public keys as its card states them, in raw encodings; dates in Unix seconds.

    Made by `read_card` and `generate` only, so that the keys are known to be well-formed and their holder to have
    signed for them.
    """

    name: str
    ed25519: bytes
    mldsa65: bytes
    mlkem768: bytes
    x25519: bytes
    created: int
    expires: int
    card: bytes = field(compare=False)

    def __repr__(self) -> str:
        return f"PublicKeys({self.name!r}, {self.fingerprint})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the four keys in 13 groups of four base32 letters; the same keys, the same fingerprint."""
        keys = self.ed25519 + self.mldsa65 + self.mlkem768 + self.x25519
        text = base64.b32encode(hashlib.sha256(b"offsite/v1/fingerprint\0" + keys).digest()).decode().lower()
        return "-".join(text[start : start + 4] for start in range(0, 52, 4))

    def verify(self, purpose: str, message: bytes, signatures: Signatures) -> None:
        """Return only if both keys signed `message` for `purpose`.

        Raises:
            BadSignature: naming the algorithm that did not verify.
        """
        framed = _framed(purpose, message)
        name = "ed25519"
        try:
            Ed25519PublicKey.from_public_bytes(self.ed25519).verify(signatures.ed25519, framed)
            name = "mldsa65"
            MLDSA65PublicKey.from_public_bytes(self.mldsa65).verify(signatures.mldsa65, framed)
        except InvalidSignature:
            raise BadSignature(f"the {name} signature over the {purpose} does not verify") from None

    def wrap(self, secret: bytes, info: bytes) -> bytes:
        """Return `secret` encrypted so that only these keys' holder, given the same `info`, can unwrap it.

        Source: RFC 9180, base mode, one message; KEM ML-KEM-768 with X25519, HKDF-SHA256, AES-256-GCM.
        """
        kem, curve = MLKEM768PublicKey.from_public_bytes(self.mlkem768), X25519PublicKey.from_public_bytes(self.x25519)
        return _HPKE.encrypt(secret, MLKEM768X25519PublicKey(kem, curve), info=info)


class Identity:
    """This party's private keys, and its public ones. Nothing here prints or serialises a private key."""

    __slots__ = ("_ed25519", "_mldsa65", "_mlkem768", "_x25519", "public")

    def __init__(
        self,
        public: PublicKeys,
        *,
        ed25519: Ed25519PrivateKey,
        mldsa65: MLDSA65PrivateKey,
        mlkem768: MLKEM768PrivateKey,
        x25519: X25519PrivateKey,
    ) -> None:
        self.public = public
        self._ed25519 = ed25519
        self._mldsa65 = mldsa65
        self._mlkem768 = mlkem768
        self._x25519 = x25519

    def __repr__(self) -> str:
        return f"Identity({self.public.fingerprint})"

    def __reduce__(self) -> Any:
        raise TypeError("an identity is not copied or serialised; save_identity writes it encrypted")

    def sign(self, purpose: str, message: bytes) -> Signatures:
        """Return both signatures over `message`, framed by the label ``offsite/v1/<purpose>``."""
        framed = _framed(purpose, message)
        return Signatures(self._ed25519.sign(framed), self._mldsa65.sign(framed))

    def unwrap(self, wrapped: bytes, info: bytes) -> bytes:
        """Return the secret that was wrapped for this party under the same `info`.

        Raises:
            WrongRecipient: when it was wrapped for other keys or with other `info`, or was changed since.
        """
        try:
            return _HPKE.decrypt(wrapped, MLKEM768X25519PrivateKey(self._mlkem768, self._x25519), info=info)
        except (InvalidTag, ValueError):
            raise WrongRecipient("a wrapped key does not open with these keys: it is another's, or changed") from None


class _Body(Strict):
    """What the signatures of a card cover."""

    name: str = Field(pattern=NAME_PATTERN)
    ed25519: str
    mldsa65: str
    mlkem768: str
    x25519: str
    created: int = Field(ge=0, lt=2**40)
    expires: int = Field(ge=0, lt=2**40)


class _Card(Strict):
    format: str
    body: str
    signatures: dict[str, str]


def generate(name: str, *, days: int, now: int | None = None) -> Identity:
    """Return a new identity whose card is valid for `days` from `now` (Unix seconds; the clock's when None).

    Raises:
        BadKey: when the name is not one a card may bear.
    """
    private: dict[str, Any] = {key: kind.generate() for key, (_, kind) in _FILES.items()}
    created = int(time.time()) if now is None else now
    body = {key: _encoded(raw) for key, raw in _public_raw(private).items()}
    stated = {"name": name, **body, "created": created, "expires": created + days * 86400}
    raw_body = json.dumps(stated, sort_keys=True).encode()
    framed = _framed("card", raw_body)
    signatures = Signatures(private["ed25519"].sign(framed), private["mldsa65"].sign(framed))
    card = {"format": CARD_FORMAT, "body": _encoded(raw_body), "signatures": signatures.to_json()}
    return Identity(read_card(json.dumps(card, indent=1).encode() + b"\n"), **private)


def read_card(raw: bytes) -> PublicKeys:
    """Return the keys of a card, each well-formed and not weak, all signed for by both signing keys.

    The signatures prove that whoever made the card holds the signing keys. They do not prove that it is whom it
    names: that is what comparing the fingerprint over another channel is for. Dates are not checked here.

    Raises:
        TooLarge: when the card is over `CARD_LIMIT_BYTES`.
        WrongBinding: when it is a card of another format.
        BadKey: when it does not have the form of a card, or a key is malformed or of small order.
        BadSignature: when it was not signed by both its keys.
    """
    if len(raw) > CARD_LIMIT_BYTES:
        raise TooLarge(f"card of {len(raw)} bytes, limit {CARD_LIMIT_BYTES}")
    card = parse_keys(raw, _Card, what="card", format_name=CARD_FORMAT)
    signatures = Signatures.from_json(card.signatures)
    raw_body = _decoded(card.body)
    if raw_body is None:
        raise BadKey("card: body is not base64")
    body = parse_keys(raw_body, _Body, what="card body", format_name=None)
    keys = {name: _decoded(getattr(body, name)) for name in _SIZES}
    for name, key in keys.items():
        if key is None or not is_sound(name, key):
            raise BadKey(f"card: {name} is not a sound public key", hint="ask its holder to make new keys")
    if body.expires <= body.created:
        raise BadKey("card: expires before it was created")
    sound = {name: key for name, key in keys.items() if key is not None}
    public = PublicKeys(name=body.name, created=body.created, expires=body.expires, card=raw, **sound)
    public.verify("card", raw_body, signatures)
    return public


def is_sound(name: str, raw: bytes) -> bool:
    """Tell whether `raw` encodes a public key of that algorithm which is canonical and not weak.

    Args:
        name: ``ed25519``, ``mldsa65``, ``mlkem768`` or ``x25519``.
    """
    if len(raw) != _SIZES[name]:
        return False
    number = int.from_bytes(raw, "little")
    if name == "ed25519":
        number &= 2**255 - 1
        return number < _FIELD and number not in _SMALL_ORDER
    if name == "mldsa65":  # after the seed only zeros: anybody can sign for it
        return any(raw[32:])
    try:
        if name == "x25519":  # a point of small order makes every shared secret zero, which the library refuses
            X25519PrivateKey.from_private_bytes(bytes(32)).exchange(X25519PublicKey.from_public_bytes(raw))
            return number < _FIELD
        MLKEM768PublicKey.from_public_bytes(raw)
    except ValueError:
        return False
    return True


def save_identity(folder: Path, identity: Identity, passphrase: bytes) -> None:
    """A new folder holds the card and the private keys, locked by the passphrase; whole or not at all.

    Raises:
        ConfigError: when something stands at `folder`.
        RunFailed: when it cannot be written.
    """
    with staged_folder(folder) as stage:
        stage.chmod(0o700)
        for key, (name, _) in _FILES.items():
            private = getattr(identity, f"_{key}")
            plain = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
            write_private(stage / name, encrypt_pkcs8(plain, passphrase))
        write_private(stage / CARD_NAME, identity.public.card)


def load_identity(folder: Path, passphrase: bytes) -> Identity:
    """Return the identity in `folder`, its private keys known to belong to its card.

    Raises:
        ConfigError: when there is no such folder.
        BadKey: when the folder or a file is open to others, the passphrase is wrong, a file is damaged, or a key is
            not the one the card states.
    """
    check_folder(folder)
    public = read_card(read_private(folder / CARD_NAME, CARD_LIMIT_BYTES, what="card"))
    private: dict[str, Any] = {}
    for key, (name, kind) in _FILES.items():
        pem = read_private(folder / name, PEM_LIMIT_BYTES, what="key file")
        private[key] = decrypt_pkcs8(pem, passphrase, kind, name=name)
    for key, raw in _public_raw(private).items():
        if raw != getattr(public, key):
            raise BadKey(f"key file {_FILES[key][0]!r} does not belong to the card beside it")
    return Identity(public, **private)


def open_identity(config: IdentityConfig) -> Identity:
    """Return the identity that a verb's settings name; the passphrase may be asked for.

    Raises:
        ConfigError, BadKey: as `read_passphrase` and `load_identity`.
    """
    check_folder(config.keys)
    return load_identity(config.keys, read_passphrase(config.passphrase_file))


def make_identity(config: KeygenConfig) -> Identity:
    """Return new keys, saved in a folder of their own under a passphrase that may be asked for; what it is is said.

    Raises:
        ConfigError: when something stands at the output, or the passphrase is weak or missing.
        RunFailed: when it cannot be written.
    """
    refuse_existing(config.output)
    passphrase = read_passphrase(config.passphrase_file, confirm=True)
    strength = require_strong(passphrase)
    identity = generate(config.name, days=config.days)
    save_identity(config.output, identity, passphrase)
    say(f"passphrase: about 10^{strength} guesses by estimate")
    say(f"fingerprint of {identity.public.name}: {identity.public.fingerprint}")
    return identity


def run(config: KeygenConfig) -> dict[str, object]:
    """Carry out ``offsite keygen``."""
    public, card = make_identity(config).public, config.output / CARD_NAME
    say(f"send {card} to the other party, and the fingerprint over another channel")
    return {
        "card": str(card),
        "expires": public.expires,
        "fingerprint": public.fingerprint,
        "keys": str(config.output),
        "name": public.name,
    }


def _framed(purpose: str, message: bytes) -> bytes:
    """Return what is signed: DSSE's encoding of the label and the message, which no other pair shares."""
    if not _PURPOSE.fullmatch(purpose):
        raise ValueError("a purpose is a short word")
    label = f"offsite/v1/{purpose}".encode()
    return b"DSSEv1 %d %b %d %b" % (len(label), label, len(message), message)


def _public_raw(private: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: key.public_key().public_bytes_raw() for name, key in private.items()}


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _decoded(text: object, size: int | None = None) -> bytes | None:
    """Return the bytes of canonical base64 `text`, or None when it is not that or not of `size` bytes."""
    try:
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except ValueError:
        return None
    return raw if raw is not None and _encoded(raw) == text and size in (None, len(raw)) else None
