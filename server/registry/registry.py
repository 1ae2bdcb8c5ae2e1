"""The registry: the owner's models, packages, clients, jobs and bundles, and what became of each bundle.

A bundle goes received -> verified -> accepted -> plugged-in -> served, or is refused, or once accepted is withdrawn
(``server/plugging/withdraw.py``). Every step is one transaction
with its line in the log (``offsite/state/store.py``), and taking a step again changes nothing. One bundle that is not
refused may stand for a job, client and round, and a digest stands for one bundle for ever: that is the replay ledger.

The folder holds ``registry.db`` and ``registry.log``; ``registry.id``, after which the head in the keys folder is
named; ``bundles/ID/``, the plain files of what was verified; ``incoming/``, what is being verified; ``rounds/DIGEST/``
and ``federations/ID/``, what federations ask and what came of it. No folder of a bundle in ``incoming/``, and none in
``bundles/`` without its row, outlives the next opening; what has any other name is left alone, and a part that is a
link to somewhere else is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from offsite.artefacts.job import Job
from offsite.artefacts.known import KnownFiles
from offsite.errors import ArtefactError, BadSchema, ConfigError, PolicyError, Replayed, RunFailed, WrongBinding
from offsite.keys.files import check_folder
from offsite.staging import leftovers, remove, staged_file
from offsite.state.chain import Head
from offsite.state.store import Store, Transaction
from server.registry.config import ID_PATTERN, WORD_PATTERN
from server.registry.history import STANDING, agree, told_states
from server.registry.rows import (
    MIGRATIONS,
    Entry,
    Seen,
    State,
    Verdict,
    check_unseen,
    entry_of,
    refusal,
    seen_by,
    short_id,
    withdrawn,
)

if TYPE_CHECKING:
    from offsite.sealed.manifest import SealedManifest

_PATH: tuple[State, ...] = ("received", "verified", "accepted", "plugged-in", "served")
_MAX_REFUSALS = 10_000
_PARTS = ("bundles", "incoming", "rounds")
_LATER_PARTS = ("exchange", "federations", "notes", "outbox")


class Registry:
    """An open registry; safe to share between threads and processes.

    Made by `Registry.open`.
    """

    def __init__(self, folder: Path, store: Store, hashed: Path) -> None:
        self.folder, self._store, self._hashed = folder, store, hashed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def open(cls, folder: Path, keys_folder: Path, *, create: bool = False) -> Self:
        """Return the registry in `folder`, with whatever an interrupted intake left removed.

        Args:
            keys_folder: where its head is kept.
            create: begin one when there is none.

        Raises:
            ConfigError: when there is no registry, or no keys folder, or a part of the registry is a link.
            Replayed: when the database, its log or its head was turned back.
            RunFailed: when the disk fails.
        """
        if not keys_folder.is_dir():
            check_folder(keys_folder)  # refuses it
        if not create and not (folder / "registry.id").is_file():
            raise ConfigError(f"{folder.name!r} is no registry", hint="offsite job create makes one: --registry DIR")
        for part in (*_PARTS, *_LATER_PARTS):
            if (folder / part).is_symlink():
                raise ConfigError(
                    f"{part!r} of registry {folder.name!r} is a link, expected a folder of its own",
                    hint="move the whole registry to the bigger disk, or mount that disk there",
                )
        try:
            for path in (folder, *(folder / part for part in _PARTS)):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = _registry_id(folder)
        except OSError as error:
            raise RunFailed(f"cannot use registry {folder.name!r}: {(error.strerror or 'i/o error').lower()}") from None
        anchor = keys_folder / f"registry-{name}.head"
        store = Store(folder / "registry.db", MIGRATIONS, anchor=anchor, agree=agree)
        registry = cls(folder, store, anchor.with_suffix(".hashed"))
        try:
            registry.collect()
        except OSError as error:
            registry.close()
            raise RunFailed(f"cannot use registry {folder.name!r}: {(error.strerror or 'i/o error').lower()}") from None
        except BaseException:
            registry.close()
            raise
        return registry

    def close(self) -> None:
        """The registry is closed."""
        self._store.close()

    # --- what is registered before a bundle can come

    def add_job(self, job: Job, *, package: Path, client_name: str, now: int | None = None) -> None:
        """The job is known, and with it its base model, package and client; again changes nothing.

        Args:
            package: the package's folder, where its tensors and its owner's record are found later.

        Raises:
            Replayed: when another job has that id.
        """
        content, now = job.model_dump_json(), _now(now)
        with self._store.transaction() as transaction:
            row = transaction.execute("SELECT content FROM jobs WHERE job_id = ?", (job.job_id,)).fetchone()
            if row is not None:
                if row["content"] != content:
                    raise Replayed(f"job {job.job_id[:12]} is registered with other terms")
                return
            put = transaction.execute
            put("INSERT INTO models VALUES (?, ?) ON CONFLICT DO NOTHING", (job.base_digest, now))
            put(
                "INSERT INTO packages VALUES (?, ?, ?, ?)"
                " ON CONFLICT (package_digest) DO UPDATE SET path = excluded.path",
                (job.package_digest, job.base_digest, str(package.resolve()), now),
            )
            put("INSERT INTO clients VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (job.client, client_name, now))
            put(
                "INSERT INTO jobs VALUES (?, ?, ?, ?, ?)",
                (job.job_id, job.package_digest, job.client, job.expires, content),
            )
            transaction.log("job", job=job.job_id, client=job.client, package=job.package_digest, rounds=job.rounds)

    def job(self, job_id: str) -> Job:
        """Return the job of that id.

        Raises:
            WrongBinding: when it is not known here.
        """
        rows = self._store.rows("SELECT content FROM jobs WHERE job_id = ?", (job_id,))
        if not rows:
            raise WrongBinding(f"job {job_id[:12]} is not known to this registry", hint="offsite job create makes jobs")
        return Job.model_validate_json(rows[0]["content"])

    def jobs_of(self, client: str) -> list[Job]:
        """Return the jobs of that client, the one that ends last first."""
        rows = self._store.rows("SELECT content FROM jobs WHERE client = ? ORDER BY expires DESC, job_id", (client,))
        return [Job.model_validate_json(row["content"]) for row in rows]

    def client_names(self) -> dict[str, str]:
        """Return what every client calls itself, by its fingerprint; who was registered first comes first."""
        rows = self._store.rows("SELECT fingerprint, name FROM clients ORDER BY registered, rowid")
        return {row["fingerprint"]: row["name"] for row in rows}

    def asked(self, job_id: str, number: int) -> str | None:
        """Return the digest of the federation's round that was asked of the job, which its bundle must bind, or None.

        Without one, a bundle of that round must bind none.
        """
        rows = self._store.rows("SELECT round_digest FROM asked WHERE job_id = ? AND round = ?", (job_id, number))
        return rows[0]["round_digest"] if rows else None

    def round_folder(self, round_digest: str) -> Path:
        """Return where the plain files of a federation's round are, for as long as it may be answered."""
        return self.folder / "rounds" / round_digest.removeprefix("sha256:")

    @property
    def store(self) -> Store:
        """The database and its log, for tables that other modules keep (``server/registry/federations.py``)."""
        return self._store

    def package_path(self, package_digest: str) -> Path:
        """Return where the package stood when its last job was made.

        Raises:
            WrongBinding: when no job was made for it.
        """
        rows = self._store.rows("SELECT path FROM packages WHERE package_digest = ?", (package_digest,))
        if not rows:
            raise WrongBinding(f"package {package_digest[:19]} is not known to this registry")
        return Path(rows[0]["path"])

    def known_files(self, *, trusted: bool = True) -> KnownFiles:
        """Return the packages' files that were hashed here; the list is in the keys folder, beside the head.

        Args:
            trusted: believe it; otherwise all is hashed anew.
        """
        return KnownFiles(self._hashed, trusted=trusted)

    def packages(self) -> dict[str, Path]:
        """Return where each package stood when its last job was made, by its digest; the first registered first."""
        rows = self._store.rows("SELECT package_digest, path FROM packages ORDER BY registered, rowid")
        return {row["package_digest"]: Path(row["path"]) for row in rows}

    def jobs(self) -> list[Job]:
        """Return all jobs, the one that ends last first."""
        rows = self._store.rows("SELECT content FROM jobs ORDER BY expires DESC, job_id")
        return [Job.model_validate_json(row["content"]) for row in rows]

    # --- bundles

    def verdict(self, digest: str) -> Verdict | None:
        """Return what became of the sealed bundle of that digest, or None when it never came."""
        for row in self._store.rows("SELECT * FROM bundles WHERE digest = ?", (digest,)):
            reason, message = row["reason"], row["message"] or ""
            is_final = row["state"] != "received"
            error = refusal(reason, message) if reason else None
            return Verdict(row["id"], digest, row["state"], reason, message, True, is_final, error)
        for row in self._store.rows("SELECT * FROM refusals WHERE digest = ?", (digest,)):
            reason, message = row["reason"], row["message"]
            return Verdict(short_id(digest), digest, "refused", reason, message, True, False, refusal(reason, message))
        return None

    def entry(self, bundle_id: str) -> Entry:
        """Return the row of the bundle of that id.

        Raises:
            ConfigError: when the id has another form or is not known.
        """
        if not re.fullmatch(ID_PATTERN, bundle_id):
            raise ConfigError(
                f"{bundle_id[:40]!r} is no id of a bundle: 16 hex digits",
                hint="four first digits do, or latest: offsite registry list",
            )
        rows = self._store.rows("SELECT * FROM bundles WHERE id = ?", (bundle_id,))
        if not rows:
            raise ConfigError(f"no bundle {bundle_id} in registry {self.folder.name!r}", hint="offsite registry list")
        return entry_of(rows[0])

    def named(self, word: str) -> Entry:
        """Return the row of the bundle that a person means: by its id, by four or more first digits, or ``latest``.

        Raises:
            ConfigError: when there is none, or several begin so.
        """
        if re.fullmatch(ID_PATTERN, word) or not re.fullmatch(WORD_PATTERN, word):
            return self.entry(word)
        rows = self.entries()
        found = rows[-1:] if word == "latest" else [entry for entry in rows if entry.id.startswith(word)]
        if not found:
            what = "is empty" if word == "latest" else f"holds no bundle whose id begins with {word}"
            raise ConfigError(f"registry {self.folder.name!r} {what}", hint="offsite registry list")
        if len(found) > 1:
            raise ConfigError(f"{len(found)} bundles have ids that begin with {word}", hint="give more of its digits")
        return found[0]

    def entries(self) -> list[Entry]:
        """Return the rows of all bundles, oldest first."""
        return [entry_of(row) for row in self._store.rows("SELECT * FROM bundles ORDER BY received, rowid")]

    def seen(self, manifest: SealedManifest) -> Seen:
        """Return what is known of the round and the sequence that the manifest claims."""
        return seen_by(self._store.rows, manifest)

    def receive(self, manifest: SealedManifest, digest: str, *, now: int | None = None) -> None:
        """The bundle is known as received and holds its round.

        Raises:
            Replayed: when another holds the round, or a newer one of the job was received, whatever became of it.
        """
        now = _now(now)
        with self._store.transaction() as transaction:
            check_unseen(manifest, digest, seen_by(lambda *query: transaction.execute(*query).fetchall(), manifest))
            if transaction.execute("SELECT 1 FROM bundles WHERE id = ?", (short_id(digest),)).fetchone():
                raise Replayed(f"another bundle has the id {short_id(digest)}")
            transaction.execute(
                "INSERT INTO bundles (id, digest, job_id, client, round, sequence, state, received, changed)"
                " VALUES (?, ?, ?, ?, ?, ?, 'received', ?, ?)",
                (
                    short_id(digest), digest, manifest.job_id, manifest.issuer, manifest.round, manifest.sequence,
                    now, now,
                ),
            )  # fmt: skip
            transaction.execute("DELETE FROM refusals WHERE digest = ?", (digest,))
            transaction.log("received", digest=digest, job=manifest.job_id, round=manifest.round)

    def forget(self, digest: str) -> None:
        """A bundle that was received and never verified is not known, and its round is free."""
        with self._store.transaction() as transaction:
            gone = transaction.execute("DELETE FROM bundles WHERE digest = ? AND state = 'received'", (digest,))
            if gone.rowcount:
                transaction.log("forgotten", digest=digest)

    def verified(
        self,
        digest: str,
        *,
        bundle_digest: str,
        tensors_sha256: str,
        figures: dict[str, object],
        now: int | None = None,
    ) -> None:
        """The bundle is known as verified, with the digests of its plain files."""
        with self._store.transaction() as transaction:
            done = transaction.execute(
                "UPDATE bundles SET state = 'verified', changed = ?, bundle_digest = ?, tensors_sha256 = ?, figures = ?"
                " WHERE digest = ? AND state = 'received'",
                (_now(now), bundle_digest, tensors_sha256, json.dumps(figures, sort_keys=True), digest),
            )
            if done.rowcount:  # otherwise the owner has refused it meanwhile
                transaction.log("verified", digest=digest, bundle=bundle_digest)

    def note_refusal(self, digest: str, error: ArtefactError, *, is_final: bool, now: int | None = None) -> None:
        """The refusal is in the registry and in the log.

        Args:
            is_final: it follows from what the client signed, so the same digest is refused for ever. Otherwise it
                may come from the way here: the digest is checked anew when it comes again.
        """
        reason, message, now = type(error).__name__, str(error)[:500], _now(now)
        with self._store.transaction() as transaction:
            if is_final:
                transaction.execute(
                    "UPDATE bundles SET state = 'refused', changed = ?, reason = ?, message = ? WHERE digest = ?",
                    (now, reason, message, digest),
                )
            else:
                transaction.execute("DELETE FROM bundles WHERE digest = ? AND state = 'received'", (digest,))
                transaction.execute(
                    "INSERT INTO refusals VALUES (?, ?, ?, ?, 1) ON CONFLICT (digest) DO UPDATE SET"
                    " reason = excluded.reason, message = excluded.message, refused = excluded.refused,"
                    " times = times + 1",
                    (digest, reason, message, now),
                )
                transaction.execute(
                    "DELETE FROM refusals WHERE rowid IN"
                    " (SELECT rowid FROM refusals ORDER BY refused DESC, rowid DESC LIMIT -1 OFFSET ?)",
                    (_MAX_REFUSALS,),
                )
            transaction.log("refused", digest=digest, check=reason)

    def advance(self, bundle_id: str, to: State, *, now: int | None = None) -> Entry:
        """The bundle is in state `to`; one that is there, or further, is left as it is.

        Raises:
            ConfigError: when there is no such bundle.
            ArtefactError: with its class, when it was refused.
            PolicyError: when a state before `to` was left out, or it was withdrawn.
        """
        entry = self.entry(bundle_id)
        with self._store.transaction() as transaction:
            state: State = transaction.execute("SELECT state FROM bundles WHERE id = ?", (bundle_id,)).fetchone()[0]
            if state == "refused":
                raise refusal(entry.reason or "ArtefactError", entry.message or f"bundle {bundle_id} was refused")
            if state == "withdrawn":
                raise withdrawn(bundle_id)
            if _PATH.index(state) + 1 == _PATH.index(to):
                self._set(transaction, entry, to, _now(now))
            elif _PATH.index(state) < _PATH.index(to):
                before = _PATH[_PATH.index(to) - 1]
                raise PolicyError(
                    f"bundle {bundle_id} is {state}, {before} comes first",
                    hint=f"offsite registry accept {bundle_id}" if before == "accepted" else "offsite registry list",
                )
        return self.entry(bundle_id)

    def note_way(self, bundle_id: str, event: Literal["plugged-in", "served"], way: str, spare_text: str = "") -> None:
        """It is known in which way the bundle was plugged in or served last; again in that way changes nothing.

        Args:
            way: as its word says it (``server/plugging/ways.py``).
            spare_text: digest of the public text where directions were spared.

        Raises:
            ConfigError: when there is no such bundle.
        """
        entry = self.entry(bundle_id)
        if (way, spare_text) in self.ways(bundle_id, event)[-1:]:
            return
        with self._store.transaction() as transaction:
            transaction.execute(
                "DELETE FROM ways WHERE id = ? AND event = ? AND way = ? AND spare_text = ?",
                (bundle_id, event, way, spare_text),
            )
            transaction.execute("INSERT INTO ways VALUES (?, ?, ?, ?)", (bundle_id, event, way, spare_text))
            transaction.log("way", digest=entry.digest, of=event, way=way, spare_text=spare_text)

    def ways(self, bundle_id: str, event: Literal["plugged-in", "served"]) -> list[tuple[str, str]]:
        """Return the ways in which the bundle was plugged in or served, the latest last, each with what text it spares.

        None is known of what was plugged in before ways were noted.
        """
        rows = self._store.rows(
            "SELECT way, spare_text FROM ways WHERE id = ? AND event = ? ORDER BY rowid", (bundle_id, event)
        )
        return [(row["way"], row["spare_text"]) for row in rows]

    def refuse(self, bundle_id: str, *, now: int | None = None) -> Entry:
        """The bundle is refused for good and its files are gone; its round is free for another.

        Raises:
            ConfigError: when there is no such bundle.
            PolicyError: when it is plugged in already or was withdrawn, or a plugging in is under way.
        """
        entry = self.entry(bundle_id)
        with self._not_plugging_in(bundle_id), self._store.transaction() as transaction:
            state = transaction.execute("SELECT state FROM bundles WHERE id = ?", (bundle_id,)).fetchone()[0]
            if state in ("plugged-in", "served"):
                raise PolicyError(f"bundle {bundle_id} is {state}", hint=f"offsite withdraw {bundle_id}")
            if state == "withdrawn":
                raise withdrawn(bundle_id)
            if state != "refused":
                transaction.execute(
                    "UPDATE bundles SET reason = 'PolicyError', message = 'refused by the owner' WHERE id = ?",
                    (bundle_id,),
                )
                self._set(transaction, entry, "refused", _now(now))
        shutil.rmtree(self.bundle_folder(bundle_id), ignore_errors=True)
        return self.entry(bundle_id)

    def withdraw(self, bundle_id: str, *, now: int | None = None) -> Entry:
        """The bundle is withdrawn and its files are gone; its round stays taken. Again changes nothing.

        Raises:
            ConfigError: when there is no such bundle.
            ArtefactError: with its class, when it was refused.
            PolicyError: when it was not accepted yet, or a plugging in is under way.
        """
        entry = self.entry(bundle_id)
        with self._not_plugging_in(bundle_id), self._store.transaction() as transaction:
            state = transaction.execute("SELECT state FROM bundles WHERE id = ?", (bundle_id,)).fetchone()[0]
            if state == "refused":
                raise refusal(entry.reason or "ArtefactError", entry.message or f"bundle {bundle_id} was refused")
            if state in ("received", "verified"):
                hint = f"offsite registry refuse {bundle_id}"
                raise PolicyError(f"bundle {bundle_id} is {state}, there is nothing to take out again", hint=hint)
            if state != "withdrawn":
                self._set(transaction, entry, "withdrawn", _now(now))
        shutil.rmtree(self.bundle_folder(bundle_id), ignore_errors=True)
        return self.entry(bundle_id)

    @contextmanager
    def _not_plugging_in(self, bundle_id: str) -> Iterator[None]:
        with self.one_plug_in(wait=False) as mine:
            if not mine:
                raise PolicyError(
                    f"bundle {bundle_id} may be the one that is being plugged in", hint="wait until it is"
                )
            yield

    def bundle_folder(self, bundle_id: str) -> Path:
        """Return where the plain files of a verified bundle are."""
        return self.folder / "bundles" / bundle_id

    def _set(self, transaction: Transaction, entry: Entry, to: State, now: int) -> None:
        transaction.execute("UPDATE bundles SET state = ?, changed = ? WHERE id = ?", (to, now, entry.id))
        transaction.log(to, digest=entry.digest)

    def refusals(self) -> list[Verdict]:
        """Return what was refused on arrival and may come again, newest first."""
        rows = self._store.rows("SELECT * FROM refusals ORDER BY refused DESC, rowid DESC LIMIT 100")
        return [
            Verdict(short_id(row["digest"]), row["digest"], "refused", row["reason"], row["message"]) for row in rows
        ]

    # --- log, and what a crash leaves

    def log(self, event: str, **fields: object) -> None:
        """One line more is in the log."""
        with self._store.transaction() as transaction:
            transaction.log(event, **fields)

    def verify_log(self) -> Head:
        """Return the log's head once every line follows from the one before, and the rows from them all.

        Raises:
            BadDigest: naming the first line that does not.
            Replayed: when the rows are others.
        """
        self._store.verify_log()
        return self._store.head

    def one_intake(self, *, wait: bool = True) -> AbstractContextManager[bool]:
        """One intake at a time, of all threads and processes, so that memory and disk stay bounded.

        Yields whether it is this one's turn, which with `wait` it always is.
        """
        return self._turn("intake.lock", wait)

    def one_plug_in(self, *, wait: bool = True) -> AbstractContextManager[bool]:
        """One plugging in at a time, during which nothing is refused; yields as `one_intake`."""
        return self._turn("plug-in.lock", wait)

    def one_federation(self) -> AbstractContextManager[bool]:
        """One run of a federation at a time; yields as `one_intake`."""
        return self._turn("federation.lock", wait=False)

    @contextmanager
    def _turn(self, name: str, wait: bool) -> Iterator[bool]:
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(handle)

    def collect(self) -> None:
        """What an interrupted intake or refusal left is gone, unless an intake is under way."""
        with self.one_intake(wait=False) as mine:
            if mine:
                self.collect_locked()

    def collect_locked(self) -> None:
        """As `collect`, for whoever holds `one_intake`."""
        incoming = [path for path in (self.folder / "incoming").iterdir() if re.fullmatch(ID_PATTERN, path.name)]
        for path in (*incoming, *leftovers(self.folder / "registry.id")):
            remove(path)
        for row in self._store.rows("SELECT digest FROM bundles WHERE state = 'received'"):
            self.forget(row["digest"])
        standing = "SELECT id FROM bundles WHERE state NOT IN ('refused', 'withdrawn')"
        kept = {row["id"] for row in self._store.rows(standing)}
        found = [path for path in (self.folder / "bundles").iterdir() if re.fullmatch(ID_PATTERN, path.name)]
        if left := [path for path in found if path.name not in kept]:
            self._require_unverified(left)
            for path in left:
                remove(path)

    def _require_unverified(self, folders: Sequence[Path]) -> None:
        """Return only if the log calls none of these bundles verified and not refused since.

        Raises:
            Replayed: when it does: the rows that know of them are lost.
        """
        told = {short_id(digest): states for digest, states in told_states(self._store.lines()).items()}
        for path in folders:
            if told.get(path.name, frozenset()) & STANDING:
                raise Replayed(
                    f"registry {self.folder.name!r} has lost the row of bundle {path.name}, which its log calls"
                    " verified; nothing was deleted",
                    hint="put the newest copies of registry.db, registry.log and its head back",
                )


def _now(now: int | None) -> int:
    return int(time.time()) if now is None else now


def _registry_id(folder: Path) -> str:
    """Return the name that a registry is given once, and by which its head is found.

    Raises:
        Replayed: when the folder holds a registry without one.
    """
    path = folder / "registry.id"
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if not path.exists():
            if any((folder / name).exists() for name in ("registry.db", "registry.db-wal", "registry.log")):
                raise Replayed(f"registry {folder.name!r} has lost its registry.id", hint="put a copy of it back")
            with staged_file(path) as stage:
                stage.write_text(secrets.token_hex(16) + "\n", encoding="ascii")
        with path.open("rb") as file:
            found = file.read(64).decode("ascii", "replace").strip()
    finally:
        os.close(handle)
    if not re.fullmatch(r"[0-9a-f]{32}", found):
        raise BadSchema(f"registry.id of {folder.name!r} is damaged", hint="put a copy of it back")
    return found
