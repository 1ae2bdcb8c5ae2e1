"""Settings of the verbs that belong to no role: fetch, inspect, report, demo."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic.config import JsonDict

from offsite.config import VerbConfig

POSITIONAL: JsonDict = {"positional": True}


class FetchConfig(VerbConfig):
    """Settings of ``offsite fetch NAME``."""

    verb: ClassVar[str] = "fetch"

    name: str = Field(description="model to fetch; known: smollm2-135m", json_schema_extra=POSITIONAL)
    cache: Path | None = Field(None, description="cache folder; default: the user's cache, or OFFSITE_CACHE")


class InspectConfig(VerbConfig):
    """Settings of ``offsite inspect ARTEFACT``."""

    verb: ClassVar[str] = "inspect"

    artefact: Path = Field(description="a package or bundle folder", json_schema_extra=POSITIONAL)
    tensors: bool = Field(False, description="list every tensor with its shape and dtype")


class ReportConfig(VerbConfig):
    """Settings of ``offsite report run FOLDER -o report.html``."""

    verb: ClassVar[str] = "report run"

    folder: Path = Field(description="the folder that evaluate wrote", json_schema_extra=POSITIONAL)
    output: Path = Field(description="the page to write", json_schema_extra={"short": "-o"})


class DemoConfig(VerbConfig):
    """Settings of ``offsite demo``."""

    verb: ClassVar[str] = "demo"

    output: Path = Field(Path("demo-out"), description="both parties' folders", json_schema_extra={"short": "-o"})
    short: bool = Field(False, description="the same path at a few steps, under six minutes on two cores")
    dp: float | None = Field(
        None, gt=0, description="tune with differential privacy at this epsilon, audit it, and sign a privacy report"
    )
    seed: int = Field(0, ge=0, description="seed of the data order and of the adapter's start")
    model: str = Field("smollm2-135m", description="model to play with: a fetched name, a folder, or a hub id")
