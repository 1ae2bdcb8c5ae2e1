"""Settings of ``offsite federate simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from adapters.settings import AdapterShape
from offsite.config import ADAPTER, USUAL
from server.federation.config import RoundsConfig
from server.registry.config import NormCaps


class SimulateConfig(RoundsConfig, AdapterShape, NormCaps):
    """Settings of ``offsite federate simulate --work DIR --clients NAME=FILE,NAME=FILE``.

    Keys, registry and jobs are made in the work folder.
    """

    verb: ClassVar[str] = "federate simulate"

    work: Path = Field(description="folder for everybody's keys, rounds and bundles; the same folder goes on")
    clients: dict[str, str] = Field(description="private text of each client, as NAME=FILE")
    tune: dict[str, Any] = Field(
        {}, description="settings of offsite tune, the same for all clients", json_schema_extra=USUAL
    )
    adapter: str = Field(
        "lora", description="adapter that the jobs ask for: blocks, lora, rslora or bitfit", json_schema_extra=ADAPTER
    )
    lora_rank: int = Field(8, ge=1, description="rank of a low-rank adapter", json_schema_extra=ADAPTER)

    @model_validator(mode="after")
    def _enough_clients(self) -> Self:
        if len(self.clients) < self.min_clients:
            raise ValueError(f"--clients: {len(self.clients)} client(s), --min-clients {self.min_clients}")
        return self
