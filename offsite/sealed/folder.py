"""A sealed folder on disk: ``manifest.json``, ``signatures.json``, ``keys.json`` and ``payload/<SHA-256>.enc``.

Reading trusts no name in it: every file is opened once, by its name inside an open folder, never through a link, never
waiting on a pipe; what was measured is what is read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from offsite.errors import ArtefactError, BadDigest, RunFailed, TooLarge, WrongBinding, WrongNames, WrongRecipient
from offsite.folders import is_dropping, kind_of, listed, opened_plain, read_all
from offsite.sealed.manifest import (
    MAX_FILES,
    SEALED_MANIFEST_LIMIT_BYTES,
    SIGNATURES_LIMIT_BYTES,
    Kind,
    SealedManifest,
    sealed_digest,
)
from offsite.sealed.recipients import KEYS_LIMIT_BYTES, read_keys
from offsite.strictjson import parse_strict

MANIFEST_FILE, SIGNATURES_FILE, KEYS_FILE, PAYLOAD = "manifest.json", "signatures.json", "keys.json", "payload"
BUFFER_BYTES = 2**20

_LIMITS = {
    MANIFEST_FILE: SEALED_MANIFEST_LIMIT_BYTES,
    SIGNATURES_FILE: SIGNATURES_LIMIT_BYTES,
    KEYS_FILE: KEYS_LIMIT_BYTES,
}
_WHOLE = "copy the folder again, whole and with nothing added"
_PAYLOAD_NAME = re.compile(r"[0-9a-f]{64}\.enc")


@dataclass(frozen=True)
class RawSealed:
    """The three small files of a sealed folder, as received and unchecked but for their size."""

    manifest_raw: bytes
    signatures_raw: bytes
    keys_raw: bytes

    @property
    def digest(self) -> str:
        """The digest that stands for the whole sealed artefact."""
        return sealed_digest(self.manifest_raw)


def read_sealed(path: Path) -> RawSealed:
    """Return the three small files of the sealed folder; the payload's names are looked at, nothing of it is read.

    Raises:
        ArtefactError: when there is no such folder.
        WrongNames: when anything is missing or foreign, or is a link, a pipe or a device.
        TooLarge: when one of the three is over its limit.
        RunFailed: when the disk does not give its bytes.
    """
    with _readable(path.name), opened_folder(path) as folder:
        found, expected = names_in(folder), {*_LIMITS, PAYLOAD}
        if missing := sorted(expected - found):
            kind = kind_of(path)
            if kind is not None and not kind.startswith("a sealed"):
                raise WrongNames(f"{path.name!r} is {kind}, not sealed", hint="use it as it is; offsite seal seals it")
            raise WrongNames(
                f"{path.name!r}: {missing[0]!r} is missing", hint="is it a folder that offsite seal wrote?"
            )
        if extra := found - expected:
            raise WrongNames(f"{path.name!r}: a sealed folder does not hold {listed(extra)}", hint=_WHOLE)
        with opened_payload(folder, path.name) as payload:
            if extra := {name for name in names_in(payload) if not _PAYLOAD_NAME.fullmatch(name)}:
                raise WrongNames(
                    f"{path.name!r}: {PAYLOAD} of a sealed folder does not hold {listed(extra)}", hint=_WHOLE
                )
        return RawSealed(
            *(_read_small(folder, name, path.name) for name in (MANIFEST_FILE, SIGNATURES_FILE, KEYS_FILE))
        )


def require_recipient(raw: RawSealed, own: str, *, kind: Kind | None = None, verb: str = "") -> None:
    """Return only if a sealed folder says that it is for key `own`, and of the one kind that a verb takes.

    Nothing is verified: for refusing early, and for the true reason, what would be refused afterwards for another.

    Raises:
        WrongBinding: when it says that it is of another kind.
        WrongRecipient: naming whom it says that it is for.
    """
    try:
        manifest = parse_strict(raw.manifest_raw, SealedManifest, "manifest.json", {})
        wrapped = {wrap.recipient for wrap in read_keys(raw.keys_raw).wraps}
    except ArtefactError:
        return  # what is wrong with it is for the checks to say
    if kind is not None and manifest.kind != kind:
        raise WrongBinding(f"this is a sealed {manifest.kind}, {verb} takes {kind}s", hint="offsite open opens it")
    if own not in {*wrapped, *manifest.recipients}:
        named = ", ".join(sorted(fingerprint[:9] for fingerprint in manifest.recipients))
        raise WrongRecipient(
            f"this {manifest.kind} is sealed for another key, {named}, not for {own[:9]}",
            hint="is --keys the folder it was meant for?",
        )


def check_payload(path: Path, manifest: SealedManifest) -> None:
    """Return only if the encrypted files are exactly those the manifest lists, byte for byte; nothing is decrypted.

    Raises:
        WrongNames, BadDigest: as `decrypt_files`.
    """
    with _readable(path.name), opened_folder(path) as folder, opened_payload(folder, path.name) as payload:
        check_listed(payload, manifest)
        for file in manifest.files:
            with opened_file(payload, file.payload_name, file.sealed_bytes) as source:
                found = hashlib.sha256()
                while piece := os.read(source, BUFFER_BYTES):
                    found.update(piece)
                if found.hexdigest() != file.sealed_sha256.removeprefix("sha256:"):
                    raise BadDigest(f"{file.name!r}: SHA-256 of its encrypted file is not the signed one")


def check_listed(payload: int, manifest: SealedManifest) -> None:
    """Return only if the open payload folder holds just the manifest's files, by name.

    Raises:
        WrongNames: saying how many are missing and how many foreign.
    """
    found, expected = names_in(payload), {file.payload_name for file in manifest.files}
    if found != expected:
        what = f"{len(expected - found)} missing, {len(found - expected)} foreign"
        named = f": {listed(found - expected or expected - found)}"
        raise WrongNames(f"the {PAYLOAD} folder is not what the manifest lists: {what}{named}", hint=_WHOLE)


def copy_sealed(path: Path, raw: RawSealed, manifest: SealedManifest, out: Path) -> None:
    """The existing folder `out` holds the sealed folder, byte for byte as the manifest lists it, and nothing else.

    Each encrypted file is opened once: what is hashed is what is written.

    Raises:
        WrongNames, BadDigest: as `decrypt_files`.
    """
    (out / PAYLOAD).mkdir()
    with _readable(path.name), opened_folder(path) as folder, opened_payload(folder, path.name) as payload:
        check_listed(payload, manifest)
        for file in manifest.files:
            with (
                opened_file(payload, file.payload_name, file.sealed_bytes) as source,
                (out / PAYLOAD / file.payload_name).open("xb") as target,
            ):
                found = hashlib.sha256()
                while piece := os.read(source, BUFFER_BYTES):
                    found.update(piece)
                    target.write(piece)
            if found.hexdigest() != file.sealed_sha256.removeprefix("sha256:"):
                raise BadDigest(f"{file.name!r}: SHA-256 of its encrypted file is not the signed one")
    for name, content in zip(_LIMITS, (raw.manifest_raw, raw.signatures_raw, raw.keys_raw), strict=True):
        (out / name).write_bytes(content)


def names_in(folder: int) -> set[str]:
    """Return the names in an open folder, without what file managers left.

    Raises:
        WrongNames: when there are more than any sealed folder holds; the rest are not looked at.
    """
    with os.scandir(folder) as found:
        names = {entry.name for entry in islice(found, MAX_FILES + 1)}
    if len(names) > MAX_FILES:
        raise WrongNames(f"a folder with more than {MAX_FILES} files is not a sealed one")
    return {name for name in names if not is_dropping(name)}


@contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """Yield the handle of a folder.

    Raises:
        ArtefactError: when there is none.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        raise ArtefactError(f"no sealed folder named {path.name!r}", hint="check the path") from None
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def opened_payload(folder: int, shown: str) -> Iterator[int]:
    """Yield the handle of the payload folder inside an open sealed folder.

    Raises:
        WrongNames: when it is not a plain folder.
    """
    try:
        handle = os.open(PAYLOAD, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        raise WrongNames(f"{shown!r}: {PAYLOAD!r} is not a plain folder") from None
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def opened_file(folder: int, name: str, num_bytes: int | None = None) -> Iterator[int]:
    """Yield the handle of a plain file in an open folder.

    Raises:
        WrongNames: when it is a link, a pipe, a device, or a file that has another name elsewhere.
        BadDigest: when it does not have `num_bytes`.
    """
    with opened_plain(name, dir_fd=folder, alone=True) as handle:
        size = os.fstat(handle).st_size
        if num_bytes is not None and size != num_bytes:
            raise BadDigest(f"{name!r} has {size} bytes, the manifest says {num_bytes}", hint=_WHOLE)
        yield handle


@contextmanager
def _readable(shown: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailed(f"cannot read {shown!r}: {(error.strerror or 'i/o error').lower()}") from error


def _read_small(folder: int, name: str, shown: str) -> bytes:
    with opened_file(folder, name) as handle:
        size = os.fstat(handle).st_size
        if size > _LIMITS[name]:
            raise TooLarge(f"{name} of {shown!r}: {size} bytes, limit {_LIMITS[name]}")
        return read_all(handle, _LIMITS[name], f"{name} of {shown!r}")
