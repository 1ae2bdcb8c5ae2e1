"""Folders that somebody else may have filled: what lies in them, told by name, and plain files read once.

File managers leave files of their own wherever a person looked (`is_dropping`). These are overlooked, and neither
sealed nor copied. Anything else that does not belong is an error, which names it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from offsite.errors import TooLarge, WrongNames

_DROPPINGS = frozenset(
    ".ds_store .localized .directory .apdisk .spotlight-v100 .trashes .fseventsd .temporaryitems __macosx thumbs.db "
    "ehthumbs.db ehthumbs_vista.db desktop.ini @eadir".split()
)
_SHOWN = 3
_PEEK_BYTES = 64 * 2**10
_SEALED = {"manifest.json", "signatures.json", "keys.json"}
_FORMAT = re.compile(r'"format"\s*:\s*"offsite/(adapted|bundle|package|round)/[0-9]{1,6}"')


def is_dropping(name: str) -> bool:
    """Tell whether a file manager made the file or folder of that name: of macOS, Windows, KDE or a network disk."""
    return name.lower() in _DROPPINGS or name.startswith("._")


def names_in(folder: Path) -> set[str]:
    """Return the names in a folder, without what file managers left."""
    return {name for name in (path.name for path in folder.iterdir()) if not is_dropping(name)}


def listed(names: Iterable[str]) -> str:
    """Return the first few names in printable ASCII, and how many there are beyond."""
    found = sorted(names)
    shown = ", ".join(ascii(name[:80]) for name in found[:_SHOWN])
    return shown if len(found) <= _SHOWN else f"{shown} and {len(found) - _SHOWN} more"


def kind_of(folder: Path) -> str | None:
    """Return in words what a folder looks like, by names and one field; None when like nothing of offsite's.

    For hints only: nothing is checked.
    """
    try:
        names = names_in(folder)
        if names >= _SEALED:
            return _sealed_kind(folder)
        if "offsite.json" in names:
            with opened_plain(folder / "offsite.json") as handle:
                found = _FORMAT.search(os.read(handle, _PEEK_BYTES).decode("utf-8", "replace"))
            return None if found is None else with_article(found[1] + (" folder" if found[1] == "adapted" else ""))
    except (OSError, WrongNames):
        return None
    for name, kind in (
        ("job.json", "a job"),
        ("registry.id", "a registry"),
        ("trust.json", "a keys folder"),
        ("card.json", "a keys folder"),
        ("results.json", "a folder of results"),
        ("report.json", "a report"),
    ):
        if name in names:
            return kind
    return "a model" if "config.json" in names else None


def _sealed_kind(folder: Path) -> str:
    try:
        stated = json.loads(read_plain(folder / "manifest.json", 2**20, "manifest.json"))
        kind = stated["kind"] if isinstance(stated, dict) else None
    except (OSError, ValueError, RecursionError, KeyError, WrongNames, TooLarge):
        kind = None
    known = isinstance(kind, str) and kind in ("job", "package", "round", "note", "bundle", "report")
    return f"a sealed {kind}" if known else "a sealed folder"


def with_article(noun: str) -> str:
    """Return the noun with a or an before it."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


@contextmanager
def opened_plain(path: Path | str, *, dir_fd: int | None = None, alone: bool = False) -> Iterator[int]:
    """Yield the handle of a plain file, opened once: no link is followed, no pipe or device waited for.

    Args:
        dir_fd: the open folder that a relative `path` is in.
        alone: refuse a file that has another name elsewhere, too.

    Raises:
        WrongNames: when it is anything else.
    """
    shown = ascii(Path(path).name[:80])
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, dir_fd=dir_fd)
    except OSError:
        raise WrongNames(f"{shown} is not a plain file that can be read") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or (alone and found.st_nlink != 1):
            raise WrongNames(f"{shown} is not a plain file of its own", hint="copy the folder, without links")
        yield handle
    finally:
        os.close(handle)


def read_plain(path: Path, limit_bytes: int, what: str) -> bytes:
    """Return the bytes of a plain file, opened and read once.

    Raises:
        WrongNames: when it is a link, a pipe, a device or a folder.
        TooLarge: when it is over `limit_bytes`, naming `what`.
    """
    with opened_plain(path) as handle:
        return read_all(handle, limit_bytes, what)


def read_own(path: Path, limit_bytes: int) -> bytes:
    """Return the bytes of a file that this machine's user named, who may have named a link.

    Raises:
        TooLarge: when it is over `limit_bytes`.
    """
    with path.open("rb") as handle:
        return read_all(handle.fileno(), limit_bytes, path.name)


def read_all(handle: int, limit_bytes: int, what: str) -> bytes:
    """Return what is left in an open file.

    Raises:
        TooLarge: when it is over `limit_bytes`, naming `what`.
    """
    pieces, left = [], limit_bytes + 1
    while left and (piece := os.read(handle, left)):
        pieces.append(piece)
        left -= len(piece)
    if not left:
        raise TooLarge(f"{what}: over {limit_bytes} bytes")
    return b"".join(pieces)
