"""Settings of ``offsite generate``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from offsite.config import OUTPUT, POSITIONAL, REPEATED, USUAL
from offsite.modelling.config import BaseSettings
from offsite.text.config import ColumnSettings, TextFiles
from offsite.training.config import DeviceSettings, SeedSettings


class GenerateConfig(ColumnSettings, BaseSettings, SeedSettings, DeviceSettings):
    """Settings of ``offsite generate PACKAGE|MODEL|ADAPTED --prompt TEXT``."""

    verb: ClassVar[str] = "generate"

    model: str = Field(
        description="package folder, adapted folder, or full model: a folder, a hub id, or a fetched name",
        json_schema_extra=POSITIONAL,
    )
    bundle: Path | None = Field(
        None, description="bundle folder whose adapter is put on the package's model", json_schema_extra=USUAL
    )
    prompt: tuple[str, ...] = Field(
        (),
        description="text to go on from, shown as it is written; repeat it for others",
        json_schema_extra=USUAL | REPEATED,
    )
    file: TextFiles = Field(
        (),
        description="rows of prompt, or of messages, that are answered one after the other into -o; may be repeated",
        json_schema_extra=USUAL | REPEATED,
    )
    output: Path | None = Field(
        None, description="of --file: .jsonl file of answers to write", json_schema_extra=USUAL | OUTPUT
    )
    chat: bool = Field(
        False,
        description="a prompt is what a user says: the model's chat template is put around it",
        json_schema_extra=USUAL,
    )
    max_tokens: int = Field(256, ge=1, description="tokens of an answer, at most", json_schema_extra=USUAL)
    temperature: float = Field(
        0.0, ge=0, description="what scores are divided by; 0: the likeliest token every time", json_schema_extra=USUAL
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="draw among the likeliest tokens that together are so likely",
        json_schema_extra=USUAL,
    )
    stop: tuple[str, ...] = Field(
        (), description="text that ends an answer before it; repeat it for others", json_schema_extra=USUAL | REPEATED
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problems = []
        if bool(self.prompt) == bool(self.file):
            problems.append("--prompt, --file: one of the two says what is asked")
        if self.file and self.output is None:
            problems.append("--file: -o says where its answers go")
        if self.prompt and self.output is not None:
            problems.append("-o: answers to --prompt are shown and printed; put the prompts into a --file to keep them")
        if self.prompt and self.fields:
            problems.append("--fields: they are of --file")
        if any(not one for one in (*self.prompt, *self.stop)):
            problems.append("--prompt, --stop: an empty text")
        if problems:
            raise ValueError("; ".join(problems))
        return self
