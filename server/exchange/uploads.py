"""Unfinished uploads on disk: sealed bundles that arrive in parts, within quotas, and survive a kill.

``FOLDER/<digest>/`` has the form of a sealed folder. What a manifest declares is reserved before its first byte is
taken, so that all uploads together never need more than the cap. A payload file's size is the offset reached; parts
are flushed before they are answered. Digests are checked by the intake, not here.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from offsite.errors import ConfigError, OffsiteError, RunFailed, TooLarge
from offsite.faults import reach
from offsite.sealed.folder import KEYS_FILE, MANIFEST_FILE, PAYLOAD, SIGNATURES_FILE
from offsite.sealed.manifest import SealedManifest
from offsite.staging import fsync, leftovers, remove, staged_file, staged_folder
from offsite.strictjson import parse_strict
from server.http.refusals import Refusal, busy, not_found

_DIGEST = re.compile(r"[0-9a-f]{64}")
_OWN = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.[0-9a-f]{8}\.partial")


@dataclass(frozen=True)
class Quotas:
    """What unfinished uploads may take.

    Args:
        upload_bytes: one upload, encrypted.
        disk_bytes: all of them together.
        num_client_uploads: at once by one client.
        free_bytes: left on the disk whatever is declared.
    """

    upload_bytes: int
    disk_bytes: int
    num_client_uploads: int
    free_bytes: int


@dataclass
class Upload:
    """One upload: whose, which files of which size, and whether parts may still come."""

    digest: str
    folder: Path
    client: str
    files: dict[str, int]
    num_bytes: int
    touched: float
    is_closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def offsets(self) -> dict[str, int]:
        """Return how many bytes of each payload file are on disk."""
        return {name: _size(self.folder / PAYLOAD / name) for name in self.files}

    def is_whole(self) -> bool:
        """Tell whether every payload file has its declared size."""
        return self.offsets() == self.files


class UploadStore:
    """The unfinished uploads in one folder; safe to share between threads of one process.

    Args:
        folder: made if missing; what a kill left half-made in it is removed, whole uploads go on, and what has
            another name than an upload is left alone.
        clock: seconds since 1970.

    Raises:
        ConfigError: when the folder is a link.
        RunFailed: when it cannot be used.
    """

    def __init__(self, folder: Path, quotas: Quotas, *, clock: Callable[[], float] = time.time) -> None:
        self.folder, self._quotas, self._clock = folder, quotas, clock
        self._mutex = threading.Lock()
        self._uploads: dict[str, Upload] = {}
        try:
            if folder.is_symlink():
                raise ConfigError(
                    f"folder {folder.name!r} for uploads is a link, expected a folder of its own",
                    hint="move the whole registry to the bigger disk, or mount that disk there",
                )
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in sorted(folder.iterdir()):
                upload = self._found(path)
                if upload is not None:
                    for partial in (path / name for name in (MANIFEST_FILE, SIGNATURES_FILE, KEYS_FILE)):
                        for left in leftovers(partial):
                            remove(left)
                    self._uploads[upload.digest] = upload
                elif _OWN.fullmatch(path.name) and not path.is_symlink():
                    remove(path)
        except OSError as error:
            raise RunFailed(f"cannot use folder {folder.name!r}: {(error.strerror or 'i/o error').lower()}") from None

    def declare(self, digest: str, manifest: SealedManifest, raw: tuple[bytes, bytes, bytes]) -> Upload:
        """Return the upload of a manifest whose signature was checked, begun now or earlier.

        Args:
            digest: of the manifest's bytes, in hex.
            raw: the bytes of manifest, signatures and keys.

        Raises:
            TooLarge: over the size of one upload.
            Refusal: 429 when the client or all clients have too much under way, or the disk too little left.
        """
        num_bytes = sum(map(len, raw)) + sum(file.sealed_bytes for file in manifest.files)
        if num_bytes > self._quotas.upload_bytes:
            raise TooLarge(f"the sealed bundle declares {num_bytes} bytes, limit {self._quotas.upload_bytes}")
        with self._mutex:
            if digest in self._uploads:
                return self._again(self._uploads[digest], raw)
            self._check_room(manifest.issuer, num_bytes)
            folder = self.folder / digest
            with staged_folder(folder) as stage:
                for name, content in zip((MANIFEST_FILE, SIGNATURES_FILE, KEYS_FILE), raw, strict=True):
                    (stage / name).write_bytes(content)
                (stage / PAYLOAD).mkdir()
            upload = Upload(digest, folder, manifest.issuer, _files(manifest), num_bytes, self._clock())
            self._uploads[digest] = upload
            return upload

    def _again(self, upload: Upload, raw: tuple[bytes, bytes, bytes]) -> Upload:
        """Return an upload that was begun before, with the signatures and wrapped keys of this declaration.

        Neither is bound by the digest: those of the earlier one may be others, or wrong.
        """
        with upload.lock:
            if not upload.is_closed:
                for name, content in zip((MANIFEST_FILE, SIGNATURES_FILE, KEYS_FILE), raw, strict=True):
                    if _content(upload.folder / name) != content:
                        with staged_file(upload.folder / name, replace=True) as stage:
                            stage.write_bytes(content)
        return upload

    def get(self, digest: str, client: str) -> Upload | None:
        """Return the upload if there is one and it is that client's."""
        with self._mutex:
            upload = self._uploads.get(digest)
        return upload if upload is not None and upload.client == client else None

    def append(self, upload: Upload, name: str, offset: int, data: bytes) -> int:
        """Return the offset reached once `data` is on disk behind the first `offset` bytes of file `name`.

        Raises:
            Refusal: 404 for another name, 409 for another offset than the one reached, 413 beyond the declared size.
            RunFailed: the disk is full or fails; the offset is as before.
        """
        if name not in upload.files:
            raise not_found()
        with upload.lock:
            if upload.is_closed:
                raise Refusal(409, "WrongOffset", "this upload takes no more parts")
            path = upload.folder / PAYLOAD / name
            reached = _size(path)
            if offset != reached:
                raise Refusal(
                    409, "WrongOffset", f"{reached} bytes are here, the part begins at {offset}", offset=reached
                )
            if reached + len(data) > upload.files[name]:
                raise Refusal(413, "TooLarge", f"a part ends beyond the declared {upload.files[name]} bytes")
            _append(path, reached, data)
            upload.touched = self._clock()
            reach("upload-part")
            return reached + len(data)

    def close(self, upload: Upload) -> None:
        """No part is taken any more; what is on disk stays as it is while the intake reads it."""
        with upload.lock:
            upload.is_closed = True

    def reopen(self, upload: Upload) -> None:
        """Parts are taken again."""
        with upload.lock:
            upload.is_closed = False

    def discard(self, upload: Upload) -> None:
        """The upload is gone from disk, and its room is free."""
        self.close(upload)
        remove(upload.folder)
        with self._mutex:
            if self._uploads.get(upload.digest) is upload:
                del self._uploads[upload.digest]

    def collect(self, idle_seconds: float) -> int:
        """Discard the uploads that no part reached for so long; return how many there were."""
        limit = self._clock() - idle_seconds
        with self._mutex:
            idle = [upload for upload in self._uploads.values() if upload.touched < limit and not upload.is_closed]
        for upload in idle:
            self.discard(upload)
        return len(idle)

    def _check_room(self, client: str, num_bytes: int) -> None:
        uploads, quotas = self._uploads.values(), self._quotas
        if sum(upload.client == client for upload in uploads) >= quotas.num_client_uploads:
            raise busy(f"{quotas.num_client_uploads} uploads are under way; finish one first", retry_seconds=2)
        if sum(upload.num_bytes for upload in uploads) + num_bytes > quotas.disk_bytes:
            raise busy("the exchange has no room for more uploads now", retry_seconds=10)
        missing = sum(upload.num_bytes - sum(upload.offsets().values()) for upload in uploads)
        if shutil.disk_usage(self.folder).free - missing - num_bytes < quotas.free_bytes:
            raise busy("the exchange has no room for more uploads now", retry_seconds=10)

    def _found(self, path: Path) -> Upload | None:
        """Return the upload that a run before this one left at `path`, or None when it is not a whole folder of one."""
        if not _DIGEST.fullmatch(path.name) or path.is_symlink():
            return None
        try:
            manifest = parse_strict((path / MANIFEST_FILE).read_bytes(), SealedManifest, MANIFEST_FILE, {})
            kept = sum((path / name).stat().st_size for name in (MANIFEST_FILE, SIGNATURES_FILE, KEYS_FILE))
            touched = max(found.stat().st_mtime for found in (path, *(path / PAYLOAD).iterdir()))
        except (OSError, OffsiteError):
            return None
        files = _files(manifest)
        return Upload(path.name, path, manifest.issuer, files, kept + sum(files.values()), touched)


def _files(manifest: SealedManifest) -> dict[str, int]:
    return {file.payload_name: file.sealed_bytes for file in manifest.files}


def _append(path: Path, reached: int, data: bytes) -> None:
    is_new = not reached
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            view, at = memoryview(data), reached
            while view:
                num_written = os.pwrite(handle, view, at)
                view, at = view[num_written:], at + num_written
            os.fsync(handle)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, reached)
            raise
        finally:
            os.close(handle)
        if is_new:
            fsync(path.parent)
    except OSError as error:
        raise RunFailed(f"cannot keep a part: {(error.strerror or 'i/o error').lower()}") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
