"""Files that were hashed here before: whoever finds one unchanged need not read it again.

A file counts as unchanged when the system says of the open file what it said when it was hashed: device, inode, size,
and the times of its last writing and of its last change, in nanoseconds. Whoever writes to a file can turn back the
first of these times and not the second, which the kernel sets. One that was changed within `SETTLED_NANOSECONDS` before
it was hashed is not remembered: a second writing might leave the same times. What a disk loses by itself changes no
time; who doubts it has every byte hashed again.

The list itself is as safe as the folder that it is in. It is only ever believed of files, never of the manifest that
says what their digests must be.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from pydantic import Field, ValidationError

from offsite.digests import DIGEST_PATTERN
from offsite.staging import staged_file
from offsite.strictjson import Strict

FORMAT = "offsite/known-files/1"
SETTLED_NANOSECONDS = 2 * 10**9
MAX_FILES = 4096
LIMIT_BYTES = 4 * 2**20


class KnownFile(Strict):
    """What the system said of a file when it had this digest."""

    size: int = Field(ge=0)
    written_ns: int
    changed_ns: int
    sha256: str = Field(pattern=DIGEST_PATTERN)


class _List(Strict):
    format: str
    files: dict[str, KnownFile]


class KnownFiles:
    """A list of them in a file of its own, read when it is made; one that cannot be read is an empty one.

    Args:
        path: the list; in a folder that is its owner's alone.
        trusted: believe it. Otherwise every file is hashed anew, and remembered.
    """

    def __init__(self, path: Path, *, trusted: bool = True) -> None:
        self._path, self._trusted = path, trusted
        self._files = _read(path)
        self._is_new = False

    def digest(self, handle: int) -> str | None:
        """Return the digest of the open file, if it is known and unchanged."""
        found = self._files.get(_name(handle)) if self._trusted else None
        return found.sha256 if found is not None and found == _seen(handle, found.sha256) else None

    def note(self, handle: int, sha256: str, began_ns: int) -> None:
        """The open file is known to have this digest, if it had settled when hashing began and is unchanged since.

        Args:
            began_ns: the clock's nanoseconds since 1970 before the first byte was read.
        """
        now = _seen(handle, sha256)
        if max(now.written_ns, now.changed_ns) > began_ns - SETTLED_NANOSECONDS:
            return
        self._files.pop(_name(handle), None)
        self._files[_name(handle)] = now
        for name in list(self._files)[: max(0, len(self._files) - MAX_FILES)]:  # the oldest
            del self._files[name]
        self._is_new = True

    def save(self) -> None:
        """What was noted is on disk, for its owner alone.

        Raises:
            RunFailed: when the disk fails.
        """
        if not self._is_new:
            return
        with staged_file(self._path, replace=True) as stage:
            stage.touch(mode=0o600)
            stage.write_text(_List(format=FORMAT, files=self._files).model_dump_json() + "\n", encoding="utf-8")
        self._is_new = False


def clock_ns() -> int:
    """Return the nanoseconds since 1970."""
    return time.time_ns()


def _name(handle: int) -> str:
    found = os.fstat(handle)
    return f"{found.st_dev}:{found.st_ino}"


def _seen(handle: int, sha256: str) -> KnownFile:
    found = os.fstat(handle)
    return KnownFile(size=found.st_size, written_ns=found.st_mtime_ns, changed_ns=found.st_ctime_ns, sha256=sha256)


def _read(path: Path) -> dict[str, KnownFile]:
    try:
        if path.is_symlink() or path.stat().st_size > LIMIT_BYTES:
            return {}
        found = _List.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError, RecursionError):
        return {}
    return dict(found.files) if found.format == FORMAT else {}
