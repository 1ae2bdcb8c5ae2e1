"""Settings of ``offsite rehearse``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from adapters.rates import LEARNING_RATES
from adapters.settings import AdapterSettings
from offsite.text.config import TextSettings

SCALES = (1.0, 0.75, 0.5)


class RehearseConfig(AdapterSettings, TextSettings):
    """Settings of ``offsite rehearse MODEL --package PACKAGE --data TEXT -o REHEARSAL.json``."""

    verb: ClassVar[str] = "rehearse"

    model: str = Field(
        description="full model: a folder, a hub id, or a fetched name", json_schema_extra={"positional": True}
    )
    output: Path = Field(description="JSON file to write", json_schema_extra={"short": "-o"})
    package: Path = Field(description="package folder that a client would tune on")
    data: Path = Field(description="text like the clients', that you may tune on: .txt, .jsonl, .json or .csv, or .gz")
    heldout: Path | None = Field(None, description="more of it to measure on; default: --heldout-share of --data")
    heldout_share: float = Field(0.2, gt=0, lt=1, description="share of the documents that is not tuned on then")
    limit_tokens: int = Field(20_000, ge=0, description="tokens of held-out text, at most; 0 for all")

    learning_rate: tuple[float, ...] = Field(
        (),
        description="peak rate to try; repeat it for others; default: half, once and twice the kind's",
        json_schema_extra={"repeated": True},
    )
    scale: tuple[float, ...] = Field(
        (),
        description=f"share of the update to try; repeat it for others; default: {', '.join(f'{s:g}' for s in SCALES)}",
        json_schema_extra={"repeated": True},
    )
    steps: int = Field(100, ge=1, description="optimiser steps of each run, about as many as clients will take")
    batch_size: int = Field(4, ge=1, description="sequences per optimiser step")
    validation: float = Field(0.1, gt=0, lt=1, description="share of the documents that choose each run's checkpoint")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="arithmetic of tuning; measured in fp32")
    seed: int = Field(0, ge=0, description="seed of each run")
    device: str = Field("auto", description="cpu, cuda, or auto for an accelerator if there is one")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problems = []
        if self.adapter not in LEARNING_RATES:
            problems.append(f"--adapter: no kind {self.adapter!r}, expected one of {', '.join(LEARNING_RATES)}")
        for flag, values in {"--learning-rate": self.learning_rate, "--scale": self.scale}.items():
            if any(not 0 < value <= 1 for value in values):
                problems.append(f"{flag}: expected more than 0 and at most 1")
            if len({f"{value:g}" for value in values}) != len(values):
                problems.append(f"{flag}: one value is given twice")
        if self.adapter == "dora" and any(scale != 1 for scale in self.scale):
            problems.append("--scale: a dora adapter is plugged in whole or not")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates that are tried, from the lowest."""
        usual = LEARNING_RATES[self.adapter]
        return tuple(sorted(self.learning_rate)) or (usual / 2, usual, usual * 2)

    @property
    def scales(self) -> tuple[float, ...]:
        """Shares of the update that are tried, from the largest."""
        return tuple(sorted(self.scale, reverse=True)) or ((1.0,) if self.adapter == "dora" else SCALES)
