"""Settings of ``offsite audit plugged-in``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import MACHINE, MEASURING, OUTPUT, PRIVACY
from offsite.evaluation.config import ExactSettings
from offsite.training.config import SeedSettings
from server.plugging.config import AcceptedConfig, CorrectSettings, MeasuredWaySettings


class AuditPluggedConfig(AcceptedConfig, MeasuredWaySettings, CorrectSettings, ExactSettings, SeedSettings):
    """Settings of ``offsite audit plugged-in MODEL ID --registry DIR --commitment DIR --reveal DIR -o AUDIT``."""

    verb: ClassVar[str] = "audit plugged-in"

    output: Path = Field(description="audit folder to write", json_schema_extra=OUTPUT)
    commitment: Path = Field(description="the client's commitment, opened: it came before the bundle")
    reveal: Path = Field(description="the canaries that the client revealed, opened")
    epsilon: float | None = Field(
        None, ge=0, description="epsilon that the client claims, to hold the bound against", json_schema_extra=PRIVACY
    )
    delta: float = Field(1e-5, ge=0, lt=1, description="delta of that claim", json_schema_extra=PRIVACY)
    samples: int = Field(
        50, ge=0, le=1000, description="draws for each secret, to read it back out", json_schema_extra=MEASURING
    )
    batch_size: int = Field(32, ge=1, description="rows in one forward pass", json_schema_extra=MACHINE)
