"""What a node refuses before Flower is started; ``tests/faults/test_flower_deployment.py`` runs whole ones."""

from __future__ import annotations

import json
import sys

import pytest

from client.federation import node
from client.federation.nodeconfig import NodeConfig
from offsite.config import build
from offsite.errors import BadKey, ConfigError, RunFailed

PIN = "0" * 64


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Settings of a node whose client's part is sound; no SuperNode is started."""
    (tmp_path / "member.json").write_text(
        json.dumps({"package": "p", "job": "j", "data": "d", "work": "w", "accept_leakage": True})
    )
    key = tmp_path / "key"
    key.write_bytes(b"a key")
    key.chmod(0o600)
    monkeypatch.setattr(node, "Member", lambda config: type("Member", (), {"job": type("Job", (), {"client": "x"})}))
    return {"superlink": "127.0.0.1:9", "client": tmp_path / "member.json", "app": PIN, "node_key": key}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("app", "0" * 63),
        ("app", "sha256:" + PIN),
        ("app", "A" * 64),
        ("superlink", "owner.example"),
        ("superlink", "https://owner.example:443"),
        ("superlink", "--insecure:1"),
        ("superlink", "owner.example:1 --insecure"),
    ],
)
def test_settings_that_are_none(setting, value, given):
    flags = {name: str(found) for name, found in given.items()}
    with pytest.raises(ConfigError, match=f"(?i){setting}: expected (HOST:PORT|SHA-256)"):
        build(NodeConfig, flags={**flags, setting: value})


def test_a_pin_and_a_key_are_not_a_choice(given):
    for left_out in ("app", "node_key"):
        flags = {name: str(found) for name, found in given.items() if name != left_out}
        with pytest.raises(ConfigError, match=left_out.replace("_", "-")):
            build(NodeConfig, flags=flags)


def test_a_key_that_others_can_read(given):
    given["node_key"].chmod(0o640)
    with pytest.raises(BadKey, match="node key"):
        node.node_run(NodeConfig(**given))


@pytest.mark.parametrize("name", ["client", "root_certificate"])
def test_files_that_are_not_there(name, given, tmp_path):
    with pytest.raises(ConfigError, match="no file named 'nowhere'"):
        node.node_run(NodeConfig(**{**given, name: tmp_path / "nowhere"}))


def test_a_supernode_that_ends_is_an_error_and_hears_nothing_of_ours(given, monkeypatch, tmp_path):
    seen = tmp_path / "seen.json"
    program = (
        f"import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open({str(seen)!r}, 'w')); sys.exit(3)"
    )
    monkeypatch.setattr("client.federation.messages.SUPERNODE", program)
    monkeypatch.setenv("OFFSITE_PASSPHRASE", "a secret")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    with pytest.raises(RunFailed, match="SuperNode ended with exit code 3"):
        node.node_run(NodeConfig(**given))
    words, environment = json.loads(seen.read_text())
    told = dict(zip(words[1::2], words[2::2], strict=True))
    assert told["--isolation"] == "process"
    assert told["--host"] == "127.0.0.1"
    assert "--superexec-auth-secret-file" in told
    assert "OFFSITE_PASSPHRASE" not in environment
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
