"""Sealing and opening: files in, a folder that only its recipient can read out, and back. Streamed, constant memory.

``docs/format.md`` specifies the folder byte by byte. Every encrypted file is opened once: what is hashed is what is
decrypted. Plain text has its name only after its last byte was authenticated and its digest fits.

Sources: Cobblestone-256 of https://c2sp.org/chunked-encryption for the payload; RFC 9180 for the wrapped keys.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag

from offsite.errors import BadDigest, BadEncryption, BadSchema, TooLarge
from offsite.folders import opened_plain
from offsite.keys.identity import Identity, PublicKeys
from offsite.sealed.folder import (
    BUFFER_BYTES,
    KEYS_FILE,
    MANIFEST_FILE,
    PAYLOAD,
    SIGNATURES_FILE,
    RawSealed,
    check_listed,
    opened_file,
    opened_folder,
    opened_payload,
)
from offsite.sealed.manifest import (
    SEALED_MANIFEST_LIMIT_BYTES,
    SIGN_PURPOSE,
    Kind,
    SealedFile,
    SealedManifest,
    check_names,
    payload_context,
    sealed_digest,
    tensors_digest,
    write_signatures,
)
from offsite.sealed.recipients import read_keys, unwrap_keys, wrap_keys, write_keys
from offsite.staging import staged_folder
from offsite.tensors import read_open_header

__all__ = [
    "Encrypted",
    "decrypt_files",
    "encrypt_files",
    "seal_files",
    "write_sealed",
]


@dataclass(frozen=True)
class Encrypted:
    """Encrypted files in a payload folder, and the data keys that open them, in the same order."""

    files: tuple[SealedFile, ...]
    keys: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"Encrypted({len(self.files)} files)"


def seal_files(
    files: Mapping[str, Path],
    out: Path,
    *,
    kind: Kind,
    job_id: str,
    created: int,
    expires: int,
    sequence: int,
    round: int,  # noqa: A002 - the manifest's own word
    previous: str | None,
    base_digest: str,
    package_digest: str,
    identity: Identity,
    recipients: Sequence[PublicKeys],
) -> str:
    """Write the sealed folder `out`, whole or not at all, and return its digest.

    Args:
        files: logical name to the file whose bytes it stands for; read once.
        created, expires: seconds since 1970.
        previous: digest of what the issuer sealed before in this job and kind; None for the first.

    Raises:
        ConfigError: when `out` exists.
        WrongNames: when a logical name is not one that the kind may hold.
        RunFailed: when the disk is full.
    """
    with staged_folder(out) as stage:
        encrypted = encrypt_files(files, stage, kind=kind, job_id=job_id)
        manifest = SealedManifest(
            kind=kind,
            job_id=job_id,
            issuer=identity.public.fingerprint,
            recipients=tuple(keys.fingerprint for keys in recipients),
            created=created,
            expires=expires,
            sequence=sequence,
            round=round,
            previous=previous,
            base_digest=base_digest,
            package_digest=package_digest,
            files=encrypted.files,
        )
        return write_sealed(stage, manifest, encrypted, identity, recipients)


def encrypt_files(
    files: Mapping[str, Path], folder: Path, *, kind: Kind, job_id: str, digests: Mapping[str, str] | None = None
) -> Encrypted:
    """Write the payload folder in `folder`: each file under a fresh key, bound to job, kind, name and index.

    Args:
        digests: SHA-256 of each file as it was checked; what is encrypted is that, or nothing.

    Raises:
        BadDigest: when a file is not the one that was checked.
        WrongNames: when it is no plain file any more.
    """
    payload = folder / PAYLOAD
    payload.mkdir()
    keys, entries = [], []
    for index, name in enumerate(sorted(files)):
        key = Cobblestone256Encryptor.generate_key()
        encryptor = Cobblestone256Encryptor(key, payload_context(job_id, kind, name, index))
        plain, sealed, partial = hashlib.sha256(), hashlib.sha256(), payload / f"{index}.partial"
        num_bytes = sealed_bytes = 0
        buffer = bytearray(BUFFER_BYTES)
        with (
            opened_plain(files[name]) as handle,
            open(handle, "rb", buffering=0, closefd=False) as source,
            partial.open("xb", buffering=0) as target,
        ):
            while count := source.readinto(buffer):
                plain.update(memoryview(buffer)[:count])
                piece = encryptor.update(memoryview(buffer)[:count])
                sealed.update(piece)
                _write_all(target.fileno(), piece)
                num_bytes, sealed_bytes = num_bytes + count, sealed_bytes + len(piece)
            piece = encryptor.finalize()
            sealed.update(piece)
            _write_all(target.fileno(), piece)
            if digests is not None and "sha256:" + plain.hexdigest() != digests[name]:
                raise BadDigest(
                    f"{name!r} changed while it was sealed", hint="seal it again, with nobody at work on it"
                )
            declared = _tensors_digest(source, name)
        partial.rename(payload / f"{sealed.hexdigest()}.enc")
        entries.append(
            SealedFile(
                name=name,
                bytes=num_bytes,
                sha256="sha256:" + plain.hexdigest(),
                sealed_bytes=sealed_bytes + len(piece),
                sealed_sha256="sha256:" + sealed.hexdigest(),
                tensors_sha256=declared,
            )
        )
        keys.append(key)
    return Encrypted(tuple(entries), tuple(keys))


def write_sealed(
    folder: Path, manifest: SealedManifest, encrypted: Encrypted, identity: Identity, recipients: Sequence[PublicKeys]
) -> str:
    """Write manifest, signatures and wrapped keys beside the payload in `folder`; return the sealed digest.

    Raises:
        WrongNames: when a logical name is not one that the kind may hold.
        TooLarge: when the manifest would be larger than a recipient reads.
    """
    check_names(manifest)
    raw = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1).encode("ascii") + b"\n"
    if len(raw) > SEALED_MANIFEST_LIMIT_BYTES:
        raise TooLarge(f"{MANIFEST_FILE}: {len(raw)} bytes, limit {SEALED_MANIFEST_LIMIT_BYTES}")
    digest = sealed_digest(raw)
    (folder / MANIFEST_FILE).write_bytes(raw)
    signatures = identity.sign(SIGN_PURPOSE, raw)
    (folder / SIGNATURES_FILE).write_bytes(write_signatures(identity.public.fingerprint, signatures))
    (folder / KEYS_FILE).write_bytes(write_keys([wrap_keys(encrypted.keys, digest, keys) for keys in recipients]))
    return digest


def decrypt_files(
    path: Path, raw: RawSealed, manifest: SealedManifest, identity: Identity, out: Path, *, handle: int | None = None
) -> None:
    """Write every file of the sealed folder into the existing folder `out`, under its logical name, once it agrees.

    A file has its name only after the last byte was authenticated and both digests fit; before that it is called
    ``NAME.partial``, and on any failure it is removed. The caller publishes `out` when the content is validated.

    Args:
        raw: what `read_sealed` returned; `manifest` is what `verify_sealed` made of it.
        handle: of `out`, where it is open already: plain text goes there, whatever has come to stand at its path.

    Raises:
        WrongRecipient, BadSignature: when `identity` is not who it is sealed for; no payload is read before.
        WrongNames: when the payload is not exactly the files of the manifest, or not plain files.
        BadDigest: when a file's size or digest is not the signed one.
        BadEncryption: when a file does not decrypt.
        BadSchema: when the wrapped keys or a tensor file's header have the wrong form.
    """
    keys = unwrap_keys(read_keys(raw.keys_raw), manifest, raw.digest, identity)
    with opened_folder(path) as folder, opened_payload(folder, path.name) as payload:
        check_listed(payload, manifest)
        target = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if handle is None else handle
        try:
            for index, (file, key) in enumerate(zip(manifest.files, keys, strict=True)):
                _decrypt(payload, file, Cobblestone256Decryptor(key, manifest.context(index)), target)
        finally:
            if handle is None:
                os.close(target)


def _decrypt(payload: int, file: SealedFile, decryptor: Cobblestone256Decryptor, out: int) -> None:
    partial = f"{file.name}.partial"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with (
            opened_file(payload, file.payload_name, file.sealed_bytes) as source,
            os.fdopen(os.open(partial, flags, 0o666, dir_fd=out), "r+b", buffering=0) as target,
        ):
            try:
                digests = _pour(source, decryptor, target.fileno(), file.sealed_bytes)
            except InvalidTag:
                raise BadEncryption(
                    f"{file.name!r} does not decrypt: its bytes, order or end were changed",
                    hint="fetch the sealed folder again",
                ) from None
            declared = _tensors_digest(target, file.name) if digests[1] == file.sha256 else None
        if digests != (file.sealed_sha256, file.sha256):
            what = "encrypted file" if digests[0] != file.sealed_sha256 else "content"
            raise BadDigest(f"{file.name!r}: SHA-256 of its {what} is not the signed one")
        if declared != file.tensors_sha256:
            raise BadSchema(f"{file.name!r} declares other tensors than the manifest says")
        os.rename(partial, file.name, src_dir_fd=out, dst_dir_fd=out)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial, dir_fd=out)


def _pour(source: int, decryptor: Cobblestone256Decryptor, target: int, num_bytes: int) -> tuple[str, str]:
    """Decrypt `num_bytes` of `source` to their end; return the digests of what was read and what was written."""
    sealed, plain = hashlib.sha256(), hashlib.sha256()
    while num_bytes and (piece := os.read(source, min(num_bytes, BUFFER_BYTES))):
        num_bytes -= len(piece)
        sealed.update(piece)
        clear = decryptor.update(piece)
        plain.update(clear)
        _write_all(target, clear)
    clear = decryptor.finalize()
    plain.update(clear)
    _write_all(target, clear)
    return "sha256:" + sealed.hexdigest(), "sha256:" + plain.hexdigest()


def _tensors_digest(handle: BinaryIO, name: str) -> str | None:
    found = read_open_header(handle, what=f"file {name!r}") if name.endswith(".safetensors") else None
    return None if found is None else tensors_digest(found)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
