"""Settings of ``offsite audit bundle``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import VerbConfig


class AuditBundleConfig(VerbConfig):
    """Settings of ``offsite audit bundle PACKAGE BUNDLE --data FILE -o AUDIT``."""

    verb: ClassVar[str] = "audit bundle"

    package: Path = Field(description="package folder that was tuned on", json_schema_extra={"positional": True})
    bundle: Path = Field(
        description="bundle folder, its BUNDLE.run.json beside it", json_schema_extra={"positional": True}
    )
    data: Path = Field(description="private text that was tuned on, the same file")
    output: Path = Field(description="audit folder to write", json_schema_extra={"short": "-o"})

    round: Path | None = Field(
        None,
        description="opened folder of the federation's round that the bundle answers, on whose weights it was tuned",
    )
    nonmembers: Path | None = Field(
        None,
        description="rows like those trained on that no run has read, in a file of the same form; default: the "
        "documents that --audit-share set aside, otherwise those validated on",
    )
    canaries: Path | None = Field(None, description="folder of the canaries that the run trained on")
    tokens_per_row: int = Field(128, ge=2, description="tokens of a row that are scored, at most, from its first")
    rows: int = Field(2000, ge=1, description="rows trained on, and rows not, that are scored at most")
    secrets_samples: int = Field(16, ge=0, description="draws in which each made-up secret is asked for")
    batch_size: int = Field(16, ge=1, description="rows that go through the model at once")
    seed: int = Field(0, ge=0, description="seed of the choice of rows and of the draws")
    device: str = Field("auto", description="cpu, cuda, or auto for an accelerator if there is one")
