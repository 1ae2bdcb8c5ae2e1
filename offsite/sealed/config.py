"""Settings of ``offsite seal``, ``open`` and ``rewrap``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic.config import JsonDict

from offsite.keys.config import IdentityConfig

POSITIONAL: JsonDict = {"positional": True}
OUTPUT: JsonDict = {"short": "-o"}


class SealConfig(IdentityConfig):
    """Settings of ``offsite seal INPUT -o SEALED --job JOB``."""

    verb: ClassVar[str] = "seal"

    input: Path = Field(
        description="a job, package, round or bundle folder, or one with results.json or report.json",
        json_schema_extra=POSITIONAL,
    )
    output: Path = Field(description="sealed folder to write", json_schema_extra=OUTPUT)
    job: Path | None = Field(None, description="folder of the job it belongs to; not needed for a job itself")
    round: int | None = Field(None, ge=0, description="round of the job; default: 1 for a bundle, otherwise none")
    audit: Path | None = Field(None, description="audit folder of this bundle or package, on which its gates are held")
    accept_leakage: bool = Field(
        False, description="bundle: let it go although a gate failed or nothing was measured; reports show that"
    )
    max_capability: float | None = Field(
        None, description="package: largest share of the full model's skill the emulator may have; needs --audit"
    )
    max_recovery: float | None = Field(
        None, description="package: largest share of lost capability an attack may have regained; needs --audit"
    )
    max_union: float | None = Field(
        None, ge=0, le=1, description="package: largest share of the middle in all packages together; needs --audit"
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
        None, description="file with the passphrase of --to, mode 0600; default: as for --passphrase-file"
    )
