"""Settings of a measurement, declared once for every verb that measures a model on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from offsite.config import MACHINE, MEASURING, REPEATED
from offsite.text.config import PackedTextSettings
from offsite.training.config import DeviceSettings


class HeldoutSettings(PackedTextSettings):
    """Base of verbs that measure skill: on held-out text, and on tasks."""

    limit_tokens: int = Field(
        0, ge=0, description="tokens of held-out text measured on, at most; 0 for all", json_schema_extra=MEASURING
    )
    task: tuple[Path, ...] = Field(
        (),
        description="multiple-choice rows (question, choices, answer) in .jsonl, or a harness task in .yaml; repeat it "
        "for others; needs the eval extra",
        json_schema_extra=MEASURING | REPEATED,
    )
    task_limit: int = Field(
        0, ge=0, description="rows of each task, from the first; 0 for all", json_schema_extra=MEASURING
    )


class ExactSettings(DeviceSettings):
    """Base of verbs whose figures are measured, not trained: exactly, unless they say otherwise."""

    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="arithmetic and dtype of every model measured", json_schema_extra=MACHINE
    )
