"""The owner's record of a package: what only the owner may know, kept beside it and never shipped.

It maps the package's own numbering back to the full model: which block each package block stands for, and which
MLP channels of it were kept. Plugging in renumbers from it.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from offsite.digests import DIGEST_PATTERN
from offsite.errors import ArtefactError, BadSchema, ConfigError
from offsite.manifest import MANIFEST_LIMIT_BYTES, Strict
from offsite.package import Layout
from offsite.staging import staged_file
from offsite.tensors import TensorSpec

OWNER_FORMAT = "offsite/owner/1"


class OwnerRecord(Strict):
    """How one package maps onto the full model.

    ``kept`` holds the full-model block number of every package block, in package order; ``channels`` the kept MLP
    channels per block (``middle.3`` -> ascending numbers), absent when all were kept.
    """

    format: str = OWNER_FORMAT
    package_digest: str = Field(pattern=DIGEST_PATTERN)
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    layout: Layout
    block_tensors: dict[str, TensorSpec]
    num_blocks: int = Field(ge=1)
    kept: tuple[int, ...]
    channels: dict[str, tuple[int, ...]] = {}

    @property
    def sites(self) -> dict[str, str]:
        """Map canonical blocks (``top.0``) to module names of the full model."""
        return {
            name: f"{self.layout.stack}.{number}" for name, number in zip(self.layout.blocks, self.kept, strict=True)
        }


def owner_record_path(package: Path) -> Path:
    """Return where the record of the package at `package` stands: ``PACKAGE.owner.json``."""
    return package.parent / f"{package.name}.owner.json"


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
            raw = path.read_bytes()
            if package_digest.encode() in raw:
                return read_owner_record(path)
    raise ConfigError(
        f"no owner's record for package {package_digest[:19]}... was found nearby",
        hint="name the package with --package PACKAGE",
    )
