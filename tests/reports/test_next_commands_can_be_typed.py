"""The commands that were printed as the next ones failed when they were typed: they left out the keys in use, and the
error then sent somebody who had keys to make others."""

from __future__ import annotations

import pytest
from two_parties import TwoParties


@pytest.fixture
def parties(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return TwoParties(tmp_path, monkeypatch, capsys)


def test_from_a_job_to_an_adapted_model(parties):
    client = parties.figures["client"]
    words = f"job create package --client {client} --registry registry --keys keys --adapter lora --placement all"
    parties.run("owner", f"{words} --rank 2 -o second")
    for command in parties.next_commands():
        parties.run("owner", command)
    assert (parties.owner / "second.sealed" / "manifest.json").is_file()
    assert (parties.owner / "package.sealed" / "manifest.json").is_file()

    for name in ("second", "package"):
        parties.run("client", f"open ../owner/{name}.sealed --keys keys -o new-{name}")
    tune = "tune new-package --job new-second --data private.jsonl --steps 2 --block-tokens 64 -o new-bundle"
    parties.run("client", tune)
    (audit,) = parties.next_commands()
    parties.run("client", audit)
    (seal,) = parties.next_commands()
    parties.run("client", f"{seal.replace('JOB', 'new-second')} --accept-leakage --keys keys")

    parties.run("owner", "intake ../client/new-bundle.sealed --registry registry --keys keys")
    (accept,) = parties.next_commands()
    parties.run("owner", accept)
    (plug_in,) = parties.next_commands()
    found = parties.run("owner", plug_in.replace("MODEL", "model"))
    assert (parties.owner / found["adapted"]).is_dir()


def test_after_tuning_with_rows_set_aside_the_audit_comes_next(parties):
    words = "tune package --job job --data private.jsonl --steps 2 --block-tokens 64 --audit-share 0.3 -o aside"
    parties.run("client", words)
    (audit,) = parties.next_commands()
    parties.run("client", audit)
    assert (parties.client / "aside-audit").is_dir()


def test_who_has_keys_here_is_told_to_name_them(parties):
    parties.run("owner", "registry list --registry registry", code=2)
    assert "no keys folder at '~/.offsite/keys'" in parties.told
    assert "add --keys keys" in parties.told
    assert "keygen" not in parties.told


def test_who_has_none_is_told_how_to_make_them(parties):
    (parties.owner / "keys").rename(parties.owner / "elsewhere")
    parties.run("owner", "registry list --registry registry --keys gone", code=2)
    assert "no keys folder at 'gone'" in parties.told
    assert "offsite keygen" in parties.told
