"""Both parties' folders after one loop, and `offsite inspect` in one of them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from offsite import cli

ARCHIVE = Path(__file__).parents[2] / "vectors" / "loop" / "parties.tar.gz"


@pytest.fixture
def parties(tmp_path, monkeypatch, capsys):
    """Folders `owner` and `client`, their `figures`, and `inspect`: returns what was told, as JSON and to people."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for party in ("owner", "client"):  # the modes of folders are not taken out of an archive
        (tmp_path / party / "keys").chmod(0o700)
    monkeypatch.delenv("OFFSITE_PASSPHRASE", raising=False)  # nothing that is inspected needs it
    monkeypatch.setenv("HOME", str(tmp_path))

    def inspect(party, *words, code=0):
        monkeypatch.chdir(tmp_path / party)
        capsys.readouterr()
        found = cli.run(["inspect", *map(str, words)])
        shown = capsys.readouterr()
        assert found == code, shown.err
        return (json.loads(shown.out.splitlines()[-1]) if code == 0 else shown.out), shown.err

    figures = json.loads((tmp_path / "figures.json").read_text())
    return SimpleNamespace(inspect=inspect, figures=figures, owner=tmp_path / "owner", client=tmp_path / "client")
