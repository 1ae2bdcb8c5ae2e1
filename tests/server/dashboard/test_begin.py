"""``offsite owner init``: what stands afterwards, what a run that broke off leaves, and what is refused."""

from __future__ import annotations

import json
import stat
import subprocess
import tomllib

import pytest

from offsite import cli
from offsite.config import build
from server.dashboard import begin
from server.dashboard.access import Gatekeeper
from server.dashboard.config import OwnerUpConfig
from server.http.certificates import certificate_facts

PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def owner(tmp_path, monkeypatch, capsys, llama_like):
    """Run ``owner init`` in an empty folder; return code, JSON and what was said."""
    monkeypatch.setenv("OFFSITE_PASSPHRASE", PASSPHRASE)
    monkeypatch.setattr("offsite.keys.files.SCRYPT_COST", 2**4)
    monkeypatch.chdir(tmp_path)

    def run(*words, model=llama_like):
        code = cli.run(["owner", "init", str(model), *words])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if code == 0 else {}, err

    return run


def token_in(err):
    (found,) = [line.split()[-1] for line in err.splitlines() if "shown this once" in line]
    return found


def test_what_an_owner_needs_stands_and_up_reads_it(owner, tmp_path, llama_like):
    code, told, err = owner("--name", "Example Labs", "--url", "https://owner.example:9443")
    assert code == 0, err
    assert told["name"] == "Example Labs"
    assert {path.name for path in tmp_path.iterdir()} == {
        "offsite.toml", "keys", "registry", "outbox", "invitations", "withdrawals", "tls",
    }  # fmt: skip
    assert stat.S_IMODE((tmp_path / "tls" / "certificate-key.pem").stat().st_mode) == 0o600
    assert Gatekeeper(tmp_path / "keys").judge(token_in(err), "here") == "right"
    config = build(OwnerUpConfig)
    assert (config.registry, config.keys) == (tmp_path / "registry", tmp_path / "keys")
    assert (config.home, config.outbox, config.certificate) == (
        tmp_path, tmp_path / "outbox", tmp_path / "tls" / "certificate.pem",
    )  # fmt: skip
    assert (config.url, config.port, config.host) == ("https://owner.example:9443", 9443, "0.0.0.0")
    assert (config.dashboard_host, config.model) == ("127.0.0.1", str(llama_like))
    assert build(OwnerUpConfig, flags={"port": "1"}).port == 1, "a flag wins"
    found = certificate_facts(config.certificate)
    assert set(found.names) == {"owner.example", "localhost", "127.0.0.1", "::1"}
    shown = subprocess.run(
        ["openssl", "x509", "-in", config.certificate, "-noout", "-fingerprint", "-sha256"],
        capture_output=True,
        text=True,
    ).stdout
    assert found.sha256 in shown, "as browsers and openssl show it"
    code, _, err = owner()
    assert code == 2
    assert "says already what an owner needs" in err
    assert cli.run(["registry", "list"]) == 0, "other verbs read the same file"


@pytest.mark.parametrize("step", ["write_certificate", "_add_table", "make_token"])
def test_a_run_that_broke_off_goes_on(step, owner, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(begin, step, broken)
        assert owner("--name", "Example Labs")[0] == 130
    if step == "make_token":  # all is there but the token, which up makes
        assert build(OwnerUpConfig).url
        return
    card = (tmp_path / "keys" / "card.json").read_bytes()
    code, _, err = owner()
    assert code == 0, err
    assert (tmp_path / "keys" / "card.json").read_bytes() == card
    assert tomllib.loads((tmp_path / "offsite.toml").read_text())["owner"]["url"] == "https://127.0.0.1:8443"


def test_what_is_refused_leaves_nothing(owner, tmp_path):
    for words, told in (
        (("--url", "http://owner.example"), "expected https"),
        (("--url", "https://owner.example:99999"), "names no host"),
    ):
        code, _, err = owner(*words)
        assert (code, told in err) == (2, True), err
    code, _, err = owner(model=tmp_path / "nowhere")
    assert code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("[owner]\nprot = 1\n", "names 'prot'; did you mean 'port'?"),
        ("[owner]\nport = 'x'\n", "port"),
        ("[orders]\nport = 1\n", "names 'orders'"),
        ("owner = 'x'\n", "expected some of"),
    ],
)
def test_a_table_that_says_something_else_is_refused(lines, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "offsite.toml").write_text(f'keys = "keys"\nregistry = "registry"\n{lines}')
    assert cli.run(["owner", "up"]) == 2
    assert told in capsys.readouterr().err


def test_up_without_a_project_says_how_one_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for stated in (None, 'keys = "keys"\n'):  # none, and a client's
        if stated is not None:
            (tmp_path / "offsite.toml").write_text(stated)
        assert cli.run(["owner", "up"]) == 2
        line, hint = capsys.readouterr().err.splitlines()
        assert "there is no owner's project here" in line
        assert "--registry" not in line
        assert "offsite owner init MODEL" in hint
    assert cli.run(["owner", "up", "--port", "nought"]) == 2
    assert "--port: " in capsys.readouterr().err
