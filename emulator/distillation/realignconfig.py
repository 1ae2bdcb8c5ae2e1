"""Settings of ``offsite realign``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from emulator.distillation.config import FidelitySettings, OwnPackageSettings
from offsite.config import OUTPUT, POSITIONAL, REPEATED, TRAINING, USUAL
from offsite.text.config import BlockSettings, TextFiles
from offsite.training.config import ResumableSettings


class RealignConfig(OwnPackageSettings, BlockSettings, ResumableSettings, FidelitySettings):
    """Settings of ``offsite realign PACKAGE ROUND --model MODEL --public TEXT -o OUTPUT``."""

    verb: ClassVar[str] = "realign"

    round: Path = Field(
        description="round folder with what the federation's rounds have added", json_schema_extra=POSITIONAL
    )
    public: TextFiles = Field(
        min_length=1,
        description="public text: .txt, .jsonl, .json, .csv or .tsv, or those as .gz, or .parquet; may be repeated",
        json_schema_extra=REPEATED,
    )
    output: Path = Field(description="folder to write: the emulator's difference", json_schema_extra=OUTPUT)
    rank: int | None = Field(
        None, ge=1, description="cut the difference to this rank; its error is told", json_schema_extra=USUAL
    )
    steps: int = Field(40, ge=1, description="optimiser steps", json_schema_extra=USUAL)
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate of AdamW", json_schema_extra=TRAINING)
    warmup_steps: int = Field(
        5, ge=0, description="steps of linear warm-up before the cosine", json_schema_extra=TRAINING
    )
