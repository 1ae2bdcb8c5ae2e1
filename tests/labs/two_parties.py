"""The folders of an owner and a client after one loop on a tiny model, and a way to run verbs in them."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from offsite import cli
from offsite.keys.identity import load_identity, save_identity

ARCHIVE = Path(__file__).parents[1] / "vectors" / "loop" / "parties.tar.gz"
PASSPHRASE = "correct horse battery staple"


def _extract(folder: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for party in ("owner", "client"):  # the modes of folders are not taken out of an archive
        (folder / party / "keys").chmod(0o700)


@functools.cache
def _begun() -> tempfile.TemporaryDirectory[str]:
    """Return the folders with both parties' keys locked again as those of other tests are; gone with the process."""
    made = tempfile.TemporaryDirectory()
    folder, secret = Path(made.name), PASSPHRASE.encode()
    _extract(folder)
    with tempfile.TemporaryDirectory() as beside, pytest.MonkeyPatch.context() as patch:
        patch.setattr("offsite.keys.files.SCRYPT_COST", 2**4)
        for party in ("owner", "client"):
            keys, locked = folder / party / "keys", Path(beside) / party
            save_identity(locked, load_identity(keys, secret), secret)
            for path in locked.glob("*.pem"):
                (keys / path.name).write_bytes(path.read_bytes())
    return made


class TwoParties:
    """Both parties' folders below `folder`; verbs run in this process, in the folder of one of them."""

    def __init__(self, folder: Path, monkeypatch: Any, capsys: Any, *, as_kept: bool = False) -> None:
        """Copy the folders.

        Args:
            as_kept: key files are those of the archive, not the same keys locked at a cost that many tests can pay.
        """
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        if as_kept:
            _extract(folder)
        else:
            shutil.copytree(_begun().name, folder, dirs_exist_ok=True)
        monkeypatch.setenv("OFFSITE_PASSPHRASE", PASSPHRASE)
        self.owner, self.client = folder / "owner", folder / "client"
        self.figures = json.loads((folder / "figures.json").read_text())
        self.told = ""

    def run(self, party: str, words: str, *, code: int = 0) -> dict[str, Any]:
        """Return what the verb printed on stdout; what people read is in `told`."""
        self._monkeypatch.chdir(self.folder / party)
        self._capsys.readouterr()
        found = cli.run(shlex.split(words))
        shown = self._capsys.readouterr()
        self.told = shown.err
        assert found == code, shown.err
        return json.loads(shown.out.splitlines()[-1]) if code == 0 else {}

    def next_commands(self) -> list[str]:
        """Return the commands that the last verb said come next, without the program's name."""
        return re.findall(r"^next: offsite (.+)$", self.told, re.MULTILINE)
