"""Rows of the registry: its schema, and what a row says.

The schema's versions are only ever added to; ``offsite/state/store.py`` applies those that a database does not have.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from offsite import errors
from offsite.errors import ArtefactError, PolicyError, Replayed

if TYPE_CHECKING:
    from offsite.sealed.manifest import SealedManifest

State = Literal["received", "verified", "accepted", "plugged-in", "served", "refused", "withdrawn"]

MIGRATIONS = (
    """
CREATE TABLE models (base_digest TEXT PRIMARY KEY, registered INTEGER NOT NULL) STRICT;
CREATE TABLE packages (
    package_digest TEXT PRIMARY KEY, base_digest TEXT NOT NULL REFERENCES models, path TEXT NOT NULL,
    registered INTEGER NOT NULL
) STRICT;
CREATE TABLE clients (fingerprint TEXT PRIMARY KEY, name TEXT NOT NULL, registered INTEGER NOT NULL) STRICT;
CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY, package_digest TEXT NOT NULL REFERENCES packages, client TEXT NOT NULL REFERENCES clients,
    expires INTEGER NOT NULL, content TEXT NOT NULL
) STRICT;
CREATE TABLE bundles (
    id TEXT PRIMARY KEY, digest TEXT NOT NULL UNIQUE, job_id TEXT NOT NULL REFERENCES jobs,
    client TEXT NOT NULL REFERENCES clients, round INTEGER NOT NULL, sequence INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('received', 'verified', 'accepted', 'plugged-in', 'served', 'refused')),
    received INTEGER NOT NULL, changed INTEGER NOT NULL, reason TEXT, message TEXT,
    bundle_digest TEXT, tensors_sha256 TEXT, figures TEXT
) STRICT;
CREATE UNIQUE INDEX bundle_of_a_round ON bundles (job_id, client, round) WHERE state <> 'refused';
CREATE TABLE refusals (
    digest TEXT PRIMARY KEY, reason TEXT NOT NULL, message TEXT NOT NULL, refused INTEGER NOT NULL,
    times INTEGER NOT NULL
) STRICT
""",
    """
CREATE TABLE asked (
    job_id TEXT NOT NULL REFERENCES jobs, round INTEGER NOT NULL, round_digest TEXT NOT NULL,
    PRIMARY KEY (job_id, round)
) STRICT;
CREATE TABLE federations (
    federation_id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, content TEXT NOT NULL, begun INTEGER NOT NULL
) STRICT;
CREATE TABLE finished (
    federation_id TEXT NOT NULL REFERENCES federations, round INTEGER NOT NULL, finished INTEGER NOT NULL,
    content TEXT NOT NULL, PRIMARY KEY (federation_id, round)
) STRICT
""",
    """
CREATE TABLE drawn (
    federation_id TEXT NOT NULL REFERENCES federations, round INTEGER NOT NULL, PRIMARY KEY (federation_id, round)
) STRICT
""",
    """
CREATE TABLE ways (
    id TEXT NOT NULL REFERENCES bundles, event TEXT NOT NULL CHECK (event IN ('plugged-in', 'served')),
    way TEXT NOT NULL, spare_text TEXT NOT NULL, PRIMARY KEY (id, event, way, spare_text)
) STRICT
""",
    # SQLite changes no CHECK of a table that stands: both tables are written anew, in the order of their rows
    """
CREATE TABLE bundles_with_withdrawn (
    id TEXT PRIMARY KEY, digest TEXT NOT NULL UNIQUE, job_id TEXT NOT NULL REFERENCES jobs,
    client TEXT NOT NULL REFERENCES clients, round INTEGER NOT NULL, sequence INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (
        state IN ('received', 'verified', 'accepted', 'plugged-in', 'served', 'refused', 'withdrawn')
    ),
    received INTEGER NOT NULL, changed INTEGER NOT NULL, reason TEXT, message TEXT,
    bundle_digest TEXT, tensors_sha256 TEXT, figures TEXT
) STRICT;
CREATE TABLE ways_of_them (
    id TEXT NOT NULL REFERENCES bundles_with_withdrawn,
    event TEXT NOT NULL CHECK (event IN ('plugged-in', 'served')),
    way TEXT NOT NULL, spare_text TEXT NOT NULL, PRIMARY KEY (id, event, way, spare_text)
) STRICT;
INSERT INTO bundles_with_withdrawn SELECT * FROM bundles ORDER BY rowid;
INSERT INTO ways_of_them SELECT * FROM ways ORDER BY rowid;
DROP TABLE ways;
DROP TABLE bundles;
ALTER TABLE bundles_with_withdrawn RENAME TO bundles;
ALTER TABLE ways_of_them RENAME TO ways;
CREATE UNIQUE INDEX bundle_of_a_round ON bundles (job_id, client, round) WHERE state <> 'refused'
""",
)


@dataclass(frozen=True)
class Verdict:
    """What became of a sealed bundle.

    Attributes:
        reason_class: the check that refused it, an error of ``offsite/errors.py``; `error` is that error.
        is_again: it was known before, and nothing was done.
        is_final: the same digest gets the same answer for ever. A refusal that may come from the way here, or from
            what had come before, is not: the digest is checked anew when it comes again.
    """

    id: str
    digest: str
    state: State
    reason_class: str | None = None
    message: str = ""
    is_again: bool = False
    is_final: bool = False
    error: ArtefactError | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Entry:
    """One bundle's row. The digests and figures are None until it is verified; the times are Unix seconds."""

    id: str
    digest: str
    job_id: str
    client: str
    round: int
    sequence: int
    state: State
    received: int
    changed: int
    reason: str | None
    message: str | None
    bundle_digest: str | None
    tensors_sha256: str | None
    figures: str | None


@dataclass(frozen=True)
class Seen:
    """What is known of a job when a sealed bundle arrives: who holds its round, and the newest sequence number.

    The newest counts also when it was refused, by the owner or for what its client signed: what was held back on the
    way is no news afterwards. A refusal that the way here may have caused leaves no row, and counts for nothing.
    """

    holder: str | None
    newest: int


def check_unseen(manifest: SealedManifest, digest: str, seen: Seen) -> None:
    """Return only if nothing else holds the round that the manifest claims, and nothing newer of the job has come.

    Raises:
        Replayed: naming what was seen.
    """
    if seen.holder is not None and seen.holder != digest:
        raise Replayed(
            f"round {manifest.round} of job {manifest.job_id[:12]} is taken by {seen.holder[:19]}",
            hint="hand in the next round",
        )
    if seen.holder is None and manifest.sequence <= seen.newest:
        raise Replayed(
            f"sequence number {manifest.sequence} of job {manifest.job_id[:12]} is not newer than {seen.newest}",
            hint="seal the bundle anew",
        )


def short_id(digest: str) -> str:
    """Return the id of the bundle of that sealed digest."""
    return digest.removeprefix("sha256:")[:16]


def refusal(reason: str, message: str) -> ArtefactError:
    """Return the error that a refusal was recorded with."""
    found = getattr(errors, reason, None)
    if isinstance(found, type) and issubclass(found, ArtefactError):
        return found(message)
    return ArtefactError(message)


def withdrawn(bundle_id: str) -> PolicyError:
    """Return the error for whoever would use a bundle that its owner took out again."""
    return PolicyError(f"bundle {bundle_id} was withdrawn", hint="offsite registry list says what stands")


def entry_of(row: sqlite3.Row) -> Entry:
    """Return what a row of ``bundles`` says."""
    return Entry(**dict(row))


def seen_by(find: Callable[[str, tuple[str | int, ...]], list[sqlite3.Row]], manifest: SealedManifest) -> Seen:
    """Return what the rows that `find` finds say of the round and the sequence that the manifest claims."""
    whose = (manifest.job_id, manifest.issuer)
    ours = "FROM bundles WHERE job_id = ? AND client = ?"
    holder = find(f"SELECT digest {ours} AND state <> 'refused' AND round = ?", (*whose, manifest.round))
    newest = find(f"SELECT coalesce(max(sequence), 0) {ours}", whose)
    return Seen(holder[0][0] if holder else None, int(newest[0][0]))
