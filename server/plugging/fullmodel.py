"""Where the full model of an adapted folder is: by what name others may know it, and where it lies on this machine.

An adapted folder travels, so it says no more than a name and a digest. A folder's place is noted in a file beside it,
``ADAPTED.base.json``, which stays; and who has neither says where the model is.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offsite.errors import ConfigError
from offsite.staging import staged_file

NOTE_LIMIT_BYTES = 2**16

Kind = Literal["name", "folder"]


@dataclass(frozen=True)
class FullModel:
    """What the full model is called: a hub id or a fetched name, or the last part of its folder's path."""

    name: str
    kind: Kind = "name"
    folder: Path | None = None

    @property
    def is_hub_id(self) -> bool:
        """Whether others can fetch it by its name."""
        return self.kind == "name" and self.name.count("/") == 1


def called(model: str) -> FullModel:
    """Return what the model that was given as a folder, a hub id or a fetched name is called."""
    if Path(model).is_dir():
        folder = Path(model).resolve()
        return FullModel(folder.name or "model", "folder", folder)
    return FullModel(model)


def note_path(adapted: Path) -> Path:
    """Return where the note of the adapted folder at `adapted` stands: ``ADAPTED.base.json``."""
    whole = Path(os.path.normpath(adapted.absolute()))
    return whole.parent / f"{whole.name}.base.json"


def remember(adapted: Path, model: FullModel, digest: str) -> None:
    """The note beside the adapted folder says where the full model lies; without a folder there is nothing to note.

    Raises:
        RunFailed: when it cannot be written.
    """
    path = note_path(adapted)
    if model.folder is None:
        path.unlink(missing_ok=True)
        return
    with staged_file(path, replace=True) as stage:
        stage.write_text(json.dumps({"base": str(model.folder), "base_digest": digest}) + "\n", encoding="utf-8")
        stage.chmod(0o600)


def found(adapted: Path, *, base: str, kind: Kind, digest: str) -> str:
    """Return the folder or name under which the full model is to be loaded; that it is the right one is not looked at.

    Args:
        adapted: the adapted folder; a model's folder is looked for where its note says, or another note beside it of
            the same digest, then beside it.
        base: the model's name, from the manifest. Older ones hold a path, which is taken as it is.

    Raises:
        ConfigError: when there is no such folder; says how to name one.
    """
    if kind == "name":
        return base
    name = Path(base).name
    own = note_path(adapted)
    notes = [own, *sorted(set(own.parent.glob("*.base.json")) - {own})]  # a folder may have been renamed
    for place in (*(_noted(note, digest) for note in notes), own.parent / name):
        if place is not None and (place / "config.json").is_file():
            return str(place)
    raise ConfigError(
        f"the full model {name!r} of adapter {adapted.name!r} is not here; its digest is {digest[:19]}",
        hint="name its folder with --base",
    )


def _noted(path: Path, digest: str) -> Path | None:
    try:
        if path.stat().st_size > NOTE_LIMIT_BYTES:
            return None
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # a note that is gone or spoilt is no note
    if not isinstance(stated, dict) or stated.get("base_digest") != digest or not isinstance(stated.get("base"), str):
        return None
    return Path(stated["base"])
