"""What the registry's log says became of each bundle, and whether the rows say the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from offsite.errors import Replayed
from offsite.state.store import Rows

STANDING = frozenset({"verified", "accepted", "plugged-in", "served"})
"""States in which the files of a bundle are kept."""


def told_states(lines: Iterable[Mapping[str, Any]]) -> dict[str, frozenset[str | None]]:
    """Return by sealed digest the states that a bundle may be in after these lines of the log; None is no row.

    A refusal on arrival leaves a row or none, and its line does not say which.
    """
    told: dict[str, frozenset[str | None]] = {}
    for line in lines:
        event, digest = line["event"], line["fields"].get("digest")
        if event == "refused" and "check" in line["fields"]:
            if digest is not None:
                told[digest] = frozenset({None, "refused"} if digest in told else {None})
        elif event == "forgotten":
            told[digest] = frozenset({None})
        elif event in STANDING | {"received", "refused", "withdrawn"}:
            told[digest] = frozenset({event})
    return told


def agree(lines: Iterable[Mapping[str, Any]], rows: Rows) -> None:
    """Return only if every job, bundle, federation and finished round is as the log's lines say, and no other is there.

    Raises:
        Replayed: naming what differs first.
    """
    known = list(lines)
    told = told_states(known)
    found = {row["digest"]: row["state"] for row in rows("SELECT digest, state FROM bundles")}
    for digest in told.keys() | found.keys():
        if found.get(digest) not in told.get(digest, frozenset({None})):
            raise _differ(f"bundle {digest[:19]} is {found.get(digest, 'unknown')}")
    for event, key, table, column in (
        ("job", "job", "jobs", "job_id"),
        ("federation-begun", "federation", "federations", "federation_id"),
    ):
        stated = {line["fields"].get(key) for line in known if line["event"] == event}
        if stated != {row[0] for row in rows(f"SELECT {column} FROM {table}")}:  # noqa: S608
            raise _differ(f"its {table} are others")
    rounds = [line["fields"] for line in known if line["event"] == "round-finished"]
    stated_rounds = {(fields["federation"], fields["round"]) for fields in rounds}
    if stated_rounds != {tuple(row) for row in rows("SELECT federation_id, round FROM finished")}:
        raise _differ("its finished rounds are others")


def _differ(what: str) -> Replayed:
    return Replayed(
        f"the registry's rows are not what its log leads to: {what}",
        hint="put the newest copies of registry.db, registry.log and its head back; older ones are never used",
    )
