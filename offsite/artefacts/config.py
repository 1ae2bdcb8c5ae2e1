"""Settings of ``offsite inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import POSITIONAL, USUAL, VerbConfig


class InspectConfig(VerbConfig):
    """Settings of ``offsite inspect ARTEFACT``."""

    verb: ClassVar[str] = "inspect"

    artefact: Path = Field(description="a package or bundle folder", json_schema_extra=POSITIONAL)
    tensors: bool = Field(False, description="list every tensor with its shape and dtype", json_schema_extra=USUAL)
