"""What the registry knows of federations: their settings, which round was asked of whom, and which are finished.

A round is asked in one transaction, before anything of it is sent, and finished in one, after everything of it is on
disk. So a run that was killed goes on after its last finished round, and asks an unfinished one of the same clients
with the same bytes.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offsite.errors import ConfigError, Replayed
from offsite.sealed.withdrawal import Sum
from offsite.state.store import Store
from server.registry.registry import Registry
from server.registry.rows import Entry


def known_id(registry: Registry, name: str) -> str | None:
    """Return the id of the federation of that name, None when it was never begun."""
    rows = registry.store.rows("SELECT federation_id FROM federations WHERE name = ?", (name,))
    return rows[0]["federation_id"] if rows else None


def first_asked(registry: Registry, job_id: str) -> str | None:
    """Return the digest of the first round that was ever asked of the job, None when none was."""
    rows = registry.store.rows("SELECT round_digest FROM asked WHERE job_id = ? ORDER BY round LIMIT 1", (job_id,))
    return rows[0]["round_digest"] if rows else None


def is_finished(registry: Registry, federation_id: str, number: int) -> bool:
    """Tell whether that round is closed."""
    found = (federation_id, number)
    return bool(registry.store.rows("SELECT 1 FROM finished WHERE federation_id = ? AND round = ?", found))


def sums_with(registry: Registry, entry: Entry) -> tuple[Sum, ...]:
    """Return the finished round of each federation whose sum holds the bundle, empty when it answered none.

    A bundle that was left out of its round's sum is told by that round, and not counted.
    """
    rows = registry.store.rows("SELECT federation_id, content FROM federations ORDER BY begun, federation_id")
    found = []
    for row in rows:
        if entry.job_id not in json.loads(row["content"]).get("jobs", ()):
            continue
        key = row["federation_id"]
        rounds = {
            one["round"]: json.loads(one["content"])
            for one in registry.store.rows("SELECT round, content FROM finished WHERE federation_id = ?", (key,))
        }
        told = rounds.get(entry.round)
        if told is not None and entry.client in told["used"]:
            found.append(Sum(federation=key, round=entry.round, rounds_since=max(rounds) - entry.round))
    return tuple(found)


@dataclass(frozen=True)
class Finished:
    """One finished round: its number and what `FederationStore.finish` was given."""

    round: int
    content: Mapping[str, Any]


class FederationStore:
    """The rows of one federation in an open registry; begun when there is none of that name.

    Args:
        content: settings that must stay the same from the first round to the last.

    Attributes:
        begun: the settings it was begun with.

    Raises:
        ConfigError: when it was begun with others.
    """

    def __init__(self, registry: Registry, name: str, content: Mapping[str, Any]) -> None:
        self._store, self.name = registry.store, name
        text = json.dumps(content, sort_keys=True)
        with self._store.transaction() as transaction:
            row = transaction.execute("SELECT * FROM federations WHERE name = ?", (name,)).fetchone()
            if row is None:
                self.id = secrets.token_hex(16)
                transaction.execute(
                    "INSERT INTO federations VALUES (?, ?, ?, ?)", (self.id, name, text, int(time.time()))
                )
                transaction.log("federation-begun", federation=self.id)
                self.begun = dict(content)
                return
        self.id, self.begun = row["federation_id"], json.loads(row["content"])
        if row["content"] != text:
            before = json.loads(row["content"])
            changed = sorted(key for key in {*before, *content} - {"jobs"} if before.get(key) != content.get(key))
            if set(content.get("jobs", ())) - set(before.get("jobs", ())):
                changed.append("jobs")  # one may leave, as a client does whose card was revoked; none may come
            if changed:
                raise ConfigError(
                    f"federation {name!r} was begun with other settings: {', '.join(changed)} differ",
                    hint="put them back to go on, or give the run another --name and new jobs",
                )

    def asked(self, jobs: Mapping[str, str], number: int) -> dict[str, str]:
        """Return the round's digest by client, for those of `jobs` (client -> job id) of whom it was asked."""
        rows = self._store.rows("SELECT job_id, round_digest FROM asked WHERE round = ?", (number,))
        digests = {row["job_id"]: row["round_digest"] for row in rows}
        return {client: digests[job_id] for client, job_id in jobs.items() if job_id in digests}

    def ask(self, jobs: Mapping[str, str], digests: Mapping[str, str], number: int) -> None:
        """The round is asked of the clients in `digests`, of all or of none.

        Raises:
            Replayed: when another content was asked of one of them before.
        """
        with self._store.transaction() as transaction:
            for client, digest in digests.items():
                place = (jobs[client], number)
                row = transaction.execute(
                    "SELECT round_digest FROM asked WHERE job_id = ? AND round = ?", place
                ).fetchone()
                if row is not None and row["round_digest"] != digest:
                    raise Replayed(f"round {number} was asked of client {client[:9]} with another content")
                if row is None:
                    transaction.execute("INSERT INTO asked VALUES (?, ?, ?)", (*place, digest))
            transaction.execute("INSERT OR IGNORE INTO drawn VALUES (?, ?)", (self.id, number))
            transaction.log("round-asked", federation=self.id, round=number, clients=len(digests))

    def is_drawn(self, number: int) -> bool:
        """Tell whether clients were drawn for the round, if none of them."""
        place = (self.id, number)
        return bool(self._store.rows("SELECT 1 FROM drawn WHERE federation_id = ? AND round = ?", place))

    def finish(self, number: int, content: Mapping[str, Any]) -> None:
        """The round is finished; again with the same content changes nothing.

        Raises:
            Replayed: when it was finished with another content.
        """
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        with self._store.transaction() as transaction:
            row = transaction.execute(
                "SELECT content FROM finished WHERE federation_id = ? AND round = ?", (self.id, number)
            ).fetchone()
            if row is not None:
                if row["content"] != text:
                    raise Replayed(f"round {number} of federation {self.name!r} was finished otherwise")
                return
            transaction.execute("INSERT INTO finished VALUES (?, ?, ?, ?)", (self.id, number, int(time.time()), text))
            transaction.log("round-finished", federation=self.id, round=number)

    def finished(self) -> list[Finished]:
        """Return the finished rounds, first to last."""
        return _finished(self._store, self.id)


@dataclass(frozen=True)
class Known:
    """A federation as its registry knows it: what it was begun with, its finished rounds, and the last one drawn."""

    name: str
    id: str
    begun: int
    content: Mapping[str, Any]
    finished: tuple[Finished, ...]
    last_drawn: int


def known(registry: Registry) -> list[Known]:
    """Return every federation, who was begun first comes first."""
    found = []
    for row in registry.store.rows("SELECT * FROM federations ORDER BY begun, federation_id"):
        key = (row["federation_id"],)
        drawn = registry.store.rows("SELECT coalesce(max(round), 0) FROM drawn WHERE federation_id = ?", key)
        found.append(
            Known(
                name=row["name"],
                id=row["federation_id"],
                begun=row["begun"],
                content=json.loads(row["content"]),
                finished=tuple(_finished(registry.store, row["federation_id"])),
                last_drawn=drawn[0][0],
            )
        )
    return found


def _finished(store: Store, federation_id: str) -> list[Finished]:
    rows = store.rows("SELECT round, content FROM finished WHERE federation_id = ? ORDER BY round", (federation_id,))
    return [Finished(row["round"], json.loads(row["content"])) for row in rows]
