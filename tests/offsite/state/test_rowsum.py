"""The sum over rows, kept up by what changes, is the one worked out from what lies there; nothing but rows counts."""

from __future__ import annotations

import hashlib
import random
import sqlite3

import pytest

from offsite.state import rowsum

SCHEMA = """
CREATE TABLE one (a INTEGER PRIMARY KEY, b TEXT, "odd ""name" REAL) STRICT;
CREATE TABLE two (a BLOB NOT NULL, b INTEGER NOT NULL, PRIMARY KEY (a, b)) STRICT, WITHOUT ROWID;
CREATE TABLE store_own (a INTEGER) STRICT;
"""


@pytest.fixture
def connection(tmp_path):
    made = sqlite3.connect(tmp_path / "rows.db", isolation_level=None)
    made.execute("PRAGMA trusted_schema=OFF")
    made.execute("PRAGMA synchronous=OFF")
    made.executescript(SCHEMA)
    yield made
    made.close()


def oracle(*rows):
    """The sum by its definition."""
    numbers = [int.from_bytes(hashlib.shake_256(repr(row).encode()).digest(256), "big") for row in rows]
    return (sum(numbers) % 2**2048).to_bytes(256, "big")


def test_the_sum_is_that_of_each_row_with_its_tables_name(connection):
    assert rowsum.whole(connection) == rowsum.EMPTY == oracle()
    connection.execute("INSERT INTO one VALUES (1, 'x', 2.5), (2, NULL, NULL)")
    connection.execute("INSERT INTO two VALUES (x'00ff', 7)")
    connection.execute("INSERT INTO store_own VALUES (1)")
    assert rowsum.whole(connection) == oracle(("one", 1, "x", 2.5), ("one", 2, None, None), ("two", b"\x00\xff", 7))


def test_a_row_twice_in_another_table_or_of_another_type_is_another_sum(connection):
    sums = set()
    for statement in ("INSERT INTO one VALUES (1, '1', NULL)", "UPDATE one SET b = 'None'", "UPDATE one SET b = NULL",
                      "INSERT INTO one VALUES (2, NULL, NULL)", "DELETE FROM one WHERE a = 1",
                      "INSERT INTO two VALUES (x'31', 1)", "UPDATE two SET a = x'32'"):  # fmt: skip
        connection.execute(statement)
        sums.add(rowsum.whole(connection))
    assert len(sums) == 7


def test_whatever_is_changed_in_whatever_way_the_kept_sum_is_the_whole_one(connection):
    watch, source, total = rowsum.Watch(connection), random.Random(0), rowsum.EMPTY
    statements = (
        "INSERT OR REPLACE INTO one VALUES (:x, 'a' || :y, :y)",
        "INSERT OR IGNORE INTO one VALUES (:x, 'b', 1.5)",
        "INSERT INTO one VALUES (:x, 'c', :y) ON CONFLICT (a) DO UPDATE SET b = excluded.b || b",
        "UPDATE OR REPLACE one SET b = 'd', a = a + 100 WHERE a = :x",
        "DELETE FROM one WHERE a % 5 = :y",
        "INSERT OR REPLACE INTO two VALUES (CAST(:x AS BLOB), :y)",
        "UPDATE OR REPLACE two SET b = :x WHERE b = :y",
        "DELETE FROM two WHERE b < :y",
        "DELETE FROM one",
    )
    for _ in range(300):
        connection.execute("BEGIN")
        watch.begin()
        for _ in range(source.randrange(4)):
            values = {"x": source.randrange(12), "y": source.randrange(5)}
            connection.execute(source.choice(statements[: -1 if source.random() < 0.95 else None]), values)
        if source.random() < 0.2:
            connection.execute("ROLLBACK")
        else:
            connection.execute("COMMIT")
            total = watch.added_to(total)
        assert rowsum.whole(connection) == total
    assert total != rowsum.EMPTY


def test_the_triggers_are_this_connections_alone(connection, tmp_path):
    rowsum.Watch(connection)
    other = sqlite3.connect(tmp_path / "rows.db", isolation_level=None)
    other.execute("INSERT INTO one VALUES (1, 'x', 1.0)")
    assert other.execute("SELECT count(*) FROM sqlite_master WHERE type = 'trigger'").fetchone()[0] == 0
    other.close()
