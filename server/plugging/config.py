"""Settings of ``offsite plug-in``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import OUTPUT, USUAL, VerbConfig
from offsite.modelling.config import ModelWord
from server.registry.config import RegisteredConfig


class ScaleSettings(VerbConfig):
    """Base of verbs that plug in an update: how much of it, and whether it is corrected first."""

    scale: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the adapter's update that is plugged in; not for dora",
        json_schema_extra=USUAL,
    )
    correct: bool = Field(
        False,
        description="take the emulator's fault along the adapter's own directions out of the update, so that the full "
        "model computes on them what was tuned; lora and rslora on packages of method low-rank or packed",
        json_schema_extra=USUAL,
    )


class AcceptedConfig(RegisteredConfig, ModelWord):
    """Base of verbs that put an accepted bundle into the full model."""

    package: Path | None = Field(
        None,
        description="package the bundle was tuned on; default: where it was when its job was made",
        json_schema_extra=USUAL,
    )


class PlugConfig(AcceptedConfig, ScaleSettings):
    """Settings of ``offsite plug-in MODEL ID --registry DIR -o ADAPTED``."""

    verb: ClassVar[str] = "plug-in"

    output: Path = Field(description="adapted folder to write", json_schema_extra=OUTPUT)
    merge: bool = Field(
        False,
        description="write a whole checkpoint with the adapter merged in, in the model's dtype",
        json_schema_extra=USUAL,
    )
    results: Path | None = Field(
        None,
        description="results folder of evaluating this bundle; its figures go into the README",
        json_schema_extra=USUAL,
    )
