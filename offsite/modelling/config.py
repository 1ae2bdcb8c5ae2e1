"""Settings of ``offsite fetch``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import VerbConfig


class FetchConfig(VerbConfig):
    """Settings of ``offsite fetch NAME``."""

    verb: ClassVar[str] = "fetch"

    name: str = Field(description="model to fetch; known: smollm2-135m", json_schema_extra={"positional": True})
    cache: Path | None = Field(None, description="cache folder; default: the user's cache, or OFFSITE_CACHE")
