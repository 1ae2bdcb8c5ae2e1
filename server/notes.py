"""Messages of secure rounds that clients handed in over the exchange, sealed as they came, until the round is over."""

from __future__ import annotations

import shutil
from pathlib import Path

from offsite.errors import Replayed, TooLarge, WrongBinding
from offsite.job import Job
from offsite.round import open_round
from offsite.seal import check_payload
from offsite.sealed import SealedManifest, bind
from offsite.secaggterms import read_terms
from server.registry import Registry

_MOST = 16  # of one client in one round; the protocol has five


class NoteBox:
    """The notes of one registry: ``notes/JOB/ROUND-SEQUENCE``, each a sealed folder."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._folder = registry, registry.folder / "notes"

    def check(self, manifest: SealedManifest, job: Job) -> None:
        """Return only if a note of that size may come for that round now.

        Raises:
            WrongBinding: when it is not the job's, or the round was not asked in secret.
            TooLarge: when it is larger than any message of the round.
            Replayed: when too many have come.
        """
        bind(manifest, job)
        if manifest.issuer != job.client:
            raise WrongBinding("this note was not sealed by the job's client")
        asked = self._registry.asked(job.job_id, manifest.round)
        secure = None if asked is None else open_round(self._registry.round_folder(asked)).manifest.secure
        if secure is None:
            raise WrongBinding(f"round {manifest.round} of job {job.job_id[:12]} is no secure round that was asked")
        terms = read_terms(secure.encode())
        limit = terms.limit_bytes + terms.num_vector_bytes
        if len(manifest.files) != 1 or manifest.files[0].bytes > limit:
            raise TooLarge(f"a message of this round has at most {limit} bytes")
        if len(self.of(job.job_id, manifest.round)) >= _MOST:
            raise Replayed(f"{_MOST} notes of round {manifest.round} have come already")

    def keep(self, folder: Path, manifest: SealedManifest) -> None:
        """The sealed note in `folder` is kept; again changes nothing.

        Raises:
            BadDigest, WrongNames: when its encrypted file is not the one that was signed.
        """
        place = self._place(manifest)
        if not place.is_dir():
            check_payload(folder, manifest)
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stage = place.with_name(f".{place.name}.partial")
            shutil.rmtree(stage, ignore_errors=True)
            shutil.copytree(folder, stage)
            stage.rename(place)

    def has(self, manifest: SealedManifest) -> bool:
        """Tell whether this very place is taken."""
        return self._place(manifest).is_dir()

    def of(self, job_id: str, number: int) -> list[Path]:
        """Return the sealed notes of a job's round, in the order in which its client sealed them."""
        return sorted((self._folder / job_id).glob(f"{number:05d}-*"))

    def clear(self, number: int) -> None:
        """Notes of rounds up to that one are gone."""
        for path in self._folder.glob("*/[0-9]*-*"):
            if int(path.name.partition("-")[0]) <= number:
                shutil.rmtree(path, ignore_errors=True)

    def _place(self, manifest: SealedManifest) -> Path:
        return self._folder / manifest.job_id / f"{manifest.round:05d}-{manifest.sequence:016d}"
