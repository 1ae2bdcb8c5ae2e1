"""Settings of ``offsite demo``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import OUTPUT, PRIVACY, USUAL
from offsite.training.config import SeedSettings


class DemoConfig(SeedSettings):
    """Settings of ``offsite demo``."""

    verb: ClassVar[str] = "demo"

    output: Path = Field(Path("demo-out"), description="both parties' folders", json_schema_extra=USUAL | OUTPUT)
    short: bool = Field(
        False, description="the same path at a few steps, under six minutes on two cores", json_schema_extra=USUAL
    )
    dp: float | None = Field(
        None,
        gt=0,
        description="tune with differential privacy at this epsilon, audit it, and sign a privacy report",
        json_schema_extra=PRIVACY,
    )
    model: str = Field(
        "smollm2-135m", description="model to play with: a fetched name, a folder, or a hub id", json_schema_extra=USUAL
    )
