"""The round: what an owner asks of one client of a federation, once, and the weights that it goes on from.

A round is a folder of ``offsite.json``, the manifest, and up to three tensor files. ``update.safetensors`` holds all
that earlier rounds added to the package's weights, so that a client needs no round but the newest.
``emulator.safetensors`` holds how the emulator's middle was realigned with the model that the rounds made
(``emulator/distillation/realign.py``). ``start.safetensors`` holds the factors A of a LoRA that all clients share and
none trains. What a client may do with a round is in ``client/tuning/rounds.py``; what the update means, in
``adapters/updates.py``.

On arrival, after the seal: size, format and schema of the manifest; exact set of files; sizes and digests; the package
and base model it is bound to; names, shapes and dtypes of the tensors; finite values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import Field, model_validator

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import MAX_ROUNDS
from offsite.artefacts.manifest import FileEntry, check_files, entries, read_manifest, write_manifest
from offsite.digests import DIGEST_PATTERN, sha256_bytes
from offsite.errors import WrongBinding
from offsite.staging import staged_folder
from offsite.strictjson import Strict, write_compact
from offsite.tensors import (
    Name,
    TensorSpec,
    check_exact,
    check_finite,
    read_header,
    read_tensors,
    spec_of,
    write_tensors,
)

if TYPE_CHECKING:
    import torch

    from offsite.artefacts.job import Job

ROUND_FORMAT: Final = "offsite/round/1"
UPDATE_FILE, EMULATOR_FILE, START_FILE = "update.safetensors", "emulator.safetensors", "start.safetensors"
FEDERATION_PATTERN = r"^[0-9a-f]{32}$"
MAX_STEPS = 1_000_000

FILE_NAMES = re.compile("|".join(map(re.escape, (UPDATE_FILE, EMULATOR_FILE, START_FILE))))


class RoundManifest(Strict):
    """The content of a round's ``offsite.json``.

    Attributes:
        task: ``train`` asks for a bundle; ``finish`` says that there is no further round.
        learning_rate: peak rate; None leaves it to the client.
        clip: largest Frobenius norm of what a client hands in; it scales a longer update down. None for no limit.
        secure: terms of secure aggregation, in their one JSON form (``offsite/secagg/terms.py``): the answer is then no
            bundle, but a part of a sum. None for a bundle.
        proximal: FedProx's mu, on the effective update (`adapters/updates.py`); 0 for none.
        update, emulator, start: the tensors of the files of these names.
    """

    format: str
    federation_id: str = Field(pattern=FEDERATION_PATTERN)
    task: Literal["train", "finish"] = "train"
    round: int = Field(ge=1, le=MAX_ROUNDS)
    num_rounds: int = Field(ge=1, le=MAX_ROUNDS)
    package_digest: str = Field(pattern=DIGEST_PATTERN)
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    adapter: AdapterSpec
    steps: int = Field(ge=1, le=MAX_STEPS)
    learning_rate: float | None = Field(None, gt=0, le=10)
    proximal: float = Field(0.0, ge=0, le=1e6)
    clip: float | None = Field(None, gt=0)
    secure: str | None = Field(None, max_length=8 * 2**20)
    update: dict[Name, TensorSpec] = {}
    emulator: dict[Name, TensorSpec] = {}
    start: dict[Name, TensorSpec] = {}
    files: dict[str, FileEntry] = {}

    @model_validator(mode="after")
    def _coherent(self) -> RoundManifest:
        if self.round > self.num_rounds:
            raise ValueError("the round is beyond the last")
        if self.secure is not None and self.clip is None:
            raise ValueError("secure aggregation needs a clip")
        if self.update.keys() & self.start.keys():
            raise ValueError("a tensor is in the update and in the start")
        for name, tensors in self.stated().items():
            if bool(tensors) != (name in self.files):
                raise ValueError(f"tensors of {name} and the file belong together")
        return self

    @property
    def asked(self) -> str:
        """Digest of all that is asked, weights with it, but for the terms of secure aggregation: they name it."""
        return sha256_bytes(write_compact(self.model_copy(update={"secure": None, "clip": None})))

    def stated(self) -> dict[str, dict[str, TensorSpec]]:
        """Return the tensors that each file must hold, by the file's name; a file without any must not be there."""
        return {UPDATE_FILE: self.update, EMULATOR_FILE: self.emulator, START_FILE: self.start}


@dataclass(frozen=True)
class Round:
    """A round whose files all agreed with its manifest when it was opened."""

    path: Path
    manifest: RoundManifest
    digest: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def is_first(self) -> bool:
        """Whether its weights are the package's own, with nothing added."""
        return not self.manifest.update and not self.manifest.emulator

    def bind(self, job: Job) -> None:
        """Return only if the round is one of that job's: its package, base model and adapter, within its rounds.

        Raises:
            WrongBinding: naming what differs.
        """
        for name in ("package_digest", "base_digest"):
            found, stated = getattr(self.manifest, name), getattr(job, name)
            if found != stated:
                raise WrongBinding(f"this round has {name} {found[:19]}, the job {stated[:19]}")
        if self.manifest.adapter != job.adapter:
            raise WrongBinding("this round asks for another adapter than the job")
        if self.manifest.round > job.rounds:
            raise WrongBinding(f"this is round {self.manifest.round}, the job has {job.rounds}")

    def load_update(self) -> dict[str, torch.Tensor]:
        """Return the update's tensors, as `adapters.updates.to_tensors` gave them; empty before anything was added."""
        return self._load(UPDATE_FILE, self.manifest.update)

    def load_emulator(self) -> dict[str, torch.Tensor]:
        """Return how the emulator's middle was realigned, in the form of an update; empty where it never was."""
        return self._load(EMULATOR_FILE, self.manifest.emulator)

    def load_start(self) -> dict[str, torch.Tensor]:
        """Return the shared factors A by canonical name; empty when every client starts its own."""
        return self._load(START_FILE, self.manifest.start)

    def _load(self, name: str, specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
        return read_tensors(self.path / name, specs) if specs else {}


def open_round(path: Path) -> Round:
    """Return the round at `path` once its files agree with the manifest; no tensor is read.

    Raises:
        ArtefactError: with the subclass of the check that failed, in the order the module's docstring gives.
    """
    manifest, digest = read_manifest(path, RoundManifest, ROUND_FORMAT)
    check_files(path, manifest.files, FILE_NAMES)
    for name, stated in manifest.stated().items():
        if stated:
            check_exact(f"round {path.name!r}", read_header(path / name), stated)
    return Round(path, manifest, digest)


def write_round(
    out: Path,
    manifest: RoundManifest,
    *,
    update: Mapping[str, torch.Tensor] | None = None,
    emulator: Mapping[str, torch.Tensor] | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
) -> Round:
    """Write the round's folder `out`, whole or not at all.

    Args:
        manifest: without tensors and files; they are filled in.

    Raises:
        ConfigError: when `out` exists.
        NotFinite: when a tensor holds NaN or infinity.
        RunFailed: when the disk is full.
    """
    parts = {UPDATE_FILE: dict(update or {}), EMULATOR_FILE: dict(emulator or {}), START_FILE: dict(start or {})}
    with staged_folder(out) as stage:
        for name, tensors in parts.items():
            check_finite("the round", tensors)
            if tensors:
                write_tensors(stage / name, tensors)
        stated = {
            **{
                file.removesuffix(".safetensors"): {name: spec_of(tensor) for name, tensor in tensors.items()}
                for file, tensors in parts.items()
            },
            "files": entries(stage, [name for name, tensors in parts.items() if tensors]),
        }
        write_manifest(stage, RoundManifest.model_validate({**dict(manifest), **stated}))
    return open_round(out)
