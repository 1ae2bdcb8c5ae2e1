"""Settings of ``offsite inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, ValidationInfo, field_validator

from offsite.config import KEYS, POSITIONAL, USUAL, VerbConfig
from offsite.keys.config import home_expanded


class InspectConfig(VerbConfig):
    """Settings of ``offsite inspect THING``."""

    verb: ClassVar[str] = "inspect"

    thing: Path = Field(
        description="a file or folder that offsite wrote, or a folder of such", json_schema_extra=POSITIONAL
    )
    tensors: bool = Field(
        False,
        description="list every tensor of a package, bundle or round, with shape and dtype",
        json_schema_extra=USUAL,
    )
    keys: Path | None = Field(
        None,
        description="keys folder by whose pinned cards parties are named and seals verified; default: the one in "
        "~/.offsite, where there is one",
        json_schema_extra=KEYS,
    )

    @field_validator("keys", mode="before")
    @classmethod
    def _home(cls, path: object, info: ValidationInfo) -> object:
        return home_expanded(path, info)
