"""Settings of ``offsite canaries``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import MACHINE, MEASURING, OUTPUT, POSITIONAL, USUAL
from offsite.training.config import DeviceSettings


class CanaryConfig(DeviceSettings):
    """Settings of ``offsite canaries PACKAGE -o CANARIES``: send its commitment/ before tuning, reveal/ afterwards."""

    verb: ClassVar[str] = "canaries"

    package: Path = Field(description="package folder, to be tuned on", json_schema_extra=POSITIONAL)
    output: Path = Field(
        description="folder to write; seal its commitment/ before tuning, its reveal/ once the bundle is sent",
        json_schema_extra=OUTPUT,
    )
    job: Path | None = Field(
        None, description="folder of the job, for canaries that the owner is to check", json_schema_extra=USUAL
    )
    count: int = Field(
        1000, ge=1, le=10_000, description="made-up texts, about half of which are trained on", json_schema_extra=USUAL
    )
    secrets: int = Field(
        16, ge=0, le=256, description="made-up secrets, about half of which are trained on", json_schema_extra=USUAL
    )
    repeats: int = Field(
        1, ge=1, le=1000, description="how often a secret stands in the training text", json_schema_extra=USUAL
    )
    tokens: int = Field(64, ge=8, le=1024, description="tokens of a made-up text, at most", json_schema_extra=MEASURING)
    temperature: float = Field(
        1.0, ge=0.8, le=5, description="at which the package's model makes up the texts", json_schema_extra=MEASURING
    )
    candidates: int = Field(
        256,
        ge=2,
        le=1024,
        description="secrets that each one is ranked among, itself included",
        json_schema_extra=MEASURING,
    )
    batch_size: int = Field(128, ge=1, description="texts made up at a time", json_schema_extra=MACHINE)
