from __future__ import annotations

import base64
import getpass
import io
import os
import shutil
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from offsite.errors import BadKey, ConfigError, TooLarge, WrongBinding
from offsite.keys import files as keyfiles
from offsite.keys.files import (
    check_folder,
    decrypt_pkcs8,
    encrypt_pkcs8,
    parse_keys,
    read_limited,
    read_passphrase,
    read_private,
    write_private,
)
from offsite.strictjson import Strict

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PLAIN = KEY.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _no_passphrase(monkeypatch):
    monkeypatch.delenv("OFFSITE_PASSPHRASE", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.fixture
def secret_file(tmp_path):
    def make(content, mode=0o600):
        path = tmp_path / "secret"
        path.write_bytes(content)
        path.chmod(mode)
        return path

    return make


@pytest.mark.parametrize("content", [b"open sesame", b"open sesame\n", b"open sesame\r\n"])
def test_a_passphrase_file_holds_one_line(secret_file, content):
    assert read_passphrase(secret_file(content)) == b"open sesame"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", ConfigError, "the passphrase is empty"),
        (b"\n", ConfigError, "the passphrase is empty"),
        (b"two\nlines\n", ConfigError, "the passphrase file holds more than one line"),
        (b"a" * 1024, ConfigError, "the passphrase is over 1023 bytes"),
        (b"a" * 2000, TooLarge, "the passphrase file is over 1025 bytes"),
    ],
)
def test_a_passphrase_file_that_holds_none_is_refused(secret_file, content, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        read_passphrase(secret_file(content))


def test_an_empty_passphrase_is_refused_and_the_hint_tells_how_to_give_one(monkeypatch):
    monkeypatch.setenv("OFFSITE_PASSPHRASE", "")
    for message in ("the passphrase is empty", "no passphrase given"):
        with pytest.raises(ConfigError, match=message) as caught:
            read_passphrase(None)
        assert "--passphrase-file FILE, the environment variable OFFSITE_PASSPHRASE, or a term" in caught.value.hint
        monkeypatch.delenv("OFFSITE_PASSPHRASE", raising=False)


def test_the_file_comes_before_the_environment_and_that_before_the_terminal(monkeypatch, secret_file):
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr(getpass, "getpass", lambda prompt: "typed \u00e9")
    assert read_passphrase(None) == "typed \u00e9".encode()
    monkeypatch.setenv("OFFSITE_PASSPHRASE", "from outside")
    assert read_passphrase(None) == b"from outside"
    assert read_passphrase(secret_file(b"from a file")) == b"from a file"


def test_a_new_passphrase_is_typed_twice(monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal())
    typed = iter(["first", "second", "same", "same"])
    monkeypatch.setattr(getpass, "getpass", lambda prompt: next(typed))
    with pytest.raises(ConfigError, match=r"^the two passphrases differ$"):
        read_passphrase(None, confirm=True)
    assert read_passphrase(None, confirm=True) == b"same"


def test_a_terminal_that_was_closed_gives_no_passphrase(monkeypatch):
    def closed(prompt):
        raise EOFError

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr(getpass, "getpass", closed)
    with pytest.raises(ConfigError, match="no passphrase given"):
        read_passphrase(None)


def test_a_private_file_is_never_open_to_others(tmp_path, monkeypatch):
    opened, path = [], tmp_path / "new"
    real = os.open

    def spy(file, flags, mode=0o777, **rest):
        handle = real(file, flags, mode, **rest)
        opened.append(os.fstat(handle).st_mode & 0o777)
        return handle

    monkeypatch.setattr(os, "open", spy)
    old = os.umask(0)
    try:
        write_private(path, b"content")
    finally:
        os.umask(old)
    assert opened == [0o600]
    assert read_private(path, 7, what="key file") == b"content"
    with pytest.raises(FileExistsError):
        write_private(path, b"other")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o666])
def test_a_file_open_to_others_is_refused_only_where_it_holds_secrets(secret_file, mode):
    path = secret_file(b"content", mode)
    with pytest.raises(BadKey, match=r"^key file 'secret' is open to others$"):
        read_private(path, 100, what="key file")
    assert read_limited(path, 100, what="card") == b"content"


def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(0o700)
    for name in ("pipe", "folder"):
        with pytest.raises(BadKey, match=f"^card '{name}' is not a plain file$"):
            read_limited(tmp_path / name, 100, what="card")
    with pytest.raises(BadKey, match=r"^cannot read card 'nothing': no such file or directory$"):
        read_limited(tmp_path / "nothing", 100, what="card")
    (tmp_path / "large").write_bytes(bytes(101))
    with pytest.raises(TooLarge, match=r"^card 'large' is over 100 bytes$"):
        read_limited(tmp_path / "large", 100, what="card")


def test_a_keys_folder_is_its_owners_alone(tmp_path):
    folder = tmp_path / "keys"
    with pytest.raises(ConfigError, match=r"no keys folder at .*keys'") as caught:
        check_folder(folder)
    assert "offsite keygen" in caught.value.hint
    folder.mkdir(0o700)
    check_folder(folder)
    for mode in (0o750, 0o705, 0o770, 0o777, 0o701):
        folder.chmod(mode)
        with pytest.raises(BadKey, match="keys folder 'keys' is open to others"):
            check_folder(folder)


def test_an_encrypted_key_opens_with_its_passphrase_alone():
    pem = encrypt_pkcs8(PLAIN, b"open sesame")
    assert pem != encrypt_pkcs8(PLAIN, b"open sesame")
    opened = decrypt_pkcs8(pem, b"open sesame", Ed25519PrivateKey, name="key.pem")
    assert opened.private_bytes_raw() == KEY.private_bytes_raw()
    for wrong in (b"open sesam", b"open sesame ", b"", b"a" * 5000):
        with pytest.raises(BadKey, match=r"^key file 'key.pem' does not open: wrong passphrase, or the file is dam"):
            decrypt_pkcs8(pem, wrong, Ed25519PrivateKey, name="key.pem")
    with pytest.raises(BadKey, match="holds a key of another kind"):
        decrypt_pkcs8(pem, b"open sesame", X25519PrivateKey, name="key.pem")


def test_a_key_that_is_not_encrypted_is_refused():
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(BadKey, match=r"^key file 'key.pem' is not encrypted$"):
        decrypt_pkcs8(pem, b"open sesame", Ed25519PrivateKey, name="key.pem")


def test_each_guess_at_the_passphrase_costs_scrypt_of_16_mib():
    salted = encrypt_pkcs8(PLAIN, b"x").decode().splitlines()[1:-1]
    der = base64.b64decode("".join(salted))
    assert bytes.fromhex("06092b06010401da47040b") in der  # scrypt
    assert bytes.fromhex("02024000020108020102") in der  # N = 2**14, r = 8, p = 2: 16 MiB, twice
    assert bytes.fromhex("060960864801650304012a") in der  # AES-256-CBC
    assert (keyfiles.SCRYPT_COST, keyfiles.SCRYPT_BLOCKS, keyfiles.SCRYPT_PASSES) == (2**14, 8, 2)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 127, 128, 300, 70_000])
def test_the_envelope_is_well_formed_at_every_length(size, monkeypatch):
    """A DER length takes one to four bytes; the library must find its way through each."""
    monkeypatch.setattr(keyfiles, "SCRYPT_COST", 2)
    pem = encrypt_pkcs8(bytes(size), b"x")
    with pytest.raises(BadKey, match="does not open"):
        decrypt_pkcs8(pem, b"x", Ed25519PrivateKey, name="zeros.pem")
    assert pem.count(b"\n") == -(-len("".join(pem.decode().splitlines()[1:-1])) // 64) + 2


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")
def test_the_openssl_command_reads_our_keys_and_we_read_its(tmp_path):
    write_private(tmp_path / "ours.pem", encrypt_pkcs8(PLAIN, b"open sesame"))
    command = ["openssl", "pkey", "-in", "ours.pem", "-passin", "pass:open sesame", "-outform", "DER"]
    theirs = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    assert theirs == PLAIN
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    assert decrypt_pkcs8(pem, b"x", Ed25519PrivateKey, name="theirs.pem").private_bytes_raw() == bytes(range(32))


class Form(Strict):
    format: str
    number: int


def test_a_document_is_refused_by_the_check_that_failed():
    good = b'{"format": "offsite/form/1", "number": 5}'
    assert parse_keys(good, Form, what="form", format_name="offsite/form/1").number == 5
    with pytest.raises(WrongBinding, match="form: format is offsite/form/1, expected offsite/form/2"):
        parse_keys(good, Form, what="form", format_name="offsite/form/2")
    for raw in (b"", b"[]", b"\xff", good[:-1], good.replace(b"5", b"NaN"), good.replace(b"5", b'5, "number": 5')):
        with pytest.raises(BadKey, match=r"^form "):
            parse_keys(raw, Form, what="form", format_name="offsite/form/1", hint="ask again")
    with pytest.raises(BadKey, match="form: 'number': input should be a valid integer") as caught:
        parse_keys(good.replace(b"5", b'"secret"'), Form, what="form", format_name="offsite/form/1", hint="ask again")
    assert "secret" not in str(caught.value)
    assert caught.value.hint == "ask again"
