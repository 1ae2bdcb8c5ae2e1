"""Settings of ``offsite export``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from offsite.config import OUTPUT, POSITIONAL, USUAL
from offsite.modelling.config import BaseSettings

Target = Literal["vllm", "gguf"]


class ExportConfig(BaseSettings):
    """Settings of ``offsite export LORA -o OUTPUT``."""

    verb: ClassVar[str] = "export"

    lora: Path = Field(description="adapted folder of a LoRA, as plug-in wrote it", json_schema_extra=POSITIONAL)
    to: Target = Field(
        "vllm",
        description="what is to load it: vllm, or llama.cpp beside a GGUF file of the full model",
        json_schema_extra=USUAL,
    )
    output: Path = Field(description="PEFT folder to write, or GGUF file", json_schema_extra=OUTPUT)

    @model_validator(mode="after")
    def _base(self) -> Self:
        if self.base is not None and self.to != "gguf":
            raise ValueError("--base goes with --to gguf: nothing of the full model is needed otherwise")
        return self
