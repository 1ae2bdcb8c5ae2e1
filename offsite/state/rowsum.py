"""One number for all rows of a database: the same for the same rows in any order, and kept up as rows change.

Each row becomes a number of 2048 bits, by SHAKE-256 over its table and values; the sum of them all, modulo 2**2048,
stands for the content. A transaction costs as much as it changes; `whole` works the sum out anew from what lies there.
The size is such that other rows with the same sum cannot be searched for.

Sources: Clarke et al. 2003 (incremental multiset hash functions), Wagner 2002 (what such sums must withstand).
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping

SUM_BYTES = 256
EMPTY = bytes(SUM_BYTES)

_MODULUS: int = 2 ** (8 * SUM_BYTES)
_FUNCTION = "offsite_row"


def tables(connection: sqlite3.Connection) -> Mapping[str, list[str]]:
    """Return the columns of each table but the store's own (``store_...``) and SQLite's."""
    found = connection.execute(
        "SELECT name FROM main.sqlite_master WHERE type = 'table'"
        " AND name NOT GLOB 'sqlite_*' AND name NOT GLOB 'store_*' ORDER BY name"
    ).fetchall()
    return {
        row[0]: [column[0] for column in connection.execute("SELECT name FROM pragma_table_info(?)", (row[0],))]
        for row in found
    }


def whole(connection: sqlite3.Connection) -> bytes:
    """Return the sum over all rows that the connection sees."""
    total = 0
    for table in tables(connection):
        for row in connection.execute(f"SELECT * FROM main.{_quoted(table)}"):  # noqa: S608
            total += _number(table, tuple(row))
    return (total % _MODULUS).to_bytes(SUM_BYTES, "big")


class Watch:
    """Adds up what a connection changes, from triggers that nobody but this connection has."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._change: int = 0
        connection.create_function(_FUNCTION, -1, self._note)
        connection.execute("PRAGMA recursive_triggers=ON")  # a row that another one replaces counts as deleted
        for number, (table, columns) in enumerate(tables(connection).items()):
            for event, sides in (("INSERT", ((1, "NEW"),)), ("DELETE", ((-1, "OLD"),)),
                                 ("UPDATE", ((-1, "OLD"), (1, "NEW")))):  # fmt: skip
                calls = "".join(_call(sign, table, side, columns) for sign, side in sides)
                connection.execute(
                    f"CREATE TEMP TRIGGER {_FUNCTION}_{number}_{event} AFTER {event} ON main.{_quoted(table)}"
                    f" BEGIN {calls} END"
                )

    def begin(self) -> None:
        """Forget what was changed: a transaction begins."""
        self._change = 0

    def added_to(self, total: bytes) -> bytes:
        """Return the sum after what was changed since `begin`, where `total` was the one before."""
        after = (int.from_bytes(total, "big") + self._change) % _MODULUS
        return after.to_bytes(SUM_BYTES, "big")

    def _note(self, sign: int, table: str, *values: object) -> None:
        self._change += sign * _number(table, values)


def _number(table: str, values: tuple[object, ...]) -> int:
    return int.from_bytes(hashlib.shake_256(ascii((table, *values)).encode("ascii")).digest(SUM_BYTES), "big")


def _call(sign: int, table: str, side: str, columns: list[str]) -> str:
    values = "".join(f", {side}.{_quoted(column)}" for column in columns)
    text = table.replace("'", "''")
    return f"SELECT {_FUNCTION}({sign}, '{text}'{values});"


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'
