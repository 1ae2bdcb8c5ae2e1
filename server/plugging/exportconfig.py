"""Settings of ``offsite export``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from offsite.config import OUTPUT, POSITIONAL, USUAL, VerbConfig


class ExportConfig(VerbConfig):
    """Settings of ``offsite export LORA -o OUTPUT``."""

    verb: ClassVar[str] = "export"

    lora: Path = Field(description="adapted folder of a LoRA, as plug-in wrote it", json_schema_extra=POSITIONAL)
    to: Literal["vllm"] = Field("vllm", description="server that is to load it", json_schema_extra=USUAL)
    output: Path = Field(description="PEFT folder to write, for that server", json_schema_extra=OUTPUT)
