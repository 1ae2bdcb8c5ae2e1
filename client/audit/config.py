"""Settings of ``offsite audit bundle``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from client.tuning.config import EvalSettings
from offsite.audits.record import MAX_RETUNINGS
from offsite.config import MACHINE, MEASURING, OUTPUT, POSITIONAL, PRIVACY, REPEATED, USUAL, VerbConfig
from offsite.text.config import TextFiles
from offsite.training.config import CacheSettings, DeviceSettings, SeedSettings


class RetuningSettings(VerbConfig):
    """Base of verbs that may do a run again, to attack what it gives away of few rows."""

    retunings: int | None = Field(
        None,
        ge=0,
        le=MAX_RETUNINGS,
        description="how often the run is done again on a random half of its rows, for attacks on small data; default: "
        "as often as so many rows need, none where 1,000 rows were set aside; 0: never",
        json_schema_extra=PRIVACY,
    )
    retuning_minutes: float = Field(
        240.0, gt=0, description="minutes after which no other retuning is begun", json_schema_extra=PRIVACY
    )


class AuditBundleConfig(EvalSettings, RetuningSettings, CacheSettings, DeviceSettings, SeedSettings):
    """Settings of ``offsite audit bundle PACKAGE BUNDLE --data FILE -o AUDIT``."""

    verb: ClassVar[str] = "audit bundle"

    package: Path = Field(description="package folder that was tuned on", json_schema_extra=POSITIONAL)
    bundle: Path = Field(description="bundle folder, its BUNDLE.run.json beside it", json_schema_extra=POSITIONAL)
    data: TextFiles = Field(
        min_length=1,
        description="private text that was tuned on, the same files or folders in the same order; may be repeated",
        json_schema_extra=REPEATED,
    )
    output: Path = Field(description="audit folder to write", json_schema_extra=OUTPUT)

    round: Path | None = Field(
        None,
        description="opened folder of the federation's round that the bundle answers, on whose weights it was tuned",
        json_schema_extra=USUAL,
    )
    nonmembers: TextFiles = Field(
        (),
        description="rows like those trained on that no run has read, in files of the same form; may be repeated; "
        "default: the documents that --audit-share set aside, otherwise those validated on",
        json_schema_extra=USUAL | REPEATED,
    )
    canaries: Path | None = Field(
        None, description="folder of the canaries that the run trained on", json_schema_extra=USUAL
    )
    keep_scores: Path | None = Field(
        None,
        description="file to write, for an output checker: every row's score, in no order of the data; keep it here",
        json_schema_extra=USUAL,
    )
    tokens_per_row: int = Field(
        128, ge=2, description="tokens of a row that are scored, at most, from its first", json_schema_extra=MEASURING
    )
    rows: int = Field(
        2000, ge=1, description="rows trained on, and rows not, that are scored at most", json_schema_extra=MEASURING
    )
    secrets_samples: int = Field(
        16, ge=0, description="draws in which each made-up secret is asked for", json_schema_extra=MEASURING
    )
    batch_size: int = Field(16, ge=1, description="rows that go through the model at once", json_schema_extra=MACHINE)
