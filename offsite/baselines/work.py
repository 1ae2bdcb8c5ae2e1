"""``OUTPUT.work`` of a table that is being made: which answers there are already, so that a kill loses few."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from offsite.baselines.asking import Given
from offsite.errors import ConfigError, RunFailed
from offsite.staging import staged_file

_BINDING, _ANSWERS = "binding.json", "answers.jsonl"


class Work:
    """Answers by place: (number of the row of the table, number of the chunk of rows).

    Raises:
        ConfigError: when the folder holds answers of another run.
    """

    def __init__(self, folder: Path, binding: dict[str, Any]) -> None:
        self._folder = folder
        stated = folder / _BINDING
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not stated.exists():
                with staged_file(stated) as stage:
                    stage.write_text(json.dumps(binding), encoding="utf-8")
            if json.loads(stated.read_bytes()) != json.loads(json.dumps(binding)):
                raise ConfigError(
                    f"work folder {folder.name!r} holds answers of another task, data, model or setting",
                    hint="name another output with -o, or delete the folder",
                )
        except (OSError, ValueError) as error:
            raise ConfigError(f"work folder {folder.name!r} cannot be used: {_why(error)}", hint="delete it") from None
        self._done = dict(self._kept())

    def done(self, place: tuple[int, int]) -> tuple[list[Given], float] | None:
        """Return the answers at that place and the seconds they took; None where they are still to be given."""
        return self._done.get(place)

    def keep(self, place: tuple[int, int], given: Sequence[Given], seconds: float) -> None:
        """The answers are on disk; a kill no longer loses them.

        Raises:
            RunFailed: when the disk is full.
        """
        rows = [[one.text, one.short, one.too_long] for one in given]
        line = json.dumps({"place": list(place), "rows": rows, "seconds": seconds}) + "\n"
        try:
            with (self._folder / _ANSWERS).open("a", encoding="utf-8") as out:
                out.write(line)
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise RunFailed(
                f"cannot write in {self._folder.name!r}: {_why(error)}", hint="free space, then again"
            ) from None
        self._done[place] = (list(given), seconds)

    def remove(self) -> None:
        """Nothing of it is left."""
        shutil.rmtree(self._folder)

    def _kept(self) -> Iterable[tuple[tuple[int, int], tuple[list[Given], float]]]:
        path = self._folder / _ANSWERS
        whole = []
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if not line.endswith(b"\n"):  # torn by a kill
                break
            whole.append(line)
            found = json.loads(line)
            first, second = found["place"]
            yield (first, second), ([Given(*row) for row in found["rows"]], found["seconds"])
        if path.exists():
            with staged_file(path, replace=True) as stage:
                stage.write_bytes(b"".join(whole))


def _why(error: Exception) -> str:
    return ((error.strerror or "i/o error") if isinstance(error, OSError) else "its files are damaged").lower()
