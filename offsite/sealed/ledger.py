"""The replay ledger: what this party sealed and opened, so that nothing old, replayed or forked is taken for new.

The ledger lies in the keys folder as ``ledger.db`` with a hash-chained ``ledger.log`` and a ``ledger.head``; an older
copy of any one of them is noticed when it is opened (``offsite/state/store.py``). A whole folder turned back together
is not: nothing in it remembers more. Jobs are remembered once their sealed form was opened, or sealed, here. What was
refused for what its issuer signed counts as seen, so that an older one that was held back is not taken for new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Row
from typing import Any, Literal, Self

from offsite.artefacts.job import OpenedJob, parse_job
from offsite.errors import ArtefactError, Replayed, WrongBinding
from offsite.keys.files import check_folder
from offsite.sealed.manifest import Kind, SealedManifest
from offsite.state.store import Rows, Store, Transaction, Value

LEDGER_NAME = "ledger.db"
HEAD_NAME = "ledger.head"

_MIGRATIONS = (
    """
    CREATE TABLE jobs (job_id TEXT PRIMARY KEY, digest TEXT NOT NULL, raw BLOB NOT NULL) STRICT;
    CREATE TABLE sent (
        job_id TEXT NOT NULL REFERENCES jobs, kind TEXT NOT NULL, sequence INTEGER NOT NULL,
        round INTEGER NOT NULL, digest TEXT NOT NULL UNIQUE,
        PRIMARY KEY (job_id, kind, sequence)
    ) STRICT;
    CREATE TABLE received (
        job_id TEXT NOT NULL REFERENCES jobs, issuer TEXT NOT NULL, kind TEXT NOT NULL, sequence INTEGER NOT NULL,
        round INTEGER NOT NULL, digest TEXT NOT NULL UNIQUE,
        PRIMARY KEY (job_id, issuer, kind, sequence)
    ) STRICT
    """,
    """
    CREATE TABLE refused (
        job_id TEXT NOT NULL REFERENCES jobs, issuer TEXT NOT NULL, kind TEXT NOT NULL, sequence INTEGER NOT NULL,
        digest TEXT NOT NULL UNIQUE, PRIMARY KEY (job_id, issuer, kind, sequence)
    ) STRICT
    """,
)

Admission = Literal["new", "again"]


@dataclass
class Slot:
    """The next place in the order of what this party sealed in a job and kind; `digest` is set once it is taken."""

    sequence: int
    previous: str | None
    round: int = 0
    digest: str | None = None


class Ledger:
    """The open ledger of a keys folder; close it, or use it in a ``with`` block.

    Raises:
        ConfigError, BadKey: when there is no such folder, or others can look into it.
        Replayed: when one of the ledger's files was turned back.
        RunFailed: when it cannot be read or written.
    """

    def __init__(self, keys: Path) -> None:
        check_folder(keys)
        self._store = Store(keys / LEDGER_NAME, _MIGRATIONS, anchor=keys / HEAD_NAME, agree=_agree)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def close(self) -> None:
        """The files are closed; closing again does nothing."""
        self._store.close()

    def job(self, job_id: str) -> OpenedJob:
        """Return a job that was opened or sealed here.

        Raises:
            WrongBinding: when there is none of that id.
        """
        rows = self._store.rows("SELECT raw FROM jobs WHERE job_id = ?", [job_id])
        if not rows:
            raise WrongBinding(f"job {job_id[:12]} is not known here", hint="open the sealed job first")
        return parse_job(rows[0]["raw"])

    def remember(self, opened: OpenedJob) -> None:
        """The job is known here; remembering it again changes nothing.

        Raises:
            Replayed: when another job is known under its id.
        """
        with self._store.transaction() as transaction:
            _remember(transaction, opened)

    def last_round(self, job_id: str, kind: Kind) -> int:
        """Return the highest round of the job for which an artefact of that kind was sealed here, -1 for none."""
        rows = self._store.rows("SELECT MAX(round) AS last FROM sent WHERE job_id = ? AND kind = ?", [job_id, kind])
        return -1 if rows[0]["last"] is None else int(rows[0]["last"])

    @contextmanager
    def sending(self, job_id: str, kind: Kind) -> Iterator[Slot]:
        """Yield the next slot of the job and kind; it is taken when the block ends well and has set its digest.

        Raises:
            WrongBinding: when the job is not known here.
        """
        with self._store.transaction() as transaction:
            if not transaction.execute("SELECT 1 FROM jobs WHERE job_id = ?", [job_id]).fetchone():
                raise WrongBinding(f"job {job_id[:12]} is not known here", hint="seal or open the job first")
            last = transaction.execute(
                "SELECT sequence, digest FROM sent WHERE job_id = ? AND kind = ? ORDER BY sequence DESC LIMIT 1",
                [job_id, kind],
            ).fetchone()
            slot = Slot(last["sequence"] + 1 if last else 1, last["digest"] if last else None)
            yield slot
            if slot.digest is not None:
                values: list[Value] = [job_id, kind, slot.sequence, slot.round, slot.digest]
                transaction.execute("INSERT INTO sent VALUES (?, ?, ?, ?, ?)", values)
                transaction.log("sealed", job=job_id, kind=kind, sequence=slot.sequence, digest=slot.digest)

    def check(self, manifest: SealedManifest, digest: str) -> Admission:
        """Return whether the sealed artefact is new here or was admitted before; nothing changes.

        Raises:
            Replayed: when it is older than what was admitted, takes a place that is taken, or is no successor.
        """
        return _check(self._store.rows, manifest, digest)

    def refuse(self, manifest: SealedManifest, digest: str, error: ArtefactError) -> None:
        """The sealed artefact counts as seen here, though it was refused: an older one is no news afterwards.

        For what its issuer signed, and nobody on the way can have caused. Again, or of a job that is not known here,
        changes nothing.
        """
        place: list[Value] = [manifest.job_id, manifest.issuer, manifest.kind, manifest.sequence]
        with self._store.transaction() as transaction:
            if not transaction.execute("SELECT 1 FROM jobs WHERE job_id = ?", [manifest.job_id]).fetchone():
                return
            done = transaction.execute("INSERT OR IGNORE INTO refused VALUES (?, ?, ?, ?, ?)", [*place, digest])
            if done.rowcount:
                transaction.log("refused", job=manifest.job_id, kind=manifest.kind, sequence=manifest.sequence,
                                digest=digest, check=type(error).__name__)  # fmt: skip

    def admit(self, manifest: SealedManifest, digest: str, opened: OpenedJob | None = None) -> Admission:
        """The sealed artefact counts as received here, once: the same one again changes nothing.

        Args:
            opened: what a sealed job holds; it is remembered with it.

        Raises:
            Replayed: as `check`, or when another job is known under the job's id.
            WrongBinding: when the job is not known here and this is not one.
        """
        with self._store.transaction() as transaction:
            found = _check(lambda text, values: transaction.execute(text, values).fetchall(), manifest, digest)
            if found == "again":
                return found
            if opened is not None:
                _remember(transaction, opened)
            elif not transaction.execute("SELECT 1 FROM jobs WHERE job_id = ?", [manifest.job_id]).fetchone():
                raise WrongBinding(f"job {manifest.job_id[:12]} is not known here", hint="open the sealed job first")
            values: list[Value] = [
                manifest.job_id,
                manifest.issuer,
                manifest.kind,
                manifest.sequence,
                manifest.round,
                digest,
            ]
            transaction.execute("INSERT INTO received VALUES (?, ?, ?, ?, ?, ?)", values)
            transaction.log(
                "opened", job=manifest.job_id, kind=manifest.kind, sequence=manifest.sequence, digest=digest
            )
            return found


def _agree(lines: Iterable[Mapping[str, Any]], rows: Rows) -> None:
    """Return only if the rows are those of which the log's lines tell, no more and no fewer.

    Raises:
        Replayed: naming the table.
    """
    told: dict[str, set[str]] = {"jobs": set(), "sent": set(), "received": set(), "refused": set()}
    for line in lines:
        table = {"job": "jobs", "sealed": "sent", "opened": "received", "refused": "refused"}.get(line["event"])
        if table is not None:
            told[table].add(line["fields"]["digest"])
    for table, digests in told.items():
        if digests != {row["digest"] for row in rows(f"SELECT digest FROM {table}")}:  # noqa: S608
            raise Replayed(
                f"the ledger's table {table!r} is not what its log leads to: a file was turned back or edited",
                hint=f"put the newest copies of {LEDGER_NAME}, its log and its head back; older ones are never used",
            )


def _remember(transaction: Transaction, opened: OpenedJob) -> None:
    job_id = opened.job.job_id
    known = transaction.execute("SELECT digest FROM jobs WHERE job_id = ?", [job_id]).fetchone()
    if known is None:
        transaction.execute("INSERT INTO jobs VALUES (?, ?, ?)", [job_id, opened.digest, opened.raw])
        transaction.log("job", job=job_id, digest=opened.digest)
    elif known["digest"] != opened.digest:
        raise Replayed(
            f"job {job_id[:12]} is known here with other terms", hint="terms never change; a new job has a new id"
        )


def _check(rows: Callable[..., list[Row]], manifest: SealedManifest, digest: str) -> Admission:
    if rows("SELECT 1 FROM received WHERE digest = ?", [digest]):
        return "again"
    what, place = f"this {manifest.kind}", [manifest.job_id, manifest.issuer, manifest.kind]
    chain = "FROM received WHERE job_id = ? AND issuer = ? AND kind = ?"
    seen = f"SELECT sequence, digest {chain} UNION ALL SELECT sequence, digest {chain.replace('received', 'refused')}"
    newest = rows(
        f"SELECT * FROM ({seen}) WHERE digest <> ? ORDER BY sequence DESC LIMIT 1",  # noqa: S608
        [*place, *place, digest],
    )
    if newest:
        sequence = newest[0]["sequence"]
        if manifest.sequence < sequence:
            raise Replayed(f"{what} is number {manifest.sequence} of its issuer's, number {sequence} came before it")
        if manifest.sequence == sequence:
            raise Replayed(f"{what} is another number {sequence} than the one that came before it")
        if manifest.sequence == sequence + 1 and manifest.previous != newest[0]["digest"]:
            raise Replayed(f"{what} does not follow from number {sequence}, which came before it")
    if manifest.kind == "bundle" and rows(f"SELECT 1 {chain} AND round = ?", [*place, manifest.round]):
        raise Replayed(f"{what} is another one for round {manifest.round}, which has its bundle")
    return "new"
