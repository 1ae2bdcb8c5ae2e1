from __future__ import annotations

from pathlib import Path

import pytest

from offsite.config import build
from offsite.errors import ConfigError
from offsite.keys.config import IdentityConfig, KeygenConfig, TrustAddConfig, TrustListConfig, TrustRevokeConfig


def test_the_keys_folder_is_below_home_unless_named(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert build(KeygenConfig).output == Path("/home/somebody/.offsite/keys")
    assert build(TrustListConfig).keys == build(IdentityConfig).keys == build(KeygenConfig).output
    assert build(TrustListConfig, flags={"keys": "~/other"}).keys == Path("/home/somebody/other")
    assert build(KeygenConfig, flags={"output": "here"}).output == Path("here")


@pytest.mark.parametrize("name", ["", "-x", "a" * 65, "Klinik\n", "\x1b[31mred", "a/b", "\u0430"])
def test_a_name_that_could_deceive_a_reader_is_refused(name):
    with pytest.raises(ConfigError, match="--name"):
        build(KeygenConfig, flags={"name": name})
    assert build(KeygenConfig, flags={"name": "Model Co. 2-b_c"}).name == "Model Co. 2-b_c"


@pytest.mark.parametrize("days", ["0", "-1", "3651", "1.5", "nan"])
def test_days_that_are_no_span_are_refused(days):
    with pytest.raises(ConfigError, match="--days"):
        build(KeygenConfig, flags={"days": days})


def test_words_are_the_card_and_the_fingerprint():
    assert build(TrustAddConfig, flags={"card": "card.json"}).fingerprint is None
    with pytest.raises(ConfigError, match="CARD is missing"):
        build(TrustAddConfig)
    with pytest.raises(ConfigError, match="FINGERPRINT is missing"):
        build(TrustRevokeConfig)


def test_the_next_command_is_told_the_same_keys_and_a_passphrase_where_it_needs_one():
    config = build(IdentityConfig, flags={"keys": "keys", "passphrase_file": "secret"})
    assert config.key_words() == ["--keys", "keys", "--passphrase-file", "secret"]
    assert config.key_words(opens=False) == ["--keys", "keys"]
    assert build(TrustListConfig, flags={"keys": "keys"}).key_words() == ["--keys", "keys"]
    assert build(IdentityConfig).key_words() == []
    assert not hasattr(KeygenConfig, "key_words")  # it has no keys yet
