"""Settings of ``offsite seal``, ``open`` and ``rewrap``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.audits.config import LeakageSettings, PackageGates
from offsite.config import KEYS, OUTPUT, POSITIONAL, USUAL
from offsite.keys.config import IdentityConfig


class SealConfig(IdentityConfig, PackageGates, LeakageSettings):
    """Settings of ``offsite seal INPUT -o SEALED --job JOB``."""

    verb: ClassVar[str] = "seal"

    input: Path = Field(
        description="a job, package, round or bundle folder, or one with results.json or report.json",
        json_schema_extra=POSITIONAL,
    )
    output: Path = Field(description="sealed folder to write", json_schema_extra=OUTPUT)
    job: Path | None = Field(
        None, description="folder of the job it belongs to; not needed for a job itself", json_schema_extra=USUAL
    )
    round: int | None = Field(
        None, ge=0, description="round of the job; default: 1 for a bundle, otherwise none", json_schema_extra=USUAL
    )
    audit: Path | None = Field(
        None, description="audit folder of this bundle or package, on which its gates are held", json_schema_extra=USUAL
    )


class OpenConfig(IdentityConfig):
    """Settings of ``offsite open SEALED -o OUTPUT``."""

    verb: ClassVar[str] = "open"

    sealed: Path = Field(description="a sealed folder", json_schema_extra=POSITIONAL)
    output: Path = Field(description="folder to write", json_schema_extra=OUTPUT)


class RewrapConfig(IdentityConfig):
    """Settings of ``offsite rewrap SEALED --to NEWKEYS -o SEALED2``."""

    verb: ClassVar[str] = "rewrap"

    sealed: Path = Field(description="a sealed folder addressed to the keys of --keys", json_schema_extra=POSITIONAL)
    to: Path = Field(description="keys folder that this same party uses from now on")
    output: Path = Field(description="sealed folder to write", json_schema_extra=OUTPUT)
    to_passphrase_file: Path | None = Field(
        None,
        description="file with the passphrase of --to, mode 0600; default: as for --passphrase-file",
        json_schema_extra=KEYS,
    )
