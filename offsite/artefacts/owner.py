"""The owner's record of a package: what only the owner may know, kept beside it and never shipped.

It maps the package's own numbering back to the full model: which block each package block stands for, and which
MLP channels of it were kept. Plugging in renumbers from it.
"""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from offsite.artefacts.encodings import Encoding
from offsite.artefacts.layout import Layout
from offsite.artefacts.manifest import MANIFEST_LIMIT_BYTES
from offsite.digests import DIGEST_PATTERN
from offsite.errors import ArtefactError, BadSchema, ConfigError
from offsite.staging import staged_file
from offsite.strictjson import Sparse, Strict
from offsite.tensors import TensorSpec

OWNER_FORMAT = "offsite/owner/1"


class DialFigures(Strict):
    """What a package comes to for a rehearsed client, as ``offsite/evaluation/figures.py`` defines it.

    ``withheld`` is after tuning, in nats per token; ``gap`` is emulator-tuned over plugged in; recoveries are of the
    gain of LoRA on the full model; ``num_bytes`` are the package's.
    """

    recovery: float
    recovery_nats: float
    withheld: float
    gap: float = Field(gt=0)
    num_bytes: int = Field(gt=0)


class Dialled(Sparse):
    """What a package was asked for, and what was predicted of it beside what was then measured.

    ``size`` is the share of the middle that ``method`` kept; ``scale`` the share of a rehearsed client's update that
    did best plugged in; ``exploration`` is the digest of the exploration's file.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"scale"})

    target: str
    value: float
    method: str
    size: float = Field(gt=0, le=1)
    predicted: DialFigures
    measured: DialFigures
    scale: float = Field(1.0, gt=0, le=1)
    exploration: str = Field(pattern=DIGEST_PATTERN)


class OwnerRecord(Sparse):
    """How one package maps onto the full model.

    ``kept`` holds the full-model block number of every package block, in package order; ``channels`` the kept MLP
    channels per block (``middle.3`` -> ascending numbers), absent when all were kept. ``experts`` holds those of MLPs
    that carry no adapter (``middle.3.mlp.experts`` -> ascending numbers for each expert). ``variant`` says which of
    many choices of channels this is, 0 the usual. ``encodings`` says of the package's block tensors, by canonical name,
    which are stored otherwise than as they stand, and ``figures`` what was measured while compressing. ``dial`` says
    what the package was asked for that ``distill --target`` made. Of an encoder-decoder ``num_blocks`` are the
    decoder's, ``num_encoder_blocks`` the encoder's, whose kept blocks come first. A record without any of these is
    written as before there were such packages.
    """

    optional: ClassVar[frozenset[str]] = frozenset(
        {"experts", "variant", "encodings", "figures", "dial", "num_encoder_blocks"}
    )

    format: str = OWNER_FORMAT
    package_digest: str = Field(pattern=DIGEST_PATTERN)
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    layout: Layout
    block_tensors: dict[str, TensorSpec]
    num_blocks: int = Field(ge=1)
    kept: tuple[int, ...]
    channels: dict[str, tuple[int, ...]] = {}
    experts: dict[str, tuple[tuple[int, ...], ...]] = {}
    variant: int = Field(0, ge=0)
    encodings: dict[str, Encoding] = {}
    figures: dict[str, float] = {}
    dial: Dialled | None = None
    num_encoder_blocks: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _agree(self) -> OwnerRecord:
        if self.format != OWNER_FORMAT:
            raise ValueError(f"format is not {OWNER_FORMAT}")
        blocks = self.layout.blocks
        if (self.num_encoder_blocks is None) != (self.layout.encoder is None):
            raise ValueError("num_encoder_blocks is there of an encoder-decoder, and of nothing else")
        if len(self.kept) != len(blocks) or not all(_ascending(kept, limit) for kept, limit in self._by_stack()):
            raise ValueError("kept does not name one block of the full model per block of the package, ascending")
        if not self.channels.keys() <= blocks.keys() or not all(map(_ascending, self.channels.values())):
            raise ValueError("channels does not list ascending numbers for blocks of the package")
        for name, lists in self.experts.items():
            block = ".".join(name.split(".")[:2])
            if block not in blocks or name == block or not lists or not all(map(_ascending, lists)):
                raise ValueError("experts does not list ascending numbers for MLPs of the package's blocks")
        if not self.encodings.keys() <= self.block_tensors.keys():
            raise ValueError("encodings does not name tensors of the package's blocks")
        return self

    def _by_stack(self) -> list[tuple[tuple[int, ...], int]]:
        """Return of each stack the kept blocks and how many it has in the full model, in the order of the layout."""
        if self.num_encoder_blocks is None:
            return [(self.kept, self.num_blocks)]
        first = len(self.layout.sides[0])
        return [(self.kept[:first], self.num_encoder_blocks), (self.kept[first:], self.num_blocks)]

    def full_middle(self) -> list[str]:
        """Return the module names of the full model's blocks that lie in no end."""
        found = []
        for side, (kept, num) in zip(self.layout.sides, self._by_stack(), strict=True):
            ends = {number for name, number in zip(side, kept, strict=True) if not name.startswith("middle.")}
            stack = next(iter(side.values())).rpartition(".")[0] if side else ""
            found += [f"{stack}.{number}" for number in range(num) if number not in ends]
        return found

    def num_stored(self, name: str) -> int:
        """Return how many numbers the package holds for its block tensor of that canonical name: of factors, theirs."""
        shape, encoding = self.block_tensors[name].shape, self.encodings.get(name)
        return math.prod(shape) if encoding is None else encoding.num_stored(shape)

    @property
    def sites(self) -> dict[str, str]:
        """Map canonical blocks (``top.0``) to module names of the full model."""
        return {
            name: f"{module.rpartition('.')[0]}.{number}"
            for (name, module), number in zip(self.layout.blocks.items(), self.kept, strict=True)
        }


def _ascending(numbers: tuple[int, ...], limit: float = math.inf) -> bool:
    return all(0 <= number < limit for number in numbers) and all(a < b for a, b in pairwise(numbers))


def owner_record_path(package: Path) -> Path:
    """Return where the record of the package at `package` stands: ``PACKAGE.owner.json``."""
    whole = Path(os.path.normpath(package.absolute()))  # "." and "PACKAGE/." have names too
    return whole.parent / f"{whole.name}.owner.json"


def write_owner_record(package: Path, record: OwnerRecord) -> Path:
    """Write the record beside the package, replacing an older one, and return its path."""
    path = owner_record_path(package)
    with staged_file(path, replace=True) as stage:
        stage.write_text(json.dumps(record.model_dump(mode="json"), sort_keys=True) + "\n", encoding="utf-8")
        stage.chmod(0o600)
    return path


def read_owner_record(path: Path) -> OwnerRecord:
    """Return the record in the file at `path`.

    Raises:
        ArtefactError: when there is no such file.
        BadSchema: when it does not have the form of a record.
    """
    if not path.is_file():
        raise ArtefactError(f"no owner's record {path.name!r}", hint="it stands beside the package that distill wrote")
    if path.stat().st_size > MANIFEST_LIMIT_BYTES:
        raise BadSchema(f"owner's record {path.name!r} is over {MANIFEST_LIMIT_BYTES} bytes")
    try:
        return OwnerRecord.model_validate_json(path.read_bytes())
    except ValueError:
        raise BadSchema(f"{path.name!r} is not an owner's record of this version") from None


def find_owner_record(package_digest: str, package: Path | None, near: list[Path]) -> OwnerRecord:
    """Return the record of the package with that digest.

    Args:
        package: the package's folder, if the caller named it; only its own record is then read.
        near: folders searched, one level deep, for ``*.owner.json`` when no package was named.

    Raises:
        ConfigError: when no record with that digest is found.
        BadSchema: when the named package's record is broken.
    """
    if package is not None:
        return read_owner_record(owner_record_path(package))
    for folder in near:
        for path in sorted([*folder.glob("*.owner.json"), *folder.glob("*/*.owner.json")]):
            if not path.is_file() or path.stat().st_size > MANIFEST_LIMIT_BYTES:
                continue
            if package_digest.encode() in path.read_bytes():
                record = read_owner_record(path)
                if record.package_digest == package_digest:
                    return record
    raise ConfigError(
        f"no owner's record for package {package_digest[:19]}... was found nearby",
        hint="name the package with --package PACKAGE",
    )
