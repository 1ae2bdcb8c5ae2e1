"""Settings of ``offsite plug-in``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from server.registry.config import RegistryConfig


class PlugConfig(RegistryConfig):
    """Settings of ``offsite plug-in MODEL ID --registry DIR -o ADAPTED``."""

    verb: ClassVar[str] = "plug-in"

    model: str = Field(
        description="full model: a folder, a hub id, or a fetched name", json_schema_extra={"positional": True}
    )
    id: str = Field(description="id of a bundle that was taken in and accepted", json_schema_extra={"positional": True})
    output: Path = Field(description="adapted folder to write", json_schema_extra={"short": "-o"})
    package: Path | None = Field(
        None, description="package the bundle was tuned on; default: where it was when its job was made"
    )
    scale: float = Field(1.0, gt=0, le=1, description="share of the adapter's update that is plugged in; not for dora")
    merge: bool = Field(False, description="write a whole checkpoint with the adapter merged in, in the model's dtype")
