"""Settings of ``offsite demo``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

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
    task: Path | None = Field(
        None,
        description="play a task: folder of task.yaml, rows.jsonl.gz and heldout.jsonl.gz, as in examples/tasks",
        json_schema_extra=USUAL,
    )
    model: str = Field(
        "smollm2-135m", description="model to play with: a fetched name, a folder, or a hub id", json_schema_extra=USUAL
    )

    @model_validator(mode="after")
    def _one_play(self) -> Self:
        if self.task is not None and self.dp is not None:
            raise ValueError("--task: is played without differential privacy; leave --dp out")
        return self
