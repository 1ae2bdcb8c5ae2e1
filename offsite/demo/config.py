"""Settings of ``offsite demo``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import VerbConfig


class DemoConfig(VerbConfig):
    """Settings of ``offsite demo``."""

    verb: ClassVar[str] = "demo"

    output: Path = Field(Path("demo-out"), description="both parties' folders", json_schema_extra={"short": "-o"})
    short: bool = Field(False, description="the same path at a few steps, under six minutes on two cores")
    dp: float | None = Field(
        None, gt=0, description="tune with differential privacy at this epsilon, audit it, and sign a privacy report"
    )
    seed: int = Field(0, ge=0, description="seed of the data order and of the adapter's start")
    model: str = Field("smollm2-135m", description="model to play with: a fetched name, a folder, or a hub id")
