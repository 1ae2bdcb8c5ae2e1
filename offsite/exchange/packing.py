"""A sealed folder as named bytes, for transports that carry arrays instead of folders; and back, trusting no name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from offsite.errors import TooLarge, WrongNames
from offsite.sealed.folder import KEYS_FILE, MANIFEST_FILE, PAYLOAD, SIGNATURES_FILE
from offsite.sealed.manifest import MAX_FILES
from offsite.staging import staged_folder

RAW = "offsite/raw"
"""How Flower's arrays say that their data are a file's bytes as they are: nobody's array format is read on arrival."""

_SMALL = (MANIFEST_FILE, SIGNATURES_FILE, KEYS_FILE)
_PAYLOAD_NAME = re.compile(rf"{PAYLOAD}/([0-9a-f]{{64}}\.enc)")


def pack(folder: Path) -> dict[str, bytes]:
    """Return the files of the sealed folder by name: the three small ones, and each of the payload."""
    parts = {name: (folder / name).read_bytes() for name in _SMALL}
    for path in sorted((folder / PAYLOAD).iterdir()):
        parts[f"{PAYLOAD}/{path.name}"] = path.read_bytes()
    return parts


def unpack(parts: Mapping[str, bytes], out: Path, *, limit_bytes: int) -> None:
    """Write the sealed folder `out`, whole or not at all; what it holds is not looked at.

    Raises:
        WrongNames: when a name is none of a sealed folder's, or one of the three small files is missing.
        TooLarge: when all of it together is over `limit_bytes`.
        ConfigError: when `out` exists.
    """
    if len(parts) > MAX_FILES + len(_SMALL) or not set(_SMALL) <= parts.keys():
        raise WrongNames("a sealed folder's small files are not all there, or there are too many files")
    if sum(map(len, parts.values())) > limit_bytes:
        raise TooLarge(f"what arrived is over {limit_bytes} bytes")
    names = {name: _PAYLOAD_NAME.fullmatch(name) for name in parts if name not in _SMALL}
    if not all(names.values()):
        raise WrongNames("what arrived holds a file that a sealed folder does not hold")
    with staged_folder(out) as stage:
        (stage / PAYLOAD).mkdir()
        for name, data in parts.items():
            (stage / name).write_bytes(data)
