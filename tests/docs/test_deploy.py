"""`deploy/`: a linter finds nothing in the recipe of the image, systemd nothing in the units, and every command is one.

No image is built: that takes a base image, which takes a network.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from offsite import cli
from offsite.commands.verbs import VERBS, verb_of

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def commands():
    """Yield every command that is started, by where it stands."""
    for path in sorted(DEPLOY.glob("compose.*.yaml")):
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            yield pytest.param(service["command"], id=f"{path.name}:{name}")
    for unit in UNITS:
        (line,) = [one for one in unit.read_text().splitlines() if one.startswith("ExecStart=")]
        yield pytest.param(shlex.split(line)[1:], id=unit.name)


@pytest.mark.parametrize("words", list(commands()))
def test_what_is_started_is_a_command_of_offsite(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    verb, seen, resolve = VERBS[verb_of(words)], [], cli._resolve
    monkeypatch.setattr(cli, "_resolve", lambda spec: seen.append if spec == verb.function else resolve(spec))
    assert cli.run([str(word) for word in words]) == 0
    assert type(seen[0]) is resolve(verb.settings)


def test_services_can_do_no_more_than_they_need():
    for path in sorted(DEPLOY.glob("compose.*.yaml")):
        for service in yaml.safe_load(path.read_text())["services"].values():
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]
    (joined,) = yaml.safe_load((DEPLOY / "compose.client.yaml").read_text())["services"].values()
    assert joined["network_mode"] == "none"
    for unit in UNITS:
        assert {"NoNewPrivileges=yes", "ProtectSystem=strict", "UMask=0077"} <= set(unit.read_text().splitlines())


def test_the_exchange_can_write_its_registry_and_keys_and_not_its_own_program():
    stated = [
        line.split("=", 1) for line in (DEPLOY / "offsite-exchange.service").read_text().splitlines() if "=" in line
    ]
    (start,) = [shlex.split(value) for name, value in stated if name == "ExecStart"]
    (home,) = [Path(value) for name, value in stated if name == "WorkingDirectory"]
    written = [Path(path) for name, value in stated if name == "ReadWritePaths" for path in value.split()]
    assert sorted(written) == sorted(home / start[start.index(flag) + 1] for flag in ("--registry", "--keys"))
    assert not any(Path(start[0]).is_relative_to(path) for path in written)


def test_a_linter_finds_nothing_in_the_recipe():
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, DEPLOY / "Containerfile"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_nothing_in_the_units(unit, tmp_path):
    """But for the program, which is not installed at that place here."""
    text = unit.read_text().replace("/srv/offsite/venv/bin/offsite", shutil.which("true"))
    (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", tmp_path / unit.name],
        capture_output=True,
        text=True,
    )
    told = [line for line in done.stderr.splitlines() if unit.name in line and "offsite" in line]
    assert told == []
