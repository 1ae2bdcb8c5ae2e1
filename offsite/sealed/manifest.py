"""The sealed manifest: what is signed about a sealed job, package, bundle or report. No I/O, no secrets.

``docs/format.md`` specifies it byte by byte. On arrival `verify_sealed` checks, in this order: sizes; the issuer's
signature over the bytes as they were received; format and suite; schema; file names; dates. Then `bind` holds it
against the job.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from offsite.artefacts.bundle import FILE_NAMES as BUNDLE_FILES
from offsite.artefacts.job import JOB_ID_PATTERN, JOB_LIMIT_BYTES, JOB_NAME, LATEST_SECOND, MAX_ROUNDS, Job
from offsite.artefacts.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME
from offsite.artefacts.package import FILE_NAMES as PACKAGE_FILES
from offsite.artefacts.round import FILE_NAMES as ROUND_FILES
from offsite.console import utc
from offsite.digests import DIGEST_PATTERN, sha256_bytes
from offsite.errors import BadSchema, BadSignature, Expired, TooLarge, WrongBinding, WrongNames, WrongRecipient
from offsite.keys.identity import FINGERPRINT_PATTERN, PublicKeys, Signatures
from offsite.keys.trust import MAX_SKEW_SECONDS
from offsite.strictjson import Strict, parse_object, parse_strict, write_compact
from offsite.tensors import TensorSpec

SEALED_FORMAT: Final = "offsite/sealed/1"
SIGNATURES_FORMAT: Final = "offsite/signatures/1"
SUITE: Final = "ed25519+mldsa65/mlkem768x25519-hkdfsha256-aes256gcm/cobblestone256"
SIGN_PURPOSE = "sealed"

SEALED_MANIFEST_LIMIT_BYTES = 2**20
SIGNATURES_LIMIT_BYTES = 16 * 2**10
MAX_FILES = 1024
MAX_RECIPIENTS = 8
MAX_FILE_BYTES = 2**42
REPORT_LIMIT_BYTES = 64 * 2**20

NOTE_NAME = "note.bin"
"""One message of secure aggregation (``offsite/secagg/messages.py``), from either side."""

CHUNK_BYTES = 16 * 2**10
TAG_BYTES = 16
HEAD_BYTES = 56

Kind = Literal["job", "package", "round", "note", "bundle", "report"]
KINDS: dict[Kind, re.Pattern[str]] = {
    "job": re.compile(re.escape(JOB_NAME)),
    "package": re.compile(f"{re.escape(MANIFEST_NAME)}|{PACKAGE_FILES.pattern}"),
    "round": re.compile(f"{re.escape(MANIFEST_NAME)}|{ROUND_FILES.pattern}"),
    "note": re.compile(re.escape(NOTE_NAME)),
    "bundle": re.compile(f"{re.escape(MANIFEST_NAME)}|{BUNDLE_FILES.pattern}"),
    "report": re.compile(r"report\.json|report\.signatures\.json|results\.json"),
}
"""The logical names that a sealed artefact of each kind may hold. None of them names code, a path or an archive."""

NUMBERED: tuple[Kind, ...] = ("round", "note", "bundle")
"""Kinds that belong to one round of the job."""

_LIMITS = {JOB_NAME: JOB_LIMIT_BYTES, MANIFEST_NAME: MANIFEST_LIMIT_BYTES}

Fingerprint = Annotated[str, Field(pattern=FINGERPRINT_PATTERN)]
Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]
Second = Annotated[int, Field(ge=0, le=LATEST_SECOND)]


def sealed_size(num_bytes: int) -> int:
    """Return the size of the ciphertext of `num_bytes`: there is only one."""
    return HEAD_BYTES + num_bytes + TAG_BYTES * (num_bytes // CHUNK_BYTES + 1)


class SealedFile(Strict):
    """One file: its logical name, size and SHA-256 in the clear and encrypted, and what tensors it declares."""

    name: str = Field(max_length=128)
    bytes: int = Field(ge=0, le=MAX_FILE_BYTES)
    sha256: Digest
    sealed_bytes: int = Field(ge=0, le=2 * MAX_FILE_BYTES)
    sealed_sha256: Digest
    tensors_sha256: Digest | None

    @property
    def payload_name(self) -> str:
        """Name of the encrypted file in the payload folder."""
        return self.sealed_sha256.removeprefix("sha256:") + ".enc"

    @model_validator(mode="after")
    def _sizes_agree(self) -> SealedFile:
        if self.sealed_bytes != sealed_size(self.bytes):
            raise ValueError("sealed_bytes is not the size that bytes encrypt to")
        if (self.tensors_sha256 is not None) != self.name.endswith(".safetensors"):
            raise ValueError("tensors_sha256 belongs to safetensors files, and to all of them")
        return self


class SealedManifest(Strict):
    """The content of ``manifest.json``, signed over its exact bytes. Times are seconds since 1970, UTC."""

    format: Literal["offsite/sealed/1"] = SEALED_FORMAT
    suite: Literal["ed25519+mldsa65/mlkem768x25519-hkdfsha256-aes256gcm/cobblestone256"] = SUITE
    kind: Kind
    job_id: str = Field(pattern=JOB_ID_PATTERN)
    issuer: Fingerprint
    recipients: tuple[Fingerprint, ...] = Field(min_length=1, max_length=MAX_RECIPIENTS)
    created: Second
    expires: Second
    sequence: int = Field(ge=1, le=2**53)
    round: int = Field(ge=0, le=MAX_ROUNDS)
    previous: Digest | None
    base_digest: Digest
    package_digest: Digest
    files: tuple[SealedFile, ...] = Field(min_length=1, max_length=MAX_FILES)

    @model_validator(mode="after")
    def _coherent(self) -> SealedManifest:
        names, sealed = [file.name for file in self.files], {file.sealed_sha256 for file in self.files}
        if names != sorted(set(names)) or len(sealed) != len(names):
            raise ValueError("files are not distinct and in the order of their names")
        if len(set(self.recipients)) != len(self.recipients):
            raise ValueError("a recipient is named twice")
        if self.expires <= self.created:
            raise ValueError("expires is not after created")
        if (self.kind in NUMBERED) != (self.round > 0) and self.kind != "report":
            raise ValueError("a round, a note and a bundle have a round from 1 on; a job and a package have round 0")
        if (self.sequence == 1) != (self.previous is None):
            raise ValueError("the first of a sequence has no previous one, every other has")
        return self

    def context(self, index: int) -> bytes:
        """Return the bytes that the encryption of file number `index` is bound to."""
        return payload_context(self.job_id, self.kind, self.files[index].name, index)


class _SignatureFile(Strict):
    """The content of ``signatures.json``."""

    format: Literal["offsite/signatures/1"] = SIGNATURES_FORMAT
    issuer: Fingerprint
    ed25519: str = Field(max_length=8192)
    mldsa65: str = Field(max_length=8192)


def payload_context(job_id: str, kind: str, name: str, index: int) -> bytes:
    """Return label, job, kind, logical name and index, as the payload's encryption binds them."""
    words = "\0".join(["offsite/v1/payload", job_id, kind, name])
    return words.encode("ascii") + b"\0" + index.to_bytes(4, "big")


def tensors_digest(specs: Mapping[str, TensorSpec]) -> str:
    """Return one digest over the names, dtypes and shapes that a safetensors file declares."""
    whole = hashlib.sha256(b"offsite/v1/tensor-schema\0")
    for name in sorted(specs):
        shape = ",".join(str(size) for size in specs[name].shape)
        whole.update(f"{name}\0{specs[name].dtype}\0{shape}\n".encode("ascii"))
    return "sha256:" + whole.hexdigest()


def verify_sealed(
    manifest_raw: bytes, signatures_raw: bytes, issuer_keys: Callable[[str], PublicKeys], *, now: int
) -> SealedManifest:
    """Return what the issuer signed, once both signatures fit the bytes as received and every field is in order.

    Args:
        issuer_keys: gives the keys trusted under a fingerprint, or raises `Untrusted`.
        now: seconds since 1970.

    Raises:
        TooLarge: before anything is parsed.
        BadSchema, WrongBinding: malformed, or another format, version or suite; nothing is negotiated.
        Untrusted: from `issuer_keys`.
        BadSignature: when either signature is missing or wrong, or the manifest names another issuer.
        WrongNames: when a file's logical name is not one that the kind may hold.
        Expired: when it is past its date, or from further in the future than clocks differ.
    """
    _limit("manifest.json", manifest_raw, SEALED_MANIFEST_LIMIT_BYTES)
    _limit("signatures.json", signatures_raw, SIGNATURES_LIMIT_BYTES)
    issuer, signatures = read_signatures(signatures_raw)
    issuer_keys(issuer).verify(SIGN_PURPOSE, manifest_raw, signatures)
    manifest = parse_strict(manifest_raw, SealedManifest, "manifest.json", {"format": SEALED_FORMAT, "suite": SUITE})
    if manifest.issuer != issuer:
        raise BadSignature("manifest.json names another issuer than the one who signed it")
    check_names(manifest)
    if manifest.created > now + MAX_SKEW_SECONDS:
        raise Expired(
            f"this {manifest.kind} is dated {utc(manifest.created)}, which is still to come",
            hint="compare the clocks of both sides",
        )
    if now > manifest.expires + MAX_SKEW_SECONDS:
        raise Expired(f"this {manifest.kind} expired on {utc(manifest.expires)}", hint="ask its issuer to seal it anew")
    return manifest


def read_signatures(raw: bytes) -> tuple[str, Signatures]:
    """Return whose signatures ``signatures.json`` holds, and the signatures.

    Raises:
        BadSignature: when one of the two is missing.
        BadSchema, WrongBinding: when it has another form or format.
    """
    stated = parse_object(raw, "signatures.json")
    if missing := {"ed25519", "mldsa65"} - stated.keys():
        raise BadSignature(f"signatures.json holds no {min(missing)} signature; both are needed")
    found = parse_strict(raw, _SignatureFile, "signatures.json", {"format": SIGNATURES_FORMAT})
    signatures = Signatures.from_json({"ed25519": found.ed25519, "mldsa65": found.mldsa65})
    if write_signatures(found.issuer, signatures) != raw:
        raise BadSchema("signatures.json is not written in the one form it has")
    return found.issuer, signatures


def write_signatures(issuer: str, signatures: Signatures) -> bytes:
    """Return the bytes of ``signatures.json``."""
    return write_compact(_SignatureFile.model_validate({"issuer": issuer, **signatures.to_json()}))


def check_names(manifest: SealedManifest) -> None:
    """Return only if every logical name is on the list of the manifest's kind, and of a size that such a file has.

    Raises:
        WrongNames, TooLarge: naming no name that is not on the list.
    """
    for index, file in enumerate(manifest.files):
        if not KINDS[manifest.kind].fullmatch(file.name):
            raise WrongNames(f"manifest.json: file {index} has a name that a {manifest.kind} may not hold")
        limit = REPORT_LIMIT_BYTES if manifest.kind == "report" else _LIMITS.get(file.name, MAX_FILE_BYTES)
        if file.bytes > limit:
            raise TooLarge(f"manifest.json: {file.name!r} is said to hold {file.bytes} bytes, limit {limit}")


def bind(manifest: SealedManifest, job: Job) -> None:
    """Return only if the manifest belongs to `job`: parties in their roles, package, base model, round and dates.

    Raises:
        WrongBinding: naming the first that differs.
        WrongRecipient: when it is addressed to anyone but the job's other party.
    """
    what = f"this {manifest.kind}"
    if manifest.job_id != job.job_id:
        raise WrongBinding(f"{what} belongs to job {manifest.job_id[:12]}, not {job.job_id[:12]}")
    if manifest.issuer not in senders(manifest.kind, job):
        raise WrongBinding(f"{what} was sealed by a key that the job gives no such part")
    if manifest.recipients != (job.other_party(manifest.issuer),):
        raise WrongRecipient(f"{what} is not addressed to the job's other party alone")
    for name in ("package_digest", "base_digest"):
        if getattr(manifest, name) != getattr(job, name):
            raise WrongBinding(f"{what} has {name} {getattr(manifest, name)[:19]}, the job {getattr(job, name)[:19]}")
    if manifest.round > job.rounds:
        raise WrongBinding(f"{what} is for round {manifest.round}, the job has {job.rounds}")
    if manifest.expires > job.expires:
        raise WrongBinding(f"{what} is dated beyond the end of its job")


def senders(kind: Kind, job: Job) -> set[str]:
    """Return the fingerprints that may seal an artefact of that kind in the job."""
    both = {job.owner, job.client}
    return {"bundle": {job.client}, "note": both, "report": both}.get(kind, {job.owner})


def sealed_digest(manifest_raw: bytes) -> str:
    """Return the digest that stands for a whole sealed artefact: it binds every other byte but the wrapped keys'."""
    return sha256_bytes(manifest_raw)


def _limit(name: str, raw: bytes, limit: int) -> None:
    if len(raw) > limit:
        raise TooLarge(f"{name}: over {limit} bytes")
    if not raw:
        raise BadSchema(f"{name} is empty")
