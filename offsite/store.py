"""A SQLite database with a hash-chained log: state that must not be lost, torn or turned back to an older copy.

Three files hold the state. The *database* (WAL, ``synchronous=FULL``) is the truth. The *log* beside it says in order
what happened: one JSON object a line, each with the SHA-256 of the line before it. The *head* - number and hash of the
newest line - stands in another folder, so that whoever restores the first two from a backup is noticed.

A transaction commits its rows together with its log lines; then the lines are appended to the log, then the head is
replaced. A crash in between leaves log and head at the line before, and opening completes them from the database. Any
other difference means that a file was turned back or edited, and is refused with `Replayed`.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError

from offsite.digests import DIGEST_PATTERN, sha256_bytes
from offsite.errors import BadDigest, Replayed, RunFailed, WrongBinding
from offsite.faults import reach
from offsite.staging import fsync, staged_file
from offsite.strictjson import Strict

LINE_LIMIT_BYTES = 64 * 1024
HEAD_LIMIT_BYTES = 1024

_GENESIS = sha256_bytes(b"offsite/v1/log")
_OWN_TABLES = """
CREATE TABLE store_head (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    number INTEGER NOT NULL, hash TEXT NOT NULL, log_bytes INTEGER NOT NULL,
    previous_number INTEGER NOT NULL, previous_hash TEXT NOT NULL, previous_bytes INTEGER NOT NULL
) STRICT;
CREATE TABLE store_lines (number INTEGER PRIMARY KEY, line BLOB NOT NULL) STRICT
"""

Value = str | int | float | bytes | None


class Head(Strict):
    """The newest line of a log: how many there are, and the SHA-256 of the last."""

    number: int = Field(ge=0)
    hash: str = Field(pattern=DIGEST_PATTERN)


@dataclass(frozen=True)
class _State:
    """What the database says of log and head: where they end, and where they ended before the last transaction."""

    head: Head
    log_bytes: int
    previous: Head
    previous_bytes: int
    lines: bytes


class Transaction:
    """Rows and log lines that are committed together. Made by `Store.transaction`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.events: list[tuple[str, dict[str, object]]] = []

    def execute(self, statement: str, values: Sequence[Value] = ()) -> sqlite3.Cursor:
        """Run one statement; the rows it found are read from the cursor."""
        return self._connection.execute(statement, values)

    def log(self, event: str, **fields: object) -> None:
        """Add a line to the log; it stands there if, and only if, the transaction is committed."""
        self.events.append((event, fields))


class Store:
    """An open database with its log and its head; safe to share between threads, and between processes.

    Args:
        path: the database; the log is ``<stem>.log`` and a lock ``<stem>.lock`` beside it.
        migrations: the schema's versions, each SQL statements parted by ``;`` without one inside; ever only added to.
        anchor: file of the head, best in a folder that is not restored together with the database's.
        clock: seconds since 1970.

    Raises:
        Replayed: when database, log or head is older than the others, or the log's end was edited.
        WrongBinding: when the database is of a newer schema than `migrations`.
        RunFailed: when a file cannot be written or the database is damaged.
    """

    def __init__(
        self, path: Path, migrations: Sequence[str], *, anchor: Path, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self.anchor, self.log_path = path, anchor, path.with_suffix(".log")
        self._clock = clock
        self._mutex = threading.RLock()
        self._is_locked = False
        self._connection: sqlite3.Connection | None = None
        with self._errors(), self._locked():
            for orphan in anchor.parent.glob(f".{anchor.name}.*.partial"):
                orphan.unlink(missing_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
            try:
                self._connection.row_factory = sqlite3.Row
                for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
                    self._connection.execute(f"PRAGMA {pragma}")
                self._migrate(migrations)
                self._settle()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The database is closed; closing again does nothing."""
        with self._mutex:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Yield a transaction that is alone, and commit it when the block ends well; otherwise nothing has changed.

        Every transaction that changes a row logs at least one event.

        Raises:
            Replayed: when a file was turned back since the last transaction.
            RunFailed: when the disk is full or fails. If the commit itself stood, log and head are completed by the
                next transaction or opening; asking again is safe where the rows say that it was done.
        """
        with self._errors(), self._locked():
            self._settle()
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                before = connection.total_changes
                transaction = Transaction(connection)
                yield transaction
                if connection.total_changes != before and not transaction.events:
                    raise RuntimeError("a transaction changed rows and logged nothing")
                if transaction.events:
                    self._write_lines(transaction.events)
                reach("commit-before")
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            reach("commit-after")
            if transaction.events:
                self._publish(self._state())

    def rows(self, statement: str, values: Sequence[Value] = ()) -> list[sqlite3.Row]:
        """Return the rows that a query finds."""
        with self._errors(), self._mutex:
            return self._open().execute(statement, values).fetchall()

    @property
    def head(self) -> Head:
        """The newest line of the log, as the database states it."""
        with self._errors(), self._mutex:
            return self._state().head

    def verify_log(self) -> int:
        """Return how many lines the log has once every one of them follows from the one before, up to the head.

        Raises:
            BadDigest: naming the first line that does not.
        """
        with self._errors(), self._locked():
            self._settle()
            found, head = _read_chain(self.log_path), self._state().head
            if found != head:
                raise BadDigest(f"{self.log_path.name} ends at line {found.number}, the database at {head.number}")
            return found.number

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise RuntimeError(f"{self.path.name} is closed")
        return self._connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn failures of disk and database into `RunFailed`; broken rules of the schema pass as they are."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise RunFailed(f"cannot use {self.path.name!r}: {str(error).lower()[:160]}") from error
        except OSError as error:
            reason = (error.strerror or "i/o error").lower()
            raise RunFailed(f"cannot write {self.path.name!r}, its log or its head: {reason}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else, of any thread or process, writes while the block runs; a kill lets go."""
        with self._mutex:
            if self._is_locked:
                raise RuntimeError(f"{self.path.name} is in a transaction already")
            handle = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                self._is_locked = True
                yield
            finally:
                self._is_locked = False
                os.close(handle)

    def _migrate(self, migrations: Sequence[str]) -> None:
        connection = self._open()
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        steps = [_OWN_TABLES, *migrations]
        if version > len(steps):
            raise WrongBinding(
                f"{self.path.name!r} is of schema version {version}, this offsite knows up to {len(steps)}",
                hint="use the newer offsite that wrote it",
            )
        if version == len(steps):
            return
        if version == 0 and (self.anchor.exists() or _size(self.log_path)):
            raise _turned_back(self.path.name, "is empty, but its log or head is not")
        connection.execute("BEGIN IMMEDIATE")
        try:
            for step in steps[version:]:
                for statement in step.split(";"):
                    connection.execute(statement)
            if version == 0:
                connection.execute("INSERT INTO store_head VALUES (1, 0, ?, 0, 0, ?, 0)", (_GENESIS, _GENESIS))
            else:
                self._settle()
            self._write_lines([("schema", {"version": len(steps)})])
            connection.execute(f"PRAGMA user_version = {len(steps)}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _state(self) -> _State:
        row = self._open().execute("SELECT * FROM store_head").fetchone()
        lines = self._open().execute("SELECT line FROM store_lines ORDER BY number").fetchall()
        return _State(
            head=Head(number=row["number"], hash=row["hash"]),
            log_bytes=row["log_bytes"],
            previous=Head(number=row["previous_number"], hash=row["previous_hash"]),
            previous_bytes=row["previous_bytes"],
            lines=b"".join(line["line"] for line in lines),
        )

    def _write_lines(self, events: Sequence[tuple[str, dict[str, object]]]) -> None:
        """Put the events' lines and the new head into the open transaction."""
        state, connection = self._state(), self._open()
        connection.execute("DELETE FROM store_lines")
        number, previous, num_bytes = state.head.number, state.head.hash, state.log_bytes
        for event, fields in events:
            number += 1
            line = _line(number, int(self._clock()), event, fields, previous)
            connection.execute("INSERT INTO store_lines VALUES (?, ?)", (number, line))
            previous = sha256_bytes(line)
            num_bytes += len(line)
        connection.execute(
            "UPDATE store_head SET number = ?, hash = ?, log_bytes = ?,"
            " previous_number = ?, previous_hash = ?, previous_bytes = ?",
            (number, previous, num_bytes, state.head.number, state.head.hash, state.log_bytes),
        )

    def _settle(self) -> None:
        """Log and head agree with the database: completed when a crash left them one transaction behind.

        Raises:
            Replayed: when they differ in any other way.
        """
        state, anchor, num_bytes = self._state(), self._read_anchor(), _size(self.log_path)
        name = self.path.name
        if state.previous.number and not self.anchor.exists():
            raise Replayed(
                f"the head of {name!r} is not in folder {self.anchor.parent.name!r}",
                hint="name the folder that it was made with, or put the file back; without its head it is never used",
            )
        if num_bytes > state.log_bytes or anchor.number > state.head.number:
            ends = f"ends at entry {state.head.number}"
            raise _turned_back(name, f"{ends}, its log or head remembers more")
        if num_bytes < state.previous_bytes:
            raise _turned_back(name, "has a log that lost lines")
        if anchor == state.head:
            if self._log_end(state) != state.lines:
                raise _turned_back(name, f"has a log whose end is not entry {state.head.number}")
        elif anchor == state.previous:
            self._publish(state)
        else:
            raise _turned_back(name, f"ends at entry {state.head.number}, its head at {anchor.number}")

    def _log_end(self, state: _State) -> bytes:
        if not self.log_path.exists():
            return b""
        with self.log_path.open("rb") as handle:
            handle.seek(state.previous_bytes)
            return handle.read(len(state.lines) + 1)

    def _publish(self, state: _State) -> None:
        """Write the last transaction's lines to the log's end, then the head; writing them again changes nothing."""
        handle = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(handle, state.previous_bytes)
            os.lseek(handle, state.previous_bytes, os.SEEK_SET)
            middle = len(state.lines) // 2
            _write(handle, state.lines[:middle])
            reach("log-half")
            _write(handle, state.lines[middle:])
            os.fsync(handle)
        finally:
            os.close(handle)
        if not state.previous_bytes:
            fsync(self.log_path.parent)
        reach("log-after")
        with staged_file(self.anchor, replace=True) as stage:
            stage.write_text(state.head.model_dump_json() + "\n", encoding="ascii")
            stage.chmod(0o600)
        reach("head-after")

    def _read_anchor(self) -> Head:
        """Return the head that the anchor holds; a missing one stands for an empty log."""
        try:
            raw = self.anchor.read_bytes()
        except FileNotFoundError:
            return Head(number=0, hash=_GENESIS)
        try:
            return Head.model_validate_json(raw[:HEAD_LIMIT_BYTES])
        except ValidationError:
            raise _turned_back(self.path.name, f"has a head file {self.anchor.name!r} that is damaged") from None


def verify_log(path: Path) -> int:
    """Return how many lines the log at `path` has once each of them follows from the one before.

    That it ends where the database does is for `Store.verify_log` to say.

    Raises:
        BadDigest: naming the first line that does not.
    """
    return _read_chain(path).number


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the log's lines as objects, oldest first, unchecked."""
    if path.exists():
        with path.open("rb") as handle:
            for line in handle:
                yield json.loads(line)


def _read_chain(path: Path) -> Head:
    number, previous = 0, _GENESIS
    if not path.exists():
        return Head(number=0, hash=_GENESIS)
    with path.open("rb") as handle:
        while raw := handle.readline(LINE_LIMIT_BYTES + 1):
            number += 1
            if not _follows(raw, number, previous):
                raise BadDigest(
                    f"line {number} of {path.name} does not follow from the one before",
                    hint="the log was edited; compare it with a copy kept elsewhere",
                )
            previous = sha256_bytes(raw)
    return Head(number=number, hash=previous)


def _follows(raw: bytes, number: int, previous: str) -> bool:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(found, dict)
        and set(found) == {"number", "time", "event", "fields", "previous"}
        and found["number"] == number
        and found["previous"] == previous
        and isinstance(found["fields"], dict)
        and raw == _line(number, found["time"], found["event"], found["fields"], previous)
    )


def _line(number: int, when: int, event: str, fields: dict[str, object], previous: str) -> bytes:
    content = {"number": number, "time": when, "event": event, "fields": fields, "previous": previous}
    line = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
    if len(line) > LINE_LIMIT_BYTES:
        raise ValueError(f"a log line of {len(line)} bytes, limit {LINE_LIMIT_BYTES}")
    return line


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _turned_back(name: str, what: str) -> Replayed:
    return Replayed(
        f"{name!r} {what}: a file was turned back or edited",
        hint="put the newest copies of the database, its log and its head back; older ones are never used",
    )
