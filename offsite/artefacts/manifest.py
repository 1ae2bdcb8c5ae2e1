"""``offsite.json``: the manifest of an artefact, which binds exactly the files beside it by size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError

from offsite.artefacts.known import KnownFiles, clock_ns
from offsite.digests import DIGEST_PATTERN, sha256_bytes, sha256_file
from offsite.errors import ArtefactError, BadDigest, BadSchema, WrongBinding, WrongNames
from offsite.folders import kind_of, listed, names_in, opened_plain, read_plain, with_article
from offsite.strictjson import Strict
from offsite.tensors import no_duplicates

MANIFEST_NAME = "offsite.json"
_WHOLE = "copy the folder again, whole and with nothing added"
MANIFEST_LIMIT_BYTES = 32 * 2**20


class FileEntry(Strict):
    """Size in bytes and SHA-256 of one file of the artefact."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=DIGEST_PATTERN)


Manifest = TypeVar("Manifest", bound=Strict)


def read_manifest(folder: Path, cls: type[Manifest], format_name: str) -> tuple[Manifest, str]:
    """Return the manifest of the artefact in `folder` and the digest of its bytes.

    Raises:
        ArtefactError: when there is no such folder or no manifest in it.
        TooLarge: when the manifest is over `MANIFEST_LIMIT_BYTES`.
        WrongBinding: when it states another format or version than `format_name`.
        BadSchema: when it is not a JSON object of the form of `cls`, each key once.
    """
    path = folder / MANIFEST_NAME
    kind = format_name.split("/")[1]
    noun = "adapted folder" if kind == "adapted" else kind
    if not folder.is_dir():
        raise ArtefactError(f"no {kind} folder named {folder.name!r}", hint="check the path")
    if path.is_symlink() or not path.is_file():
        looks = kind_of(folder)
        raise ArtefactError(
            f"folder {folder.name!r} holds no {MANIFEST_NAME}" + ("" if looks is None else f": it is {looks}"),
            hint=f"open it first: offsite open {shlex.quote(folder.name)} -o NEW-FOLDER"
            if looks and "sealed" in looks
            else f"name {with_article(noun)} that offsite wrote",
        )
    raw = read_plain(path, MANIFEST_LIMIT_BYTES, f"{MANIFEST_NAME} of {folder.name!r}")
    try:
        stated = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError):
        raise BadSchema(f"{MANIFEST_NAME} of {folder.name!r} is not JSON with distinct keys") from None
    found = stated.get("format") if isinstance(stated, dict) else None
    if found != format_name:
        shown = found if isinstance(found, str) and re.fullmatch(r"[a-z/0-9-]{1,40}", found) else "another format"
        if shown.startswith("offsite/") and (looks := kind_of(folder)) and not shown.startswith(f"offsite/{kind}/"):
            raise WrongBinding(
                f"{folder.name!r} is {looks}, expected {with_article(noun)}",
                hint="check the order of the folders named",
            )
        raise WrongBinding(f"{folder.name!r} is {shown}, expected {format_name}")
    try:
        return cls.model_validate_json(raw), sha256_bytes(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ascii(".".join(str(part) for part in first["loc"])[:120])  # the key may be the sender's own
        raise BadSchema(f"{MANIFEST_NAME} of {folder.name!r}: {where}: {first['msg'].lower()}") from None


def write_manifest(folder: Path, manifest: Strict) -> str:
    """Write the manifest with sorted keys and return the digest of its bytes."""
    raw = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"
    (folder / MANIFEST_NAME).write_bytes(raw)
    return sha256_bytes(raw)


def entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Return size and digest of each named file in `folder`."""
    return {
        name: FileEntry(bytes=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
        for name in sorted(names)
    }


def check_files(
    folder: Path, files: Mapping[str, FileEntry], allowed: re.Pattern[str], known: KnownFiles | None = None
) -> None:
    """Return only if the folder holds exactly the manifest and the files it binds, byte for byte.

    Args:
        known: files hashed here before, which are not read again while they are unchanged; what is read is noted there.

    Raises:
        WrongNames: when a stated name is not of the allowed form, or a file is missing, foreign or not a plain file.
        BadDigest: when a file's size or SHA-256 is not the stated one.
    """
    for name in files:
        if not allowed.fullmatch(name):
            raise WrongNames(f"{MANIFEST_NAME} of {folder.name!r} binds a file name that an artefact may not hold")
    present = names_in(folder) - {MANIFEST_NAME}
    missing, extra = sorted(files.keys() - present), sorted(present - files.keys())
    if missing or extra:
        what = f"file {missing[0]!r} is missing" if missing else f"the manifest does not bind {listed(extra)}"
        raise WrongNames(f"{folder.name!r}: {what}", hint=_WHOLE)
    for name, entry in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise WrongNames(f"{folder.name!r}: {name!r} is not a plain file")
        with opened_plain(path) as handle, open(handle, "rb", closefd=False) as file:
            size, found = os.fstat(handle).st_size, None if known is None else known.digest(handle)
            if found is None:
                began_ns = clock_ns()
                found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
                if known is not None:
                    known.note(handle, found, began_ns)
        if size != entry.bytes:
            raise BadDigest(f"{folder.name!r}: {name!r} has {size} bytes, the manifest says {entry.bytes}", hint=_WHOLE)
        if found != entry.sha256:
            raise BadDigest(f"{folder.name!r}: SHA-256 of {name!r} is not the one the manifest states")
