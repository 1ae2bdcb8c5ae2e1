"""The log of a run: one JSON record per step in ``log.jsonl``, and curves in other tools where asked for."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offsite.errors import RunFailed
from offsite.staging import staged_file
from offsite.training.trackers import EventFile, Tracker, figures_of


def truncate(path: Path, step: int) -> None:
    """The log holds the records up to `step`: what a killed run did after its last checkpoint is done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        record = _record(line)
        if record is not None and record["step"] <= step:
            kept.append(line)
    with staged_file(path, replace=True) as stage:
        stage.write_bytes(b"".join(kept))


def _record(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):  # the record that a kill tore
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class Journal:
    """Appends to the log; nothing is open after `close`."""

    def __init__(self, path: Path, *, tensorboard: Path | None, step: int, trackers: Sequence[Tracker] = ()) -> None:
        """Open for the records after `step`.

        Args:
            tensorboard: folder for every figure of the log.
            trackers: what gets the few figures that may be reported; they are closed with the log.

        Raises:
            ConfigError: when `tensorboard` is given and the tensorboard package is absent.
        """
        self._board = EventFile(tensorboard, step=step) if tensorboard else None
        self._trackers = trackers
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(
        self, record: Mapping[str, int | float | None], more: Mapping[str, int | float | None] | None = None
    ) -> None:
        """One record is in the log; a kill of this process no longer loses it.

        Args:
            more: what trackers may be told beside it.

        Raises:
            RunFailed: when the disk is full.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "")
        except OSError as error:
            raise RunFailed(
                f"cannot write {self._path.name!r}: {os.strerror(error.errno or 0).lower()}",
                hint="the last checkpoint is kept; free space, then --resume",
            ) from error
        step = int(record["step"] or 0)
        if self._board is not None:
            kept = {name: float(value) for name, value in record.items() if name != "step" and value is not None}
            self._board.write(step, kept)
        for tracker in self._trackers:
            tracker.write(step, figures_of({**record, **(more or {})}))

    def sync(self) -> None:
        """Everything written is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """The files are closed."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        for tracker in self._trackers:
            tracker.close()
