"""Settings of ``offsite realign``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from offsite.config import VerbConfig


class RealignConfig(VerbConfig):
    """Settings of ``offsite realign PACKAGE ROUND --model MODEL --public TEXT -o OUTPUT``."""

    verb: ClassVar[str] = "realign"

    package: Path = Field(
        description="package folder, its owner's record beside it", json_schema_extra={"positional": True}
    )
    round: Path = Field(
        description="round folder with what the federation's rounds have added", json_schema_extra={"positional": True}
    )
    model: str = Field(description="the full model: a folder, a hub id, or a fetched name")
    public: Path = Field(description="public text: .txt, .jsonl, .json or .csv, each optionally .gz")
    output: Path = Field(description="folder to write: the emulator's difference", json_schema_extra={"short": "-o"})
    rank: int | None = Field(None, ge=1, description="cut the difference to this rank; its error is told")
    steps: int = Field(40, ge=1, description="optimiser steps")
    batch_size: int = Field(4, ge=1, description="blocks of text in one step")
    block_tokens: int = Field(256, ge=2, description="tokens in one block of text")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate of AdamW")
    warmup_steps: int = Field(5, ge=0, description="steps of linear warm-up before the cosine")
    holdout: float = Field(0.05, gt=0, lt=1, description="share of the public documents held out to measure fidelity")
    evaluation_tokens: int = Field(8192, ge=1, description="held-out tokens per measurement of fidelity, at most")
    seed: int = Field(0, ge=0, description="seed of the data order and of the drawn positions")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="arithmetic of the forward pass")
    device: str = Field("auto", description="cpu, cuda, or auto for an accelerator if there is one")
    resume: bool = Field(False, description="go on from the newest checkpoint in OUTPUT.work")
