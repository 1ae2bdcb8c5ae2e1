"""``OUTPUT.work`` of a table that is being made: which answers there are already, so that a kill loses few."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from offsite.baselines.asking import Given
from offsite.errors import ConfigError
from offsite.generation.kept import Kept

_Place = tuple[int, int]


class Work:
    """Answers by place: (number of the row of the table, number of the chunk of rows).

    Raises:
        ConfigError: when the folder holds answers of another run.
    """

    def __init__(self, folder: Path, binding: dict[str, Any]) -> None:
        self._kept = Kept(folder, binding, of="another task, data, model or setting")
        try:
            self._done = dict(self._read())
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"work folder {folder.name!r} cannot be used: its files are damaged", hint="delete it"
            ) from None

    def done(self, place: _Place) -> tuple[list[Given], float] | None:
        """Return the answers at that place and the seconds they took; None where they are still to be given."""
        return self._done.get(place)

    def keep(self, place: _Place, given: Sequence[Given], seconds: float) -> None:
        """The answers are on disk; a kill no longer loses them.

        Raises:
            RunFailed: when the disk is full.
        """
        rows = [[one.text, one.short, one.too_long] for one in given]
        self._kept.add({"place": list(place), "rows": rows, "seconds": seconds})
        self._done[place] = (list(given), seconds)

    def remove(self) -> None:
        """Nothing of it is left."""
        self._kept.remove()

    def _read(self) -> Iterable[tuple[_Place, tuple[list[Given], float]]]:
        for line in self._kept.lines:
            found = json.loads(line)
            first, second = found["place"]
            yield (first, second), ([Given(*row) for row in found["rows"]], found["seconds"])
