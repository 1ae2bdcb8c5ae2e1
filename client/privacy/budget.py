"""The privacy budget ledger: what tuning has spent of each data set's budget, kept by the client and nobody else.

A run is charged in full before its first step; resuming it charges nothing more. Runs that share a record share a
budget: their privacy loss on it adds up, whatever else is in the files. The budget is set by the first run and can only
be lowered. A bundle is recorded before it is written, and a run has one: other weights need another run. A bundle that
is the mean of several runs is each one's: all of them are charged, and all of them released with it.

The folder holds ``budget.db`` with its hash-chained ``budget.log`` (`offsite.state.store`), and ``key``. Records are
known by digests under that key, so the ledger tells nobody what is in the data: one of a record as it stands, and one
of what it says (`offsite.text.fold`), so that a space more, another case or another Unicode form is no new record. Its
head stands beside the folder; an older copy of the ledger is refused. A ledger and head that were both deleted are
gone: nothing can remember for them. Nor can it see that two texts mean the same: a record in other words, in another
order, or cut in two, is a new one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Row
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from offsite.audits.accounting import Mechanism, pld_epsilon
from offsite.errors import ConfigError, PolicyError, Replayed, RunFailed
from offsite.staging import fsync
from offsite.state.store import Rows, Store
from offsite.text.fold import said
from offsite.text.records import Record

if TYPE_CHECKING:
    from client.privacy.dpsgd import Guarantee

_KEY_BYTES = 32
_AT_ONCE = 500
_ROUNDING = 1e-9
_MIGRATIONS = (
    """
    CREATE TABLE runs (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, place TEXT NOT NULL, settings TEXT NOT NULL,
        data TEXT NOT NULL, unit TEXT NOT NULL, rows_per_user INTEGER,
        sigma REAL NOT NULL, rate REAL NOT NULL, steps INTEGER NOT NULL, delta REAL NOT NULL,
        budget REAL NOT NULL, weights TEXT,
        num_resumes INTEGER NOT NULL DEFAULT 0, num_releases INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE keyed (one INTEGER PRIMARY KEY CHECK (one = 1), proof BLOB NOT NULL) STRICT;
    CREATE TABLE members (
        record BLOB NOT NULL, run INTEGER NOT NULL REFERENCES runs, PRIMARY KEY (record, run)
    ) STRICT, WITHOUT ROWID
    """,
)


@dataclass(frozen=True)
class Account:
    """Where a data set stands: over all runs that share a record with it, at the smallest of their deltas."""

    run: str
    data: str
    epsilon_total: float
    delta_total: float
    budget: float
    num_runs: int
    num_resumes: int
    num_releases: int


class Members(NamedTuple):
    """Keyed digests of records and users, sorted, each once: as they stand, and of what they say."""

    exact: list[bytes]
    folded: list[bytes]

    @property
    def all(self) -> list[bytes]:
        """Either kind: the ledgers of earlier versions hold the first alone."""
        return sorted({*self.exact, *self.folded})


@dataclass(frozen=True)
class Charged:
    """A run as it was charged: its id, the digest of its settings, what it draws and adds, and its delta."""

    run: str
    settings: str
    mechanism: Mechanism
    delta: float
    is_released: bool


class BudgetLedger:
    """The open ledger of a folder, made if there is none; close it, or use it in a ``with`` block.

    Raises:
        ConfigError: when the folder's key is not a key, or others can read it.
        Replayed: when one of the ledger's files was turned back.
        RunFailed: when the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder = folder.expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._key = _read_key(folder / "key")
        except OSError as error:
            raise RunFailed(f"cannot use ledger {folder.name!r}: {(error.strerror or 'i/o error').lower()}") from None
        anchor = folder.parent / f"{folder.name}.head"
        self._store = Store(folder / "budget.db", _MIGRATIONS, anchor=anchor, agree=_agree)
        try:
            self._require_key()
        except BaseException:
            self._store.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def members(self, records: Iterable[Record], *, users: Iterable[str] = ()) -> Members:
        """Return the keyed digests of records and users."""
        exact, folded = set[bytes](), set[bytes]()
        for record in records:
            exact.add(self._digest("record", json.dumps(record.content)))
            folded |= self._folded("said", record.whole_text)
        for user in users:
            exact.add(self._digest("user", user))
            folded |= self._folded("said-user", user)
        return Members(sorted(exact), sorted(folded))

    def _folded(self, label: str, text: str) -> set[bytes]:
        """Return the digest of what a text says; none where it says nothing, as others do too."""
        what = said(text)
        return {self._digest(label, what)} if what else set()

    def place(self, work: Path) -> str:
        """Return the keyed digest of where a run's checkpoints are, by which a resumed run is known."""
        return self._digest("place", str(work.resolve())).hex()

    def newest(self, place: str) -> Charged | None:
        """Return the newest run in that place; none when there was none."""
        rows = self._store.rows("SELECT * FROM runs WHERE place = ? ORDER BY number DESC LIMIT 1", (place,))
        return Charged(rows[0]["id"], rows[0]["settings"], _mechanism(rows[0]), rows[0]["delta"],
                       rows[0]["weights"] is not None) if rows else None  # fmt: skip

    def resumed(self, run: str) -> Account:
        """The run was resumed once more; it costs nothing. Returns where its data set stands.

        Raises:
            PolicyError: when the data set is past its budget.
        """
        with self._store.transaction() as transaction:
            transaction.execute("UPDATE runs SET num_resumes = num_resumes + 1 WHERE id = ?", (run,))
            transaction.log("resumed", run=run)
        return self._within(run)

    def charge(
        self,
        members: Members,
        guarantee: Guarantee,
        *,
        place: str,
        settings: str,
        budget: float | None,
        num_to_come: int = 0,
    ) -> Account:
        """A new run is in the ledger, all of its steps spent. Returns where its data set stands.

        Args:
            budget: most epsilon for all runs on this data; none leaves it as it was, or sets this run's own.
            num_to_come: further runs like this one that the budget must have room for, or nothing is charged; they are
                charged when they begin. A budget that this run sets holds them too.

        Raises:
            PolicyError: when the data set would be past its budget, when the budget was to be raised, or when earlier
                runs counted another unit; nothing is charged then.
        """
        mechanism, delta = guarantee.mechanism, guarantee.spent.delta
        in_all = mechanism._replace(steps=mechanism.steps * (1 + num_to_come))
        data = self._digest("data", b"".join(members.exact).hex()).hex()
        while True:
            linked = self._linked(members.all)
            _require_unit(linked, guarantee.unit)
            earlier = min((row["budget"] for row in linked), default=None)
            if earlier is not None and budget is not None and budget > earlier:
                raise PolicyError(
                    f"--dp: budget {budget:g}, an earlier run on this data set {earlier:g}",
                    hint="a budget is set by the first run and can only be lowered",
                )
            delta_total = min(delta, *(row["delta"] for row in linked), 1.0)
            total = pld_epsilon([in_all, *map(_mechanism, linked)], delta_total)
            limit = budget if budget is not None else earlier if earlier is not None else total
            _require_within(total, limit, len(linked), "nothing was trained")
            with self._store.transaction() as transaction:
                if [row["id"] for row in self._linked(members.all)] != [row["id"] for row in linked]:
                    continue  # somebody else's run came in between
                run = secrets.token_hex(16)
                cursor = transaction.execute(
                    "INSERT INTO runs"
                    " (id, place, settings, data, unit, rows_per_user, sigma, rate, steps, delta, budget)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (run, place, settings, data, guarantee.unit, guarantee.rows_per_user, *mechanism, delta, limit),
                )
                for member in members.all:
                    transaction.execute("INSERT INTO members VALUES (?, ?)", (member, cursor.lastrowid))
                transaction.log("charged", run=run, data=data, sigma=mechanism.sigma, rate=mechanism.rate,
                                steps=mechanism.steps, delta=delta, budget=limit)  # fmt: skip
            return self.account(run)

    def release(self, run: str, weights: str) -> Account:
        """The run's weights, by their digest, may leave; done again with the same ones it is counted again.

        Raises:
            PolicyError: when the data set is past its budget, or other weights of this run were released.
        """
        self._within(run)
        with self._store.transaction() as transaction:
            row = self._row(run)
            if row["weights"] not in (None, weights):
                raise PolicyError(
                    "other weights of this run were released already, and it was charged once",
                    hint="tune again without --resume, as a run of its own",
                )
            transaction.execute(
                "UPDATE runs SET weights = ?, num_releases = num_releases + 1 WHERE id = ?", (weights, run)
            )
            transaction.log("released", run=run, weights=weights)
        return self.account(run)

    def account(self, run: str) -> Account:
        """Return where the data set of a run stands."""
        row = self._row(run)
        found = self._store.rows("SELECT record FROM members WHERE run = ?", (row["number"],))
        linked = self._linked([item["record"] for item in found])
        delta = min(other["delta"] for other in linked)
        return Account(
            run=run,
            data=row["data"],
            epsilon_total=pld_epsilon(map(_mechanism, linked), delta),
            delta_total=delta,
            budget=min(other["budget"] for other in linked),
            num_runs=len(linked),
            num_resumes=sum(other["num_resumes"] for other in linked),
            num_releases=sum(other["num_releases"] for other in linked),
        )

    def _within(self, run: str) -> Account:
        found = self.account(run)
        _require_within(found.epsilon_total, found.budget, found.num_runs - 1, "nothing is released")
        return found

    def _row(self, run: str) -> Row:
        rows = self._store.rows("SELECT * FROM runs WHERE id = ?", (run,))
        if not rows:
            raise PolicyError("this run is not in the ledger", hint="tune again without --resume")
        return rows[0]

    def _linked(self, members: Sequence[bytes]) -> list[Row]:
        """Return the runs that share a record or user with `members`, oldest first."""
        numbers: set[int] = set()
        for first in range(0, len(members), _AT_ONCE):
            part = members[first : first + _AT_ONCE]
            marks = ", ".join("?" * len(part))
            found = self._store.rows(f"SELECT DISTINCT run FROM members WHERE record IN ({marks})", part)  # noqa: S608
            numbers |= {row["run"] for row in found}
        return [row for row in self._store.rows("SELECT * FROM runs ORDER BY number") if row["number"] in numbers]

    def _require_key(self) -> None:
        """Return only if the ledger's digests were made with the key that lies beside it."""
        proof = self._digest("key", "proof")
        with self._store.transaction() as transaction:
            rows = self._store.rows("SELECT proof FROM keyed")
            if not rows:
                transaction.execute("INSERT INTO keyed VALUES (1, ?)", (proof,))
                transaction.log("began")
            elif rows[0]["proof"] != proof:
                raise PolicyError(
                    "the budget ledger was kept with another key: it would not know its data again",
                    hint="put the file 'key' back that was in its folder",
                )

    def _digest(self, label: str, text: str) -> bytes:
        message = f"offsite/v1/budget-{label}\0{text}".encode()
        return hmac.new(self._key, message, hashlib.sha256).digest()[:16]


def _agree(lines: Iterable[Mapping[str, Any]], rows: Rows) -> None:
    """Return only if the runs are those of which the log's lines tell, as often resumed and released.

    Raises:
        Replayed: when they are others.
    """
    told: dict[str, list[Any]] = {}
    for line in lines:
        event, fields = line["event"], line["fields"]
        if event == "charged":
            told[fields["run"]] = [fields["budget"], 0, 0, None]
        elif event == "resumed" and fields["run"] in told:
            told[fields["run"]][1] += 1
        elif event == "released":
            run = told.setdefault(fields["run"], [None, 0, 0, None])  # of no charge: no row is like that
            run[2:] = [run[2] + 1, fields["weights"]]
    found = rows("SELECT id, budget, num_resumes, num_releases, weights FROM runs")
    if told != {row["id"]: list(tuple(row)[1:]) for row in found}:
        raise Replayed(
            "the budget ledger's runs are not what its log leads to: a file was turned back or edited",
            hint="put the newest copies of budget.db, its log and its head back; older ones are never used",
        )


def _mechanism(row: Row) -> Mechanism:
    return Mechanism(row["sigma"], row["rate"], row["steps"])


def _require_unit(linked: Sequence[Row], unit: str) -> None:
    for row in linked:
        if row["unit"] != unit:
            raise PolicyError(
                f"--dp: an earlier run on this data set counted per {row['unit']}, this one counts per {unit}",
                hint="what was spent per example and per user does not add up; keep to the first run's unit",
            )


def _require_within(total: float, budget: float, num_earlier: int, consequence: str) -> None:
    if total > budget * (1 + _ROUNDING):
        with_earlier = f" with {num_earlier} earlier run(s)" if num_earlier else ""
        raise PolicyError(
            f"--dp: epsilon {total:.4g}{with_earlier}, the budget of this data set is {budget:.4g}",
            hint=f"{consequence}; use a smaller epsilon, or other data",
        )


def _read_key(path: Path) -> bytes:
    """Return the key, made first if there is none; it appears whole, and never takes the place of another."""
    if not path.exists():
        stage = path.with_name(f".key.{secrets.token_hex(4)}.partial")
        stage.touch(mode=0o600)
        stage.write_bytes(os.urandom(_KEY_BYTES))
        fsync(stage)
        with suppress(FileExistsError):
            os.link(stage, path)
        stage.unlink()
        fsync(path.parent)
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            "the budget ledger's key can be read by others", hint="chmod 600 the file 'key' in its folder"
        )
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"the budget ledger's key has {len(key)} bytes, expected {_KEY_BYTES}")
    return key
