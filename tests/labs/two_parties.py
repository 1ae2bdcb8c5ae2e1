"""The folders of an owner and a client after one loop on a tiny model, and a way to run verbs in them."""

from __future__ import annotations

import json
import re
import shlex
import tarfile
from pathlib import Path
from typing import Any

from offsite import cli

ARCHIVE = Path(__file__).parents[1] / "vectors" / "loop" / "parties.tar.gz"
PASSPHRASE = "correct horse battery staple"


class TwoParties:
    """Both parties' folders below `folder`; verbs run in this process, in the folder of one of them."""

    def __init__(self, folder: Path, monkeypatch: Any, capsys: Any) -> None:
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(folder, filter="data")
        for party in ("owner", "client"):  # the modes of folders are not taken out of an archive
            (folder / party / "keys").chmod(0o700)
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
