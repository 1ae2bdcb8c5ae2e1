"""Who may ask a server, with which key, for what and how much; and what each has used.

A key is 256 random bits and is shown once: the file holds its SHA-256 alone, which for a key of that kind needs no salt
and no slow hash. The file is an SQLite database, so that tenants may be added and revoked, and usage charged, while a
server runs on it; the server looks at every request.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from offsite.errors import ConfigError, RunFailed

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tenants (
    name TEXT PRIMARY KEY, key_sha256 TEXT NOT NULL UNIQUE, models TEXT NOT NULL, requests_at_once INTEGER NOT NULL,
    tokens_per_day INTEGER NOT NULL, created INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS used (
    tenant TEXT NOT NULL, day TEXT NOT NULL, requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    answer_tokens INTEGER NOT NULL, PRIMARY KEY (tenant, day)
) STRICT;
PRAGMA user_version = 1
"""
_KIND = 0x6F667431  # "oft1": what the file says it is
_PREFIX = "offsite-"


@dataclass(frozen=True)
class Tenant:
    """One tenant. No `models` means every model; a limit of 0 is none.

    Attributes:
        requests_at_once: requests under way at once.
        tokens_per_day: of prompts and answers on one day (UTC).
    """

    name: str
    models: tuple[str, ...] = ()
    requests_at_once: int = 0
    tokens_per_day: int = 0
    created: int = 0

    def may_ask(self, model: str) -> bool:
        """Tell whether the tenant may ask for that model."""
        return not self.models or model in self.models


@dataclass(frozen=True)
class Used:
    """What a tenant has used on one day, or on all."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_answer_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and answers."""
        return self.num_prompt_tokens + self.num_answer_tokens


class Tenants:
    """An open file of tenants; safe to share between threads and processes. Made by `Tenants.open`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path, self._connection, self._lock = path, connection, threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def open(cls, path: Path, *, create: bool = False) -> Self:
        """Return the tenants in the file at `path`.

        Args:
            create: make the file, mode 0600, when there is none.

        Raises:
            ConfigError: when there is none, or it is something else.
            RunFailed: when the disk fails.
        """
        is_new = not path.exists()
        if is_new and not create:
            raise ConfigError(f"there is no file of tenants {path.name!r}", hint="offsite tenant add makes one")
        try:
            if is_new:
                path.touch(mode=0o600)
            connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise RunFailed(f"cannot use tenants {path.name!r}: {error}") from None
        try:
            found = connection.execute("PRAGMA application_id").fetchone()[0]
            if found == 0 and not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                connection.execute(f"PRAGMA application_id = {_KIND}")
            elif found != _KIND:
                raise ConfigError(f"{path.name!r} is a database, but not one of tenants")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            connection.close()
            raise ConfigError(f"{path.name!r} is no file of tenants: {error}") from None
        except ConfigError:
            connection.close()
            raise
        return cls(path, connection)

    def close(self) -> None:
        """The file is closed."""
        self._connection.close()

    def add(
        self, name: str, *, models: tuple[str, ...] = (), requests_at_once: int = 0, tokens_per_day: int = 0
    ) -> str:
        """Return the key of the new tenant, which nobody can tell again.

        Raises:
            ConfigError: when there is a tenant of that name.
        """
        key = _PREFIX + secrets.token_urlsafe(32)
        values = (name, _hashed(key), json.dumps(models), requests_at_once, tokens_per_day, int(time.time()))
        try:
            self._rows("INSERT INTO tenants VALUES (?, ?, ?, ?, ?, ?)", values)
        except sqlite3.IntegrityError:
            hint = "offsite tenant revoke first; its usage stays"
            raise ConfigError(f"there is a tenant {name!r} already", hint=hint) from None
        return key

    def revoke(self, name: str) -> None:
        """The tenant's key opens nothing any more; what it used stays known.

        Raises:
            ConfigError: when there is no such tenant.
        """
        if not self._rows("DELETE FROM tenants WHERE name = ? RETURNING name", (name,)):
            raise ConfigError(f"there is no tenant {name[:64]!r}", hint="offsite tenant list")

    def all(self) -> list[Tenant]:
        """Return every tenant, by name."""
        return [_tenant(row) for row in self._rows("SELECT * FROM tenants ORDER BY name")]

    def find(self, key: str) -> Tenant | None:
        """Return the tenant with that key. It is looked for by its hash, whose bits nobody can choose."""
        rows = self._rows("SELECT * FROM tenants WHERE key_sha256 = ?", (_hashed(key),))
        return _tenant(rows[0]) if rows else None

    def charge(self, name: str, *, num_prompt_tokens: int, num_answer_tokens: int) -> None:
        """One request more, and its tokens, are among what the tenant used today."""
        self._rows(
            "INSERT INTO used VALUES (?, ?, 1, ?, ?) ON CONFLICT (tenant, day) DO UPDATE SET requests = requests + 1,"
            " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
            " answer_tokens = answer_tokens + excluded.answer_tokens",
            (name, today(), num_prompt_tokens, num_answer_tokens),
        )

    def used(self, name: str, *, day: str | None = None) -> Used:
        """Return what the tenant used on that day, or on all days."""
        rows = self._rows(
            "SELECT sum(requests), sum(prompt_tokens), sum(answer_tokens) FROM used WHERE tenant = ? AND day LIKE ?",
            (name, day or "%"),
        )
        return Used(*(number or 0 for number in rows[0]))

    def _rows(self, query: str, values: tuple[str | int, ...] = ()) -> list[tuple]:
        with self._lock:
            try:
                return self._connection.execute(query, values).fetchall()
            except sqlite3.OperationalError as error:
                raise RunFailed(f"cannot use tenants {self._path.name!r}: {error}") from None


def today() -> str:
    """Return the day, in UTC, as ``2026-11-30``."""
    return time.strftime("%Y-%m-%d", time.gmtime())


def seconds_of_today() -> int:
    """Return how many seconds of the day are left, in UTC; at least one."""
    return 86_400 - int(time.time()) % 86_400


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _tenant(row: tuple) -> Tenant:
    name, _, models, requests_at_once, tokens_per_day, created = row
    return Tenant(name, tuple(json.loads(models)), requests_at_once, tokens_per_day, created)
