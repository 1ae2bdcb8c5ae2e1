"""A SQLite database with a hash-chained log: state that must not be lost, torn or turned back to an older copy.

Three files hold the state. The *database* (WAL, ``synchronous=FULL``) is the truth. The *log* beside it says in order
what happened: one JSON object a line, each with the SHA-256 of the line before it. The *head* - number and hash of the
newest line - stands in another folder, so that whoever restores the first two from a backup is noticed.

A transaction commits its rows together with its log lines, the last of which states a digest of all rows there are
(``offsite/state/rowsum.py``); then the lines are appended to the log, then the head is replaced. A crash in between
leaves log and head at the line before, and opening completes them from the database. Any other difference means that a
file was turned back or edited, and is refused with `Replayed`: also an old database beside a newer write-ahead file,
whose pages SQLite puts together without a word. What lies there is first only read, so that a refusal changes no file.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from offsite.digests import sha256_bytes
from offsite.errors import BadDigest, Replayed, RunFailed, WrongBinding
from offsite.faults import reach
from offsite.staging import fsync, leftovers, staged_file
from offsite.state import rowsum
from offsite.state.chain import GENESIS, Head, follows, read_chain, read_log, write_line

HEAD_LIMIT_BYTES = 1024

_STATE_TABLE = """
CREATE TABLE store_state (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    number INTEGER NOT NULL, hash TEXT NOT NULL, log_bytes INTEGER NOT NULL,
    previous_number INTEGER NOT NULL, previous_hash TEXT NOT NULL, previous_bytes INTEGER NOT NULL,
    total BLOB NOT NULL
) STRICT
"""
_OWN_TABLES = f"""
{_STATE_TABLE};
CREATE TABLE store_lines (number INTEGER PRIMARY KEY, line BLOB NOT NULL) STRICT
"""
# Before the sum over all rows was kept, the state's table was another: an offsite of then cannot write any more.
_FROM_FORM_0 = f"""
{_STATE_TABLE};
INSERT INTO store_state SELECT *, zeroblob(256) FROM store_head;
DROP TABLE store_head
"""  # noqa: S608
_FORM, _FORM_STEP = 1, 1000
"""The form of the store's own tables, and what a form counts for in ``user_version``, above the schema's version."""

Value = str | int | float | bytes | None
Rows = Callable[..., list[sqlite3.Row]]
Agree = Callable[[Iterable[dict[str, Any]], Rows], None]


@dataclass(frozen=True)
class _State:
    """What the database says of log and head: where they end, and where they ended before the last transaction."""

    head: Head
    log_bytes: int
    previous: Head
    previous_bytes: int
    lines: tuple[bytes, ...]
    total: bytes | None
    """The sum over all rows; None in a database that was made before it was kept."""


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
        agree: raises Replayed when the rows do not follow from the log's lines, as far as these say; asked when a
            database without a sum over its rows is brought up, and by `verify_log`.
        clock: seconds since 1970.

    Raises:
        Replayed: when database, write-ahead file, log or head is older than the others, or the log's end was edited;
            no file is changed then.
        WrongBinding: when the database is of a newer schema than `migrations`.
        RunFailed: when a file cannot be written or the database is damaged.
    """

    def __init__(
        self,
        path: Path,
        migrations: Sequence[str],
        *,
        anchor: Path,
        agree: Agree | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path, self.anchor, self.log_path = path, anchor, path.with_suffix(".log")
        self._clock, self._agree, self._num_steps = clock, agree, 1 + len(migrations)
        self._mutex = threading.RLock()
        self._is_locked = False
        self._connection: sqlite3.Connection | None = None
        with self._errors(), self._locked():
            self._examine()
            for orphan in leftovers(anchor):
                orphan.unlink(missing_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
            try:
                self._connection.row_factory = sqlite3.Row
                for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
                    self._connection.execute(f"PRAGMA {pragma}")
                self._migrate(migrations)
                self._settle()
                self._watch = rowsum.Watch(self._connection)
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
            if self._version() != (_FORM, self._num_steps):
                raise RunFailed(f"{self.path.name!r} was brought to a newer schema meanwhile", hint="start again")
            state = self._settle()
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                before = connection.total_changes
                self._watch.begin()
                transaction = Transaction(connection)
                yield transaction
                if connection.total_changes != before and not transaction.events:
                    raise RuntimeError("a transaction changed rows and logged nothing")
                if transaction.events:
                    self._write_lines(transaction.events, self._watch.added_to(state.total or rowsum.EMPTY))
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
        """Return how many lines the log has, once each follows from the one before and the rows from them all.

        Raises:
            BadDigest: naming the first line that does not.
            Replayed: when the rows are not those that the log's last line states, or that its lines lead to.
        """
        with self._errors(), self._locked():
            state = self._settle()
            self._check_chain(state)
            self._check_rows(state)
            if self._agree is not None:
                self._agree(read_log(self.log_path), self.rows)
            return state.head.number

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the log's lines as objects, oldest first, once every one of them follows from the one before.

        Raises:
            BadDigest: naming the first line that does not.
        """
        with self._errors(), self._locked():
            self._check_chain(self._settle())
        yield from read_log(self.log_path)

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

    def _examine(self) -> None:
        """Return only if what lies there is one state, and the newest of which anything there tells. It is only read.

        Raises:
            Replayed: when a file is older than another, or the database's pages or rows do not fit together.
        """
        name, known = self.path.name, self.anchor.exists() or bool(_size(self.log_path))
        if not _size(self.path):
            if known or _size(self.path.with_name(f"{name}-wal")):
                raise _turned_back(name, "is empty or gone, but its log, head or write-ahead file is not")
            return
        if _size(self.path.with_name(f"{name}-journal")):
            if known:
                raise _turned_back(name, "has a rollback journal beside it, which it never had")
            return  # it was being made when its process was killed: SQLite puts that right
        # closing a connection that may write would merge the write-ahead file into a database it may not belong to
        connection = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            self._connection = connection
            connection.execute("BEGIN")
            version = self._version()[1]
            if not version and known:
                raise _turned_back(name, "is empty, but its log or head is not")
            if version:
                self._check_rows(None)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR):
                raise
            raise _turned_back(name, "has pages that do not fit together") from None
        finally:
            self._connection = None
            connection.close()

    def _version(self) -> tuple[int, int]:
        """Return the form of the store's own tables, and the schema's version.

        Raises:
            WrongBinding: when this offsite does not know them.
        """
        form, version = divmod(int(self._open().execute("PRAGMA user_version").fetchone()[0]), _FORM_STEP)
        if form > _FORM or version > self._num_steps:
            raise WrongBinding(
                f"{self.path.name!r} is of schema version {version}, this offsite knows up to {self._num_steps}",
                hint="use the newer offsite that wrote it",
            )
        return form, version

    def _migrate(self, migrations: Sequence[str]) -> None:
        connection = self._open()
        form, version = self._version()
        if (form, version) == (_FORM, self._num_steps):
            return
        steps = [_OWN_TABLES, *migrations][version:]
        if version and form < _FORM:
            steps.insert(0, _FROM_FORM_0)
        connection.execute("BEGIN IMMEDIATE")
        try:
            for step in steps:
                for statement in step.split(";"):
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {_FORM * _FORM_STEP + self._num_steps}")
            if not version:
                start = (GENESIS, GENESIS, rowsum.EMPTY)
                connection.execute("INSERT INTO store_state VALUES (1, 0, ?, 0, 0, ?, 0, ?)", start)
            else:
                state = self._settle()
                if form < _FORM and self._agree is not None:
                    self._check_chain(state)
                    self._agree(read_log(self.log_path), self.rows)
            self._write_lines([("schema", {"version": self._num_steps})], rowsum.whole(connection))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _state(self) -> _State:
        table = "store_state" if self._version()[0] else "store_head"
        try:
            row = self._open().execute(f"SELECT * FROM {table}").fetchone()  # noqa: S608
            lines = self._open().execute("SELECT line FROM store_lines ORDER BY number").fetchall()
            return _State(
                head=Head(number=row["number"], hash=row["hash"]),
                log_bytes=row["log_bytes"],
                previous=Head(number=row["previous_number"], hash=row["previous_hash"]),
                previous_bytes=row["previous_bytes"],
                lines=tuple(line["line"] for line in lines),
                total=row["total"] if table == "store_state" else None,
            )
        except (ValidationError, TypeError, IndexError):  # another table's row, or none: pages of several states
            raise _turned_back(self.path.name, "has pages that do not fit together") from None

    def _write_lines(self, events: Sequence[tuple[str, dict[str, object]]], total: bytes) -> None:
        """Put the events' lines, the new head and the sum over all rows into the open transaction."""
        state, connection = self._state(), self._open()
        connection.execute("DELETE FROM store_lines")
        number, previous, num_bytes = state.head.number, state.head.hash, state.log_bytes
        last = number + len(events)
        for event, fields in events:
            number += 1
            rows = sha256_bytes(total) if number == last else None
            line = write_line(number, int(self._clock()), event, fields, previous, rows)
            connection.execute("INSERT INTO store_lines VALUES (?, ?)", (number, line))
            previous = sha256_bytes(line)
            num_bytes += len(line)
        connection.execute(
            "UPDATE store_state SET number = ?, hash = ?, log_bytes = ?,"
            " previous_number = ?, previous_hash = ?, previous_bytes = ?, total = ?",
            (number, previous, num_bytes, state.head.number, state.head.hash, state.log_bytes, total),
        )

    def _check_rows(self, state: _State | None) -> None:
        """Return only if the database's pages fit together and its rows are those that its last log line states.

        Args:
            state: what the database says, once it was held against log and head; None to do that first.
        """
        name, connection = self.path.name, self._open()
        if connection.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
            raise _turned_back(name, "has pages that do not fit together")
        if state is None:
            state = self._state()
            self._is_behind(state)
        if state.total is None:
            return  # of an offsite before the sum; its head, which was held against it, is then of before it, too
        stated = json.loads(state.lines[-1]).get("rows")
        if rowsum.whole(connection) != state.total or stated != sha256_bytes(state.total):
            raise _turned_back(name, f"holds other rows than entry {state.head.number} of its log states")

    def _check_chain(self, state: _State) -> None:
        found = read_chain(self.log_path)
        if found != state.head:
            raise BadDigest(f"{self.log_path.name} ends at line {found.number}, the database at {state.head.number}")

    def _settle(self) -> _State:
        """Log and head agree with the database, completed when a crash left them one transaction behind.

        Raises:
            Replayed: when they differ in any other way.
        """
        state = self._state()
        if self._is_behind(state):
            self._publish(state)
        return state

    def _is_behind(self, state: _State) -> bool:
        """Tell whether log and head lack the last transaction, as a crash leaves them.

        Raises:
            Replayed: when they differ in any other way.
        """
        anchor, num_bytes, name = self._read_anchor(), _size(self.log_path), self.path.name
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
        if anchor == state.head and self._log_end(state) != b"".join(state.lines):
            raise _turned_back(name, f"has a log whose end is not entry {state.head.number}")
        if anchor not in (state.head, state.previous):
            raise _turned_back(name, f"ends at entry {state.head.number}, its head at {anchor.number}")
        last = state.previous
        for line in state.lines:
            if not follows(line, last.number + 1, last.hash):
                raise _turned_back(name, "holds lines that do not follow from its log")
            last = Head(number=last.number + 1, hash=sha256_bytes(line))
        if last != state.head or not state.lines:
            raise _turned_back(name, "holds lines that do not lead to its head")
        return anchor != state.head

    def _log_end(self, state: _State) -> bytes:
        if not self.log_path.exists():
            return b""
        with self.log_path.open("rb") as handle:
            handle.seek(state.previous_bytes)
            return handle.read(sum(map(len, state.lines)) + 1)

    def _publish(self, state: _State) -> None:
        """Write the last transaction's lines to the log's end, then the head; writing them again changes nothing."""
        handle = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(handle, state.previous_bytes)
            os.lseek(handle, state.previous_bytes, os.SEEK_SET)
            lines = b"".join(state.lines)
            middle = len(lines) // 2
            _write(handle, lines[:middle])
            reach("log-half")
            _write(handle, lines[middle:])
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
            return Head(number=0, hash=GENESIS)
        try:
            return Head.model_validate_json(raw[:HEAD_LIMIT_BYTES])
        except ValidationError:
            raise _turned_back(self.path.name, f"has a head file {self.anchor.name!r} that is damaged") from None


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _turned_back(name: str, what: str) -> Replayed:
    return Replayed(
        f"{name!r} {what}: a file was turned back or edited",
        hint="put the newest copies of the database with its -wal file, of its log and of its head back, and no older"
        " one; older ones are never used",
    )
