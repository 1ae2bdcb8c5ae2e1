"""Settings of ``offsite task baseline``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from offsite.config import LIMITS, MACHINE, MEASURING, OUTPUT, REPEATED, USUAL
from offsite.evaluation.config import ExactSettings
from offsite.tasks.config import TaskWord
from offsite.training.config import SeedSettings

Method = Literal["zero-shot", "in-context", "nearest", "chain-of-thought", "least-to-most"]
METHODS: tuple[Method, ...] = ("zero-shot", "in-context", "nearest", "chain-of-thought", "least-to-most")


class BaselineConfig(TaskWord, SeedSettings, ExactSettings):
    """Settings of ``offsite task baseline TASK --model PACKAGE|MODEL -o FILE``."""

    verb: ClassVar[str] = "task baseline"

    output: Path = Field(description="JSON file of figures to write", json_schema_extra=OUTPUT)
    model: tuple[str, ...] = Field(
        min_length=1,
        description="package folder, or full model: a folder, a hub id, or a fetched name; repeat it for others",
        json_schema_extra=REPEATED,
    )
    method: tuple[Method, ...] = Field(
        METHODS,
        min_length=1,
        description=f"ways of asking: {', '.join(METHODS)}; repeat it for several; default: all that the task allows",
        json_schema_extra=USUAL | REPEATED,
    )
    shots: int = Field(
        4, ge=1, le=64, description="samples shown in-context, at most, and nearest", json_schema_extra=USUAL
    )
    rows: int = Field(0, ge=0, description="rows measured on, from the first; 0: all", json_schema_extra=USUAL)
    thought_tokens: int = Field(
        48,
        ge=1,
        le=4096,
        description="tokens of a chain of thought, or of a decomposition",
        json_schema_extra=MEASURING,
    )
    part_tokens: int = Field(
        24, ge=1, le=4096, description="tokens of the answer to one part of a question", json_schema_extra=MEASURING
    )
    parts: int = Field(3, ge=1, le=16, description="parts of a question, at most", json_schema_extra=LIMITS)
    rows_at_once: int = Field(
        8, ge=1, description="rows that are answered and kept together", json_schema_extra=MACHINE
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problems = [
            f"--model: {name!r} is given twice" for name in sorted({n for n in self.model if self.model.count(n) > 1})
        ]
        problems += [f"--method: {m} is given twice" for m in METHODS if self.method.count(m) > 1]
        if problems:
            raise ValueError("; ".join(problems))
        return self
