"""The log of a run: one JSON record per step in ``log.jsonl``, and TensorBoard scalars where asked for."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offsite.errors import ConfigError, RunFailed
from offsite.staging import staged_file


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

    def __init__(self, path: Path, *, tensorboard: Path | None, step: int) -> None:
        """Open for the records after `step`.

        Raises:
            ConfigError: when `tensorboard` is given and the tensorboard package is absent.
        """
        self._board = _open_board(tensorboard, step) if tensorboard else None
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, int | float | None]) -> None:
        """One record is in the log; a kill of this process no longer loses it.

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
        if self._board is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Everything written is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """The files are closed."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _open_board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("tensorboard is not installed", hint="pip install tensorboard, or leave it out") from None
    try:
        return SummaryWriter(str(folder), purge_step=step + 1)
    except OSError as error:
        reason = (error.strerror or "i/o error").lower()
        raise ConfigError(f"--tensorboard: cannot write in {folder.name!r}: {reason}", hint="name a folder") from None
