"""A passphrase of one letter locked a party's keys, and nothing was said."""

from __future__ import annotations

import pytest

from offsite import cli
from offsite.keys.files import PASSPHRASE_FLOOR, require_strong


def keygen(tmp_path, monkeypatch, passphrase: str) -> int:
    monkeypatch.setenv("OFFSITE_PASSPHRASE", passphrase)
    return cli.run(["keygen", "-o", str(tmp_path / "keys"), "--name", "Example"])


@pytest.mark.parametrize("weak", ["a", "password", "qwertyuiop", "12345678", "aaaaaaaaaaaaaaaaaaaaaaaa", "Letmein1!"])
def test_what_is_soon_guessed_is_refused_and_leaves_nothing(tmp_path, monkeypatch, capsys, weak):
    assert keygen(tmp_path, monkeypatch, weak) == 2
    told = capsys.readouterr().err
    assert f"expected at least 10^{PASSPHRASE_FLOOR}" in told
    assert weak not in told.replace("about", "").replace("at least", "") or len(weak) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strong", ["correct horse battery staple", "k9#vQ2!mZx7p", "Zwölf Boxkämpfer jagen Viktor"])
def test_a_strong_one_makes_keys_and_its_strength_is_said(tmp_path, monkeypatch, capsys, strong):
    assert keygen(tmp_path, monkeypatch, strong) == 0
    assert f"about 10^{require_strong(strong.encode())} guesses" in capsys.readouterr().err


def test_a_passphrase_of_many_bytes_is_estimated_at_once():
    assert require_strong(b"\xff k9#vQ2!mZx7p \xfe" + b"word" * 10_000) >= PASSPHRASE_FLOOR


def test_keys_locked_with_a_weak_one_before_still_open(tmp_path):
    from offsite.keys.identity import generate, load_identity, save_identity

    made = generate("Example", days=1)
    save_identity(tmp_path / "keys", made, b"a")
    assert load_identity(tmp_path / "keys", b"a").public.fingerprint == made.public.fingerprint
