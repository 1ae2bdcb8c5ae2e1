"""Tenants: their keys at rest, their limits, what they used; and the verbs."""

from __future__ import annotations

import sqlite3

import pytest

from offsite import cli
from offsite.errors import ConfigError
from server.tenants.store import Tenants, Used, seconds_of_today, today


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tenants.db"


def test_a_key_opens_for_its_tenant_and_stands_nowhere(file):
    with Tenants.open(file, create=True) as tenants:
        key = tenants.add("anna", models=("one",), requests_at_once=2, tokens_per_day=50)
        other = tenants.add("bert")
        assert len(key) > 40
        assert key != other
        anna = tenants.find(key)
        assert (anna.name, anna.requests_at_once, anna.tokens_per_day) == ("anna", 2, 50)
        assert anna.may_ask("one")
        assert not anna.may_ask("two")
        assert tenants.find(other).may_ask("two")
        assert tenants.find(key[:-1]) is None
        assert tenants.find("") is None
    assert file.stat().st_mode & 0o777 == 0o600
    for part in file.parent.iterdir():
        assert key.encode() not in part.read_bytes()


def test_usage_is_by_day_and_outlives_the_process_and_the_key(file, monkeypatch):
    with Tenants.open(file, create=True) as tenants, Tenants.open(file) as server:
        key = tenants.add("anna")
        for _ in range(2):
            server.charge("anna", num_prompt_tokens=3, num_answer_tokens=4)
        monkeypatch.setattr("server.tenants.store.today", lambda: "2001-02-03")
        server.charge("anna", num_prompt_tokens=10, num_answer_tokens=0)
    with Tenants.open(file) as tenants:
        assert tenants.used("anna", day=today()) == Used(2, 6, 8)
        assert tenants.used("anna", day="2001-02-03").num_tokens == 10
        assert tenants.used("anna") == Used(3, 16, 8)
        assert tenants.used("nobody") == Used()
        tenants.revoke("anna")
        assert tenants.find(key) is None
        assert tenants.used("anna").num_requests == 3
    assert 1 <= seconds_of_today() <= 86_400


def test_what_is_no_file_of_tenants_is_refused_as_it_stands(file):
    with pytest.raises(ConfigError, match="no file of tenants") as caught:
        Tenants.open(file)
    assert "tenant add" in caught.value.hint
    assert not file.exists()
    file.write_text("something else entirely, and longer than a header of SQLite " * 20)
    with pytest.raises(ConfigError, match="no file of tenants"):
        Tenants.open(file, create=True)
    assert file.read_text().startswith("something else")
    file.unlink()
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE x (y)")
    other.close()
    with pytest.raises(ConfigError, match="not one of tenants"):
        Tenants.open(file, create=True)


def test_the_verbs_add_list_and_revoke(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    add = ["tenant", "add", "anna", "--tenants", "t.db", "-o", "key", "--models", "one", "--models", "two"]
    assert cli.run([*add, "--requests-at-once", "3"]) == 0
    key = (tmp_path / "key").read_text().strip()
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    with Tenants.open(tmp_path / "t.db") as tenants:
        assert tenants.find(key).models == ("one", "two")
    assert cli.run([*add[:5], "-o", "other"]) == 2
    assert "there is a tenant 'anna' already" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert cli.run(["tenant", "list", "--tenants", "t.db"]) == 0
    shown = capsys.readouterr()
    assert "one, two" in shown.err
    assert key not in shown.err + shown.out
    assert cli.run(["tenant", "revoke", "anna", "--tenants", "t.db"]) == 0
    assert cli.run(["tenant", "revoke", "anna", "--tenants", "t.db"]) == 2
    assert "there is no tenant 'anna'" in capsys.readouterr().err
    assert cli.run(["tenant", "list", "--tenants", "nothing.db"]) == 2
    assert not (tmp_path / "nothing.db").exists()
