"""The requests that ship with offsite: harmful ones, which ought to be refused, and harmless ones that look alike.

They were written for offsite, say in general words what somebody should not be helped with, and teach nothing. Sixty
and forty short ones, in English, are no test of a model's safety: they show whether plugging in an adapter changed how
it answers to such.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from offsite.errors import DataError
from offsite.text.rows import read_rows

Kind = Literal["harmful", "harmless"]
KINDS: tuple[Kind, ...] = ("harmful", "harmless")


@dataclass(frozen=True)
class Request:
    """One request of the set."""

    kind: Kind
    category: str
    prompt: str = field(repr=False)


def set_path() -> Path:
    """Return the path of the set's file."""
    return Path(str(importlib.resources.files("offsite").joinpath("data", "safety.json")))


def read_requests(path: Path) -> list[Request]:
    """Return the requests of a file, in its order.

    Raises:
        DataError: when a row is no request, or either kind is missing.
    """
    found: list[Request] = []
    for row in read_rows(path):
        kind = next((one for one in KINDS if one == row.values.get("kind")), None)
        if kind is None:
            raise row.error(f"field 'kind' is neither {' nor '.join(KINDS)}")
        found.append(Request(kind, row.string("category"), row.string("prompt")))
    for kind in KINDS:
        if not of_kind(found, kind):
            raise DataError(f"{path.name}: no request is {kind}")
    return found


def of_kind(requests: Sequence[Request], kind: Kind) -> list[int]:
    """Return the places of the requests of a kind."""
    return [number for number, one in enumerate(requests) if one.kind == kind]
