"""A hash-chained log, as `offsite.state.store` writes it: a JSON object a line, with the SHA-256 of the line before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from offsite.digests import DIGEST_PATTERN, sha256_bytes
from offsite.errors import BadDigest, RunFailed
from offsite.strictjson import Strict

LINE_LIMIT_BYTES = 64 * 1024
GENESIS = sha256_bytes(b"offsite/v1/log")
"""What the first line follows from."""


class Head(Strict):
    """The newest line of a log: how many there are, and the SHA-256 of the last."""

    number: int = Field(ge=0)
    hash: str = Field(pattern=DIGEST_PATTERN)


def verify_log(path: Path) -> int:
    """Return how many lines the log at `path` has once each of them follows from the one before.

    That it ends where the database does is for `Store.verify_log` to say.

    Raises:
        BadDigest: naming the first line that does not.
    """
    return read_chain(path).number


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the log's lines as objects, oldest first, unchecked."""
    if path.exists():
        with path.open("rb") as handle:
            for line in handle:
                yield json.loads(line)


def read_chain(path: Path) -> Head:
    """Return the newest line of the log at `path` once each of them follows from the one before.

    Raises:
        BadDigest: naming the first line that does not.
    """
    number, previous = 0, GENESIS
    if not path.exists():
        return Head(number=0, hash=GENESIS)
    with path.open("rb") as handle:
        while raw := handle.readline(LINE_LIMIT_BYTES + 1):
            number += 1
            if not follows(raw, number, previous):
                raise BadDigest(
                    f"line {number} of {path.name} does not follow from the one before",
                    hint="the log was edited; compare it with a copy kept elsewhere",
                )
            previous = sha256_bytes(raw)
    return Head(number=number, hash=previous)


def follows(raw: bytes, number: int, previous: str) -> bool:
    """Tell whether `raw` is line `number` of a log, after the one with the hash `previous`, in its one form."""
    try:
        found = json.loads(raw)
        return (
            isinstance(found, dict)
            and set(found) - {"rows"} == {"number", "time", "event", "fields", "previous"}
            and found["number"] == number
            and found["previous"] == previous
            and isinstance(found["fields"], dict)
            and raw == write_line(number, found["time"], found["event"], found["fields"], previous, found.get("rows"))
        )
    except (ValueError, RecursionError, RunFailed):  # no JSON, a NaN in it, or longer in the form it should have
        return False


def write_line(
    number: int, when: int, event: str, fields: dict[str, object], previous: str, rows: str | None = None
) -> bytes:
    """Return a line of a log.

    Args:
        rows: digest that stands for all rows of the database after the transaction that this line ends.

    Raises:
        RunFailed: when it would be longer than a reader reads.
    """
    content = {"number": number, "time": when, "event": event, "fields": fields, "previous": previous}
    if rows is not None:
        content["rows"] = rows
    line = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
    if len(line) > LINE_LIMIT_BYTES:
        raise RunFailed(f"{event!a} would be a log line of {len(line)} bytes, limit {LINE_LIMIT_BYTES}")
    return line
