"""The store: rows, log and head move together, through crashes and full disks, and never backwards."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from offsite import faults
from offsite.digests import sha256_bytes
from offsite.errors import BadDigest, Replayed, RunFailed, WrongBinding
from offsite.state import rowsum
from offsite.state.chain import LINE_LIMIT_BYTES, read_log, verify_log, write_line
from offsite.state.store import Store

SCHEMA = ("CREATE TABLE words (word TEXT PRIMARY KEY, number INTEGER NOT NULL) STRICT",)
STEPS = ("commit-before", "commit-after", "log-half", "log-after", "head-after")


class Crash(BaseException):
    """Stands for the end of the process: nothing after it runs."""


@pytest.fixture
def opened(tmp_path):
    def opened(migrations=SCHEMA):
        (tmp_path / "keys").mkdir(exist_ok=True)
        return Store(tmp_path / "words.db", migrations, anchor=tmp_path / "keys" / "words.head", clock=lambda: 1000.5)

    return opened


@pytest.fixture
def fault():
    def fault(point, action):
        faults.set_hook(lambda reached: action() if reached == point else None)

    yield fault
    faults.set_hook(None)


def add(store, word):
    with store.transaction() as transaction:
        transaction.execute("INSERT INTO words VALUES (?, ?)", (word, len(word)))
        transaction.log("added", word=word)


def broken_off(store):
    with store.transaction() as transaction:
        transaction.execute("INSERT INTO words VALUES ('two', 3)")
        transaction.log("added", word="two")
        raise Crash


def words(store):
    return [row["word"] for row in store.rows("SELECT word FROM words ORDER BY rowid")]


def raises(error):
    def action():
        raise error

    return action


def test_rows_and_log_say_the_same_after_opening_again(opened, tmp_path):
    with opened() as store:
        add(store, "one")
        add(store, "two")
        assert store.verify_log() == 3
    with opened() as store:
        assert words(store) == ["one", "two"]
        assert store.head.number == 3
        assert verify_log(store.log_path) == 3
    lines = list(read_log(tmp_path / "words.log"))
    assert [line["event"] for line in lines] == ["schema", "added", "added"]
    assert [line["number"] for line in lines] == [1, 2, 3]
    assert lines[2]["fields"] == {"word": "two"}
    assert lines[2]["time"] == 1000


def test_nothing_is_readable_by_others(opened, tmp_path):
    with opened() as store:
        add(store, "one")
        found = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(found) >= 5
        assert {path.stat().st_mode & 0o077 for path in found} == {0}


def test_a_block_that_fails_changes_nothing(opened):
    with opened() as store:
        add(store, "one")
        with pytest.raises(Crash):
            broken_off(store)
        with pytest.raises(sqlite3.IntegrityError):
            add(store, "one")
        assert (words(store), store.verify_log()) == (["one"], 2)


def test_a_change_that_nobody_logs_is_a_bug(opened):
    with opened() as store:
        with pytest.raises(RuntimeError, match="logged nothing"), store.transaction() as transaction:
            transaction.execute("INSERT INTO words VALUES ('one', 3)")
        with store.transaction() as transaction:
            assert transaction.execute("SELECT count(*) FROM words").fetchone()[0] == 0
        with pytest.raises(RuntimeError, match="in a transaction already"), store.transaction(), store.transaction():
            pass
        add(store, "one")


def test_migrations_apply_once_and_a_newer_schema_is_refused(opened):
    with opened() as store:
        add(store, "one")
    more = (*SCHEMA, "ALTER TABLE words ADD COLUMN language TEXT")
    for _ in range(2):
        with opened(more) as store:
            assert store.rows("SELECT * FROM words")[0]["language"] is None
            assert store.verify_log() == 3
    with pytest.raises(WrongBinding, match="schema version 3, this offsite knows up to 2"):
        opened()


def test_a_store_that_another_process_brought_up_meanwhile_is_not_written_to(opened):
    """Its sum over the rows would leave out the new column."""
    with opened() as old:
        add(old, "one")
        with opened((*SCHEMA, "ALTER TABLE words ADD COLUMN language TEXT")) as new:
            with pytest.raises(WrongBinding, match="schema version 3, this offsite knows up to 2"):
                add(old, "two")
            with new.transaction() as transaction:
                transaction.execute("INSERT INTO words VALUES ('two', 3, 'en')")
                transaction.log("added", word="two")
            assert new.verify_log() == 4


def test_a_migration_that_fails_leaves_the_old_schema(opened):
    with opened() as store:
        add(store, "one")
    with pytest.raises(RunFailed):
        opened((*SCHEMA, "CREATE TABLE more (a INTEGER) STRICT; CREATE TABLE words (b INTEGER) STRICT"))
    with opened() as store:
        assert words(store) == ["one"]
        assert store.verify_log() == 2


@pytest.mark.parametrize("point", STEPS)
def test_row_24_a_crash_leaves_the_old_state_or_the_new(point, opened, fault):
    with opened() as store:
        add(store, "one")
        fault(point, raises(Crash()))
        with pytest.raises(Crash):
            add(store, "two")
    faults.set_hook(None)
    with opened() as store:
        expected = ["one"] if point == "commit-before" else ["one", "two"]
        assert words(store) == expected
        assert store.verify_log() == 1 + len(expected)
        add(store, "three")
        assert store.verify_log() == 2 + len(expected)


@pytest.mark.parametrize("point", STEPS)
def test_row_24_a_crash_while_the_store_is_made(point, opened, fault):
    fault(point, raises(Crash()))
    if point in STEPS[2:]:
        with pytest.raises(Crash):
            opened()
    faults.set_hook(None)
    with opened() as store:
        add(store, "one")
        assert store.verify_log() == 2


@pytest.mark.parametrize("point", STEPS[:-1])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_row_25_a_failing_disk_is_one_clean_error(point, number, opened, fault):
    with opened() as store:
        add(store, "one")
        fault(point, raises(OSError(number, os.strerror(number))))
        with pytest.raises(RunFailed, match=r"cannot write .words\.db., its log or its head: "):
            add(store, "two")
        faults.set_hook(None)
        expected = ["one"] if point == "commit-before" else ["one", "two"]
        assert words(store) == expected
        add(store, "three")
        assert store.verify_log() == 2 + len(expected)


def test_row_25_short_writes_are_gone_on_with(opened, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data[:7])))
    with opened() as store:
        add(store, "one")
        assert store.verify_log() == 2


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from offsite.errors import RunFailed
from offsite.state.store import Store
folder = Path(sys.argv[1])
store = Store(folder / "words.db", ["CREATE TABLE words (word TEXT PRIMARY KEY, number INTEGER NOT NULL) STRICT"],
              anchor=folder / "keys" / "words.head")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
done = 0
try:
    for number in range(400):
        with store.transaction() as transaction:
            transaction.execute("INSERT INTO words VALUES (?, ?)", (f"{number} " + "x" * 300, number))
            transaction.log("added", number=number, filler="y" * 50)
        done += 1
except RunFailed as error:
    print(done, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [9_001, 20_011, 70_001, 150_000])
def test_row_25_files_that_cannot_grow(limit, opened, tmp_path):
    """The kernel cuts writes short and refuses them, to whichever file comes first: database or log."""
    opened().close()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)], capture_output=True, text=True, check=True
    )
    count, message = done.stdout.split(" ", 1)
    assert message.startswith("cannot ")
    with opened() as store:
        found = len(words(store))
        assert found in (int(count), int(count) + 1)
        assert store.verify_log() == found + 1
        add(store, "more")


def _kill_at(folder, point):
    faults.set_hook(lambda reached: os.kill(os.getpid(), signal.SIGKILL) if reached == point else None)
    add(Store(folder / "words.db", SCHEMA, anchor=folder / "keys" / "words.head"), "killed")


@pytest.mark.parametrize("point", STEPS)
def test_row_24_killed_for_real(point, opened, tmp_path):
    opened().close()
    process = multiprocessing.get_context("fork").Process(target=_kill_at, args=(tmp_path, point))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with opened() as store:
        assert words(store) == ([] if point == "commit-before" else ["killed"])
        assert store.verify_log() == 1 + len(words(store))
    assert not list(tmp_path.rglob("*.partial"))


FILES = ("words.db", "words.log", "keys/words.head")


@pytest.mark.parametrize("turned", [{"words.db"}, {"words.log"}, {"keys/words.head"}, {"words.db", "words.log"}])
@pytest.mark.parametrize("num_transactions", [2, 5])
def test_row_12_what_is_turned_back_is_noticed(turned, num_transactions, opened, tmp_path):
    with opened() as store:
        add(store, "one")
    for name in FILES:
        shutil.copy(tmp_path / name, tmp_path / (name.replace("/", "-") + ".old"))
    with opened() as store:
        for number in range(num_transactions):
            add(store, f"later {number}")
    for name in turned:
        shutil.copy(tmp_path / (name.replace("/", "-") + ".old"), tmp_path / name)
    with pytest.raises(Replayed, match="turned back or edited") as caught:
        opened()
    assert "newest" in caught.value.hint


@pytest.mark.parametrize("gone", FILES)
def test_row_12_what_is_deleted_is_noticed(gone, opened, tmp_path):
    with opened() as store:
        add(store, "one")
        add(store, "two")
    (tmp_path / gone).unlink()
    with pytest.raises(Replayed):
        opened()


def test_a_head_that_is_looked_for_elsewhere(opened, tmp_path):
    with opened() as store:
        add(store, "one")
        add(store, "two")
    (tmp_path / "other").mkdir()
    with pytest.raises(Replayed, match=r"the head of 'words\.db' is not in folder 'other'") as caught:
        Store(tmp_path / "words.db", SCHEMA, anchor=tmp_path / "other" / "words.head")
    assert "that it was made with" in caught.value.hint


def test_the_database_is_flushed_at_each_commit(opened, monkeypatch):
    monkeypatch.setattr(sqlite3, "connect", sqlite3.dbapi2.connect)  # the one that waits for the disk
    with opened() as store:
        found = {name: store.rows(f"PRAGMA {name}")[0][0] for name in ("journal_mode", "synchronous", "foreign_keys")}
        assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_row_12_a_file_turned_back_under_an_open_store(opened, tmp_path):
    with opened() as store:
        add(store, "one")
        old = (tmp_path / "words.log").read_bytes()
        add(store, "two")
        add(store, "three")
        (tmp_path / "words.log").write_bytes(old)
        with pytest.raises(Replayed, match="lost lines"):
            add(store, "four")


def test_a_log_that_was_edited_is_noticed(opened, tmp_path):
    log = tmp_path / "words.log"
    with opened() as store:
        for word in ("one", "two", "six"):
            add(store, word)
    raw = log.read_bytes()
    log.write_bytes(raw.replace(b'"two"', b'"owt"'))
    with opened() as store, pytest.raises(BadDigest, match=r"line 4 of words\.log does not follow"):
        store.verify_log()
    log.write_bytes(raw.replace(b'"six"', b'"xis"'))
    with pytest.raises(Replayed, match="whose end is not entry 4"):
        opened()
    for bad in (raw[:-1], raw + raw, b"x\n" + raw, raw.replace(b'"event"', b' "event"', 1), raw + b"[" * 10_000):
        log.write_bytes(bad)
        with pytest.raises(BadDigest):
            verify_log(log)
    log.write_bytes(raw)
    opened().close()


@pytest.mark.parametrize("lines_left", [1, 0])
def test_rows_log_and_database_rewritten_beside_the_newest_head_are_noticed(lines_left, opened, tmp_path):
    with opened() as store:
        add(store, "one")
        add(store, "two")
    log, database = tmp_path / "words.log", sqlite3.connect(tmp_path / "words.db", isolation_level=None)
    lines = log.read_bytes().splitlines(keepends=True)
    database.execute("UPDATE words SET number = 99 WHERE word = 'one'")
    total = rowsum.whole(database)
    old = json.loads(lines[-1])
    forged = write_line(3, old["time"], old["event"], old["fields"], old["previous"], sha256_bytes(total))
    assert len(forged) == len(lines[-1])
    database.execute("UPDATE store_state SET total = ?", (total,))
    if lines_left:
        database.execute("UPDATE store_lines SET line = ?", (forged,))
        log.write_bytes(b"".join([*lines[:-1], forged]))
    else:
        database.execute("DELETE FROM store_lines")
        database.execute(
            "UPDATE store_state SET previous_number = number, previous_hash = hash, previous_bytes = log_bytes"
        )
    database.close()
    with pytest.raises(Replayed, match="do not lead to its head"):
        opened()


def test_a_damaged_head_or_database_is_one_line(opened, tmp_path):
    with opened() as store:
        add(store, "one")
    head = (tmp_path / "keys" / "words.head").read_bytes()
    (tmp_path / "keys" / "words.head").write_bytes(b"{")
    with pytest.raises(Replayed, match="damaged"):
        opened()
    (tmp_path / "keys" / "words.head").write_bytes(head)
    (tmp_path / "words.db").write_bytes(b"not a database " * 400)
    with pytest.raises(RunFailed, match="cannot use"):
        opened()


def _add_many(folder, name):
    with Store(folder / "words.db", SCHEMA, anchor=folder / "keys" / "words.head") as store:
        for number in range(10):
            add(store, f"{name}-{number}")


def test_processes_and_threads_wait_for_each_other(opened, tmp_path):
    with opened() as store:
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=_add_many, args=(tmp_path, name)) for name in "ab"]
        for worker in workers:
            worker.start()
        threads = [
            threading.Thread(target=lambda name=name: [add(store, f"{name}{n}") for n in range(5)]) for name in "cd"
        ]
        for thread in threads:
            thread.start()
        for member in (*threads, *workers):
            member.join()
        assert [worker.exitcode for worker in workers] == [0, 0]
        assert len(words(store)) == 30
        assert store.verify_log() == 31


def test_without_a_hook_a_fault_point_does_nothing():
    for point in faults.POINTS:
        faults.reach(point)


def test_a_line_beyond_the_limit_is_refused_and_changes_nothing(opened):
    with opened() as store:
        with (
            pytest.raises(RunFailed, match=r"'x' would be a log line of \d+ bytes, limit 65536$"),
            store.transaction() as transaction,
        ):
            transaction.log("x", text="y" * LINE_LIMIT_BYTES)
        assert json.loads(store.log_path.read_bytes())["event"] == "schema"
