"""What is inspected, by whose keys parties are named, and the reading of its small files."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from offsite.errors import ArtefactError, RunFailed, TooLarge, WrongNames
from offsite.inspection.words import shown
from offsite.keys.files import read_private
from offsite.keys.identity import CARD_LIMIT_BYTES, CARD_NAME, PublicKeys, read_card
from offsite.keys.trust import TrustStore

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Names:
    """How parties are called: by fingerprint, and by pinned name where there is a keys folder."""

    def __init__(self, keys: Path | None) -> None:
        self.keys = keys

    @cached_property
    def store(self) -> TrustStore | None:
        """The pinned cards; None without a keys folder.

        Raises:
            ConfigError, BadKey: when the folder is missing or open to others.
        """
        return None if self.keys is None else TrustStore(self.keys)

    @cached_property
    def own(self) -> PublicKeys | None:
        """The card of these keys; None without a keys folder.

        Raises:
            BadKey: when it is missing, open to others or malformed.
        """
        if self.keys is None or self.store is None:
            return None
        return read_card(read_private(self.keys / CARD_NAME, CARD_LIMIT_BYTES, what="card"))

    @cached_property
    def _known(self) -> dict[str, str]:
        if self.store is None or self.own is None:
            return {}
        found = {}
        for peer in self.store.peers():
            revoked = ", revoked" if peer.revoked is not None else ""
            found[peer.keys.fingerprint] = f"{peer.keys.name}, pinned here{revoked}"
        return {**found, self.own.fingerprint: f"{self.own.name}, these keys"}

    def told(self, fingerprint: str) -> str:
        """Return the fingerprint, and who that is here."""
        if self.keys is None:
            return fingerprint
        return f"{fingerprint} ({self._known.get(fingerprint, 'not pinned here')})"


@dataclass(frozen=True)
class Thing:
    """A file or folder to show.

    Attributes:
        now: seconds since 1970.
        tensors: whether every tensor is listed.
    """

    path: Path
    names: Names
    now: int
    tensors: bool = False

    @property
    def name(self) -> str:
        """Its name, fit for a terminal."""
        return name_of(self.path)


def name_of(path: Path) -> str:
    """Return the last part of a path, fit for a terminal; of ``.`` the name of the folder that it is."""
    return shown(Path(os.path.normpath(path.absolute())).name, 120)


def read_plain(path: Path, limit_bytes: int) -> bytes:
    """Return the bytes of a plain file, never through a link.

    Raises:
        ArtefactError: when there is none.
        WrongNames: when it is a link, a pipe, a device or a folder.
        TooLarge: when it is over the limit.
        RunFailed: when the disk does not give its bytes.
    """
    name = name_of(path)
    try:
        handle = os.open(path, _OPEN)
    except FileNotFoundError:
        raise ArtefactError(f"no file or folder named {name!r}", hint="check the path") from None
    except OSError:
        raise WrongNames(f"{name!r} is not a plain file that can be read") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise WrongNames(f"{name!r} is not a plain file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            raw = file.read(limit_bytes + 1) if found.st_size <= limit_bytes else None
    except OSError as error:
        raise RunFailed(f"cannot read {name!r}: {(error.strerror or 'i/o error').lower()}") from None
    finally:
        os.close(handle)
    if raw is None or len(raw) > limit_bytes:
        raise TooLarge(f"{name!r}: over {limit_bytes:,} bytes")
    return raw
