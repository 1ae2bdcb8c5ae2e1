"""The job: the owner's terms for one client, signed when they are sealed. Everything later is held against them.

A job names both parties by fingerprint, the package and its base model by digest, the adapter that may come back, how
many rounds, until when, and how large an update may be. A plain job is a folder with ``job.json``; its digest is that
of the file's bytes.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal

from pydantic import Field, model_validator

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Text
from offsite.digests import DIGEST_PATTERN, sha256_bytes
from offsite.errors import ArtefactError, ConfigError, DataError, TooLarge, WrongNames
from offsite.folders import kind_of, listed, names_in, read_plain
from offsite.keys.identity import FINGERPRINT_PATTERN
from offsite.staging import staged_folder
from offsite.strictjson import Sparse, parse_strict
from offsite.tasks.read import read_task
from offsite.tasks.task import Task

JOB_FORMAT: Final = "offsite/job/1"
JOB_NAME = "job.json"
JOB_LIMIT_BYTES = 256 * 2**10
JOB_ID_PATTERN = r"^[0-9a-f]{32}$"
MAX_ROUNDS = 10_000
LATEST_SECOND = 2**40
MAX_HEAD_NORM = 100.0


class Policy(Sparse):
    """How large a module's effective update may be, as a multiple of the norm of the weight it changes.

    ``max_head_norm`` is of a head, which begins at zero and has no weight to be measured by: its Frobenius norm.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"max_head_norm"})

    max_relative_frobenius: float = Field(1.0, gt=0, le=1e6)
    max_relative_spectral: float = Field(2.0, gt=0, le=1e6)
    max_head_norm: float = Field(MAX_HEAD_NORM, gt=0, le=1e6)


class Job(Sparse):
    """The content of ``job.json``. Times are seconds since 1970, UTC.

    ``learning_rate`` is what the owner advises; a client may train as it likes. ``task`` is how its rows are asked and
    answered; a job without one is written as it was before there were tasks.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"task"})

    format: Literal["offsite/job/1"] = JOB_FORMAT
    job_id: str = Field(pattern=JOB_ID_PATTERN)
    owner: str = Field(pattern=FINGERPRINT_PATTERN)
    client: str = Field(pattern=FINGERPRINT_PATTERN)
    package_digest: str = Field(pattern=DIGEST_PATTERN)
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    adapter: AdapterSpec
    learning_rate: float | None = Field(None, gt=0, le=1)
    rounds: int = Field(1, ge=1, le=MAX_ROUNDS)
    created: int = Field(ge=0, le=LATEST_SECOND)
    expires: int = Field(ge=0, le=LATEST_SECOND)
    policy: Policy = Policy()
    terms: Text = ""
    task: Task | None = None

    @property
    def task_digest(self) -> str | None:
        """The digest of the task that it carries; None without one."""
        return None if self.task is None else self.task.digest

    @model_validator(mode="after")
    def _two_parties_and_some_time(self) -> Job:
        if self.owner == self.client:
            raise ValueError("owner and client are the same key")
        if self.expires <= self.created:
            raise ValueError("expires is not after created")
        return self

    def other_party(self, fingerprint: str) -> str | None:
        """Return the fingerprint of the party that `fingerprint` is not; None when it is neither."""
        return {self.owner: self.client, self.client: self.owner}.get(fingerprint)


@dataclass(frozen=True)
class OpenedJob:
    """A job, and the digest of the exact bytes it was read from."""

    job: Job
    digest: str
    raw: bytes


def parse_job(raw: bytes) -> OpenedJob:
    """Return the job that `raw` states.

    Raises:
        TooLarge: when it is over `JOB_LIMIT_BYTES`.
        WrongBinding: when it states another format.
        BadSchema: when it is not a JSON object of the form of `Job`, each key once.
    """
    if len(raw) > JOB_LIMIT_BYTES:
        raise TooLarge(f"{JOB_NAME}: {len(raw)} bytes, limit {JOB_LIMIT_BYTES}")
    return OpenedJob(parse_strict(raw, Job, JOB_NAME, {"format": JOB_FORMAT}), sha256_bytes(raw), raw)


def read_job(folder: Path) -> OpenedJob:
    """Return the job in `folder`, which holds nothing else.

    Raises:
        ArtefactError: when there is no such folder or no job in it.
        WrongNames: when it holds anything besides.
        TooLarge, WrongBinding, BadSchema: as `parse_job`.
    """
    if not folder.is_dir():
        raise ArtefactError(f"no job folder named {folder.name!r}", hint="check the path")
    path = folder / JOB_NAME
    if path.is_symlink() or not path.is_file():
        looks = kind_of(folder)
        what = "" if looks is None else f": it is {looks}"
        raise ArtefactError(f"folder {folder.name!r} holds no {JOB_NAME}{what}", hint=_hint(folder, looks))
    if extra := names_in(folder) - {JOB_NAME}:
        raise WrongNames(f"{folder.name!r} holds {listed(extra)} besides {JOB_NAME}")
    return parse_job(read_plain(path, JOB_LIMIT_BYTES, JOB_NAME))


def task_at(path: Path) -> Task:
    """Return the task in a file, or in the opened job whose folder is named.

    Raises:
        ConfigError, DataError: as `offsite.tasks.read.read_task`, or when the job carries no task.
        ArtefactError: as `read_job`.
    """
    if not path.is_dir():
        return read_task(path)
    found = read_job(path).job.task
    if found is None:
        raise DataError(f"job {path.name!r} carries no task", hint="name a task.yaml")
    return found


def _hint(folder: Path, looks: str | None) -> str:
    if looks == "a sealed job":
        return f"open it first: offsite open {shlex.quote(folder.name)} -o NEW-FOLDER"
    return "name the folder that offsite job create wrote, or that a sealed job was opened to"


def job_bytes(job: Job) -> bytes:
    """Return the job as its file holds it.

    Raises:
        ConfigError: when it is over what the other side reads.
    """
    raw = json.dumps(job.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False).encode("ascii") + b"\n"
    if len(raw) > JOB_LIMIT_BYTES:
        raise ConfigError(
            f"the job is {len(raw)} bytes, at most {JOB_LIMIT_BYTES} are read", hint="shorten --terms, or the task"
        )
    return raw


def write_job(out: Path, job: Job) -> str:
    """Write the job folder `out`, whole or not at all, and return the job's digest.

    Raises:
        ConfigError: when `out` exists, or the job is too large.
        RunFailed: when the disk is full.
    """
    raw = job_bytes(job)
    with staged_folder(out) as stage:
        (stage / JOB_NAME).write_bytes(raw)
    return sha256_bytes(raw)
