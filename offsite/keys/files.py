"""Files that hold secrets: made readable to their owner alone, refused when others can read them.

Private keys are PKCS8, encrypted by PBES2 with scrypt and AES-256-CBC, which ``openssl pkey`` also reads. The library
writes PKCS8 with 2048 rounds of PBKDF2, which a passphrase does not stand up to; so the envelope is written here.
Sources: RFC 5958 (PKCS8), RFC 8018 (PBES2), RFC 7914 section 7 (scrypt in PBES2).
"""

from __future__ import annotations

import base64
import os
import secrets
import stat
import sys
import textwrap
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from offsite.errors import BadKey, BadSchema, ConfigError, RunFailed, TooLarge
from offsite.strictjson import Strict, parse_strict

PASSPHRASE_VARIABLE = "OFFSITE_PASSPHRASE"  # noqa: S105 - the name, not the word
PASSPHRASE_LIMIT_BYTES = 1023  # what OpenSSL takes
PEM_LIMIT_BYTES = 16 * 2**10
# 16 MiB and about 0.1 s a guess; 2**15 is more than the openssl command agrees to read.
SCRYPT_COST, SCRYPT_BLOCKS, SCRYPT_PASSES = 2**14, 8, 2

PASSPHRASE_FLOOR = 8
"""Powers of ten of guesses that a new passphrase must withstand by `require_strong`'s estimate."""
_LOOKED_AT = 72  # characters: the estimate takes time that grows with their square
_PASSPHRASE_FILE = "passphrase file"  # noqa: S105 - what it is called
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_HOW = f"--passphrase-file FILE, the environment variable {PASSPHRASE_VARIABLE}, or a terminal to type it on"
_PBES2 = bytes.fromhex("06092a864886f70d01050d")
_SCRYPT = bytes.fromhex("06092b06010401da47040b")
_AES256_CBC = bytes.fromhex("060960864801650304012a")

Key = TypeVar("Key")
Form = TypeVar("Form", bound=Strict)


def read_passphrase(file: Path | None, *, confirm: bool = False) -> bytes:
    """Return the passphrase from `file`, else from the environment, else typed on the terminal.

    Args:
        file: one line of text, readable by its owner alone; a line end at its end does not count.
        confirm: ask twice on a terminal, because a new key is locked with it.

    Raises:
        ConfigError: when there is none, it is empty or too long, or what was typed twice differs.
        BadKey: when `file` cannot be read or others can read it.
    """
    if file is not None:
        found = read_private(file, PASSPHRASE_LIMIT_BYTES + 2, what=_PASSPHRASE_FILE)
        found = found.removesuffix(b"\n").removesuffix(b"\r")
        if b"\n" in found:
            raise ConfigError("the passphrase file holds more than one line")
    elif PASSPHRASE_VARIABLE in os.environ:
        found = os.fsencode(os.environ[PASSPHRASE_VARIABLE])
    elif sys.stdin is not None and sys.stdin.isatty():
        found = _ask(confirm)
    else:
        raise ConfigError("no passphrase given", hint=f"give one by {_HOW}")
    if not found:
        raise ConfigError("the passphrase is empty", hint=f"give one by {_HOW}")
    if len(found) > PASSPHRASE_LIMIT_BYTES:
        raise ConfigError(f"the passphrase is over {PASSPHRASE_LIMIT_BYTES} bytes")
    return found


def read_limited(path: Path, limit_bytes: int, *, what: str) -> bytes:
    """Return the bytes of the plain file at `path`.

    Raises:
        BadKey: when there is none or it cannot be read.
        TooLarge: when it is over `limit_bytes`.
    """
    return _read(path, limit_bytes, what, private=False)


def read_private(path: Path, limit_bytes: int, *, what: str) -> bytes:
    """Return the bytes of the plain file at `path`, which only its owner may read.

    Raises:
        BadKey: when there is none, it cannot be read, or its group or others have any right to it.
        TooLarge: when it is over `limit_bytes`.
    """
    return _read(path, limit_bytes, what, private=True)


def write_private(path: Path, content: bytes) -> None:
    """A new file at `path` holds `content`; from its first moment only its owner may read it.

    Raises:
        OSError: when something stands there or the disk is full; for `offsite.staging` to name.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def require_strong(passphrase: bytes) -> int:
    """Return how many guesses, as a power of ten, the passphrase is estimated to withstand, once that is enough.

    Whoever copies a key file can try passphrases at will; scrypt makes each try slow, and no more. Of a long
    passphrase the first characters are looked at, so the estimate is then too low rather than too high.

    Raises:
        ConfigError: when it is estimated to fall within ten to the power of `PASSPHRASE_FLOOR` guesses.

    Source: zxcvbn (Wheeler, USENIX Security 2016), https://github.com/dropbox/zxcvbn.
    """
    from zxcvbn import zxcvbn

    estimate = float(zxcvbn(passphrase.decode("utf-8", "surrogateescape")[:_LOOKED_AT])["guesses_log10"])
    if estimate < PASSPHRASE_FLOOR:
        raise ConfigError(
            f"the passphrase is too weak: about 10^{estimate:.0f} guesses find it, "
            f"expected at least 10^{PASSPHRASE_FLOOR}",
            hint="four or more words that have nothing to do with each other, or 12 random characters",
        )
    return int(estimate)


def check_folder(folder: Path) -> None:
    """Return only if `folder` is one that nobody but its owner may change or look into.

    Raises:
        ConfigError: when there is no such folder, with the place that was looked at.
        BadKey: when its group or others have any right to it.
    """
    if not folder.is_dir():
        raise ConfigError(f"no keys folder at {_for_people(folder)}", hint=_other_keys(folder))
    if stat.S_IMODE(folder.stat().st_mode) & _OTHERS:
        raise BadKey(
            f"keys folder {folder.name!r} is open to others",
            hint="chmod 700 it, and think about who may have read or changed what is in it",
        )


def _for_people(folder: Path) -> str:
    """Return the place as it was typed, or from the home folder on; of one elsewhere the name alone."""
    home = Path.home()
    if folder.is_relative_to(home):
        return repr(f"~/{folder.relative_to(home)}")  # the usual one was not typed at all
    return repr(folder.name if folder.is_absolute() else str(folder))


def _other_keys(missing: Path) -> str:
    """Return what to do about a missing keys folder; who has keys nearby is not sent to make others."""
    near = [Path(name) for name in ("keys", "../keys") if Path(name, "card.json").is_file() and Path(name) != missing]
    if near:
        return f"there are keys in {str(near[0])!r}: add --keys {near[0]}"
    return "name the folder of your keys with --keys; who has none yet makes them with 'offsite keygen'"


def encrypt_pkcs8(plain: bytes, passphrase: bytes) -> bytes:
    """Return the PEM of an unencrypted DER PKCS8 key, locked by the passphrase with a fresh salt."""
    salt, start = secrets.token_bytes(16), secrets.token_bytes(16)
    secret = Scrypt(salt=salt, length=32, n=SCRYPT_COST, r=SCRYPT_BLOCKS, p=SCRYPT_PASSES).derive(passphrase)
    padder, encryptor = PKCS7(128).padder(), Cipher(AES256(secret), CBC(start)).encryptor()
    body = encryptor.update(padder.update(plain) + padder.finalize()) + encryptor.finalize()
    costs = (_number(SCRYPT_COST), _number(SCRYPT_BLOCKS), _number(SCRYPT_PASSES))
    stretch = _sequence(_SCRYPT, _sequence(_octets(salt), *costs))
    scheme = _sequence(_PBES2, _sequence(stretch, _sequence(_AES256_CBC, _octets(start))))
    text = base64.b64encode(_sequence(scheme, _octets(body))).decode()
    label = "ENCRYPTED PRIVATE KEY"
    return "\n".join((f"-----BEGIN {label}-----", *textwrap.wrap(text, 64), f"-----END {label}-----", "")).encode()


def decrypt_pkcs8(pem: bytes, passphrase: bytes, kind: type[Key], *, name: str) -> Key:
    """Return the private key in `pem`, which must be encrypted and of that kind.

    Raises:
        BadKey: naming the file; a wrong passphrase and a damaged file cannot be told apart.
    """
    try:
        key = load_pem_private_key(pem, passphrase)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        if b"BEGIN PRIVATE KEY" in pem:
            raise BadKey(f"key file {name!r} is not encrypted", hint="make new keys with 'offsite keygen'") from None
        raise BadKey(
            f"key file {name!r} does not open: wrong passphrase, or the file is damaged",
            hint=f"the passphrase of offsite keygen; it is read from --passphrase-file, else {PASSPHRASE_VARIABLE}, "
            "else it is asked for",
        ) from None
    if not isinstance(key, kind):
        raise BadKey(f"key file {name!r} holds a key of another kind")
    return key


def parse_keys(raw: bytes, cls: type[Form], *, what: str, format_name: str | None, hint: str | None = None) -> Form:
    """Return the JSON object `raw`, a card or the like, as `cls`.

    Args:
        format_name: what its field ``format`` must hold; None when it has no such field.

    Raises:
        WrongBinding: when it is of another format.
        BadKey: when it does not have the form of `cls`; names the field, never its value.
    """
    try:
        return parse_strict(raw, cls, what, {} if format_name is None else {"format": format_name})
    except BadSchema as error:
        raise BadKey(str(error), hint=hint) from None


def _read(path: Path, limit_bytes: int, what: str, *, private: bool) -> bytes:
    # Whoever takes --passphrase-file for --passphrase has typed the secret where a name belongs: do not repeat it.
    named = f"the {what}" if what == _PASSPHRASE_FILE else f"{what} {path.name!r}"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # non-blocking: a FIFO must not hang us
    except (OSError, ValueError) as error:
        raise BadKey(f"cannot read {named}: {_reason(error)}", hint="check the path") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise BadKey(f"{named} is not a plain file")
        if private and stat.S_IMODE(found.st_mode) & _OTHERS:
            raise BadKey(f"{named} is open to others", hint="chmod 600 it, and think about who may have read it")
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(limit_bytes + 1)
    except OSError as error:
        raise RunFailed(f"cannot read {named}: {_reason(error)}") from None
    finally:
        os.close(handle)
    if len(content) > limit_bytes:
        raise TooLarge(f"{named} is over {limit_bytes} bytes")
    return content


def _reason(error: OSError | ValueError) -> str:
    return (getattr(error, "strerror", None) or "refused").lower()


def _ask(confirm: bool) -> bytes:
    import getpass

    try:
        found = getpass.getpass("passphrase: ")
        if confirm and found != getpass.getpass("the same again: "):
            raise ConfigError("the two passphrases differ")
    except EOFError:
        raise ConfigError("no passphrase given", hint=f"give one by {_HOW}") from None
    return found.encode("utf-8", "surrogateescape")


def _der(tag: int, body: bytes) -> bytes:
    size = len(body)
    if size < 0x80:
        return bytes((tag, size)) + body
    width = (size.bit_length() + 7) // 8
    return bytes((tag, 0x80 | width)) + size.to_bytes(width, "big") + body


def _sequence(*parts: bytes) -> bytes:
    return _der(0x30, b"".join(parts))


def _octets(body: bytes) -> bytes:
    return _der(0x04, body)


def _number(value: int) -> bytes:
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))
