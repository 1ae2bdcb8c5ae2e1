"""Settings of ``offsite report run``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import OUTPUT, POSITIONAL, VerbConfig


class ReportConfig(VerbConfig):
    """Settings of ``offsite report run FOLDER -o report.html``."""

    verb: ClassVar[str] = "report run"

    folder: Path = Field(description="the folder that evaluate wrote", json_schema_extra=POSITIONAL)
    output: Path = Field(description="the page to write", json_schema_extra=OUTPUT)
