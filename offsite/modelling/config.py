"""Settings of ``offsite fetch``, and the full model that every verb of its owner names."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from offsite.config import MACHINE, POSITIONAL, USUAL, VerbConfig

_MODEL = "full model: a folder, a hub id, or a fetched name"


Stacks = Literal["both", "encoder", "decoder"]
"""Which of an encoder-decoder's stacks are cut."""


class ModelWord(VerbConfig):
    """Base of verbs whose first word is the full model."""

    model: str = Field(description=_MODEL, json_schema_extra=POSITIONAL)


class ModelFlag(VerbConfig):
    """Base of verbs that need the full model beside what they are about."""

    model: str = Field(description=_MODEL)


class BaseSettings(VerbConfig):
    """Base of verbs that take an adapted folder, whose full model may lie elsewhere than it says."""

    base: str | None = Field(
        None,
        description="full model, when the adapted folder holds only an adapter and names another one",
        json_schema_extra=USUAL,
    )


class FetchConfig(VerbConfig):
    """Settings of ``offsite fetch NAME``."""

    verb: ClassVar[str] = "fetch"

    name: str = Field(description="model to fetch; known: smollm2-135m", json_schema_extra=POSITIONAL)
    cache: Path | None = Field(
        None, description="cache folder; default: the user's cache, or OFFSITE_CACHE", json_schema_extra=MACHINE
    )
