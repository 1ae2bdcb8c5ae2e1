"""Messages of secure rounds that clients handed in over the exchange, sealed as they came, until the round is over."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from offsite.artefacts.job import JOB_ID_PATTERN, Job
from offsite.artefacts.round import open_round
from offsite.errors import Replayed, TooLarge, WrongBinding
from offsite.sealed.folder import PAYLOAD, copy_sealed, read_sealed
from offsite.sealed.manifest import SealedManifest, bind, sealed_size
from offsite.secagg.terms import ENVELOPE_BYTES, read_terms
from server.registry.federations import is_finished
from server.registry.registry import Registry

_NAME = re.compile(r"\.?([0-9]{5})-[0-9]{16}(?:\.partial)?")
_MOST = 16  # of one client in one round; the protocol has five, one of which is large


class MessageStore:
    """The notes of one registry: ``notes/JOB/ROUND-SEQUENCE``, each a sealed folder."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._folder = registry, registry.folder / "notes"

    def check(self, manifest: SealedManifest, job: Job) -> None:
        """Return only if a note of that size may come for that round now.

        Raises:
            WrongBinding: when it is not the job's, or the round was not asked in secret, or is closed.
            TooLarge: when it is larger than any message of the round.
            Replayed: when too many have come, or another one as large as a masked vector.
        """
        bind(manifest, job)
        if manifest.issuer != job.client:
            raise WrongBinding("this note was not sealed by the job's client")
        asked = self._registry.asked(job.job_id, manifest.round)
        round_ = None if asked is None else open_round(self._registry.round_folder(asked)).manifest
        if round_ is None or round_.secure is None:
            raise WrongBinding(f"round {manifest.round} of job {job.job_id[:12]} is no secure round that was asked")
        if is_finished(self._registry, round_.federation_id, manifest.round):
            raise WrongBinding(f"round {manifest.round} of job {job.job_id[:12]} is closed")
        terms = read_terms(round_.secure.encode())
        limit = max(terms.limit_bytes, ENVELOPE_BYTES + terms.num_vector_bytes)
        if manifest.files[0].bytes > limit:
            raise TooLarge(f"a message of this round has at most {limit} bytes")
        sizes = [_payload_bytes(path) for path in self.of(job.job_id, manifest.round) if path != self._place(manifest)]
        if len(sizes) >= _MOST:
            raise Replayed(f"{_MOST} notes of round {manifest.round} have come already")
        most = sealed_size(terms.limit_bytes)
        if manifest.files[0].sealed_bytes > most and any(size > most for size in sizes):
            raise Replayed(f"a masked vector of round {manifest.round} has come already")

    def keep(self, folder: Path, manifest: SealedManifest) -> None:
        """The sealed note in `folder` is kept; again changes nothing.

        Raises:
            BadDigest, WrongNames: when its encrypted file is not the one that was signed.
        """
        place = self._place(manifest)
        if not place.is_dir():
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stage = place.with_name(f".{place.name}.partial")
            shutil.rmtree(stage, ignore_errors=True)
            try:
                stage.mkdir()
                copy_sealed(folder, read_sealed(folder), manifest, stage)
                stage.rename(place)
            finally:
                shutil.rmtree(stage, ignore_errors=True)

    def has(self, manifest: SealedManifest) -> bool:
        """Tell whether this very place is taken."""
        return self._place(manifest).is_dir()

    def of(self, job_id: str, number: int) -> list[Path]:
        """Return the sealed notes of a job's round, in the order in which its client sealed them."""
        return sorted((self._folder / job_id).glob(f"{number:05d}-*"))

    def clear(self, number: int) -> None:
        """Notes of rounds up to that one are gone."""
        for path in self._folder.glob("*/*-*"):  # and what a kill left half copied
            found = _NAME.fullmatch(path.name)
            if found and re.fullmatch(JOB_ID_PATTERN, path.parent.name) and int(found[1]) <= number:
                shutil.rmtree(path, ignore_errors=True)

    def _place(self, manifest: SealedManifest) -> Path:
        return self._folder / manifest.job_id / f"{manifest.round:05d}-{manifest.sequence:016d}"


def _payload_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / PAYLOAD).iterdir())
