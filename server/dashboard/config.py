"""Settings of ``offsite owner init`` and ``offsite owner up``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from offsite.config import LIMITS, NETWORK, POSITIONAL, USUAL
from offsite.keys.config import NewKeysConfig
from server.exchange.config import AddressSettings, ServeExchangeConfig

INVITATIONS, WITHDRAWALS = "invitations", "withdrawals"
"""Folders in the project's, for what the dashboard writes."""


class OwnerInitConfig(NewKeysConfig, AddressSettings):
    """Settings of ``offsite owner init MODEL``."""

    verb: ClassVar[str] = "owner init"

    model: str = Field(
        description="the full model: a folder, a hub id, or a name that offsite fetch knows",
        json_schema_extra=POSITIONAL,
    )

    @model_validator(mode="after")
    def _encrypted(self) -> Self:
        if self.url is not None and not self.url.startswith("https://"):
            raise ValueError("--url: offsite owner up serves with TLS, expected https://...")
        return self


class OwnerUpConfig(AddressSettings, ServeExchangeConfig):
    """Settings of ``offsite owner up``; what is not given stands in the table ``[owner]`` of ``offsite.toml``."""

    verb: ClassVar[str] = "owner up"
    project_table: ClassVar[str] = "owner"
    project_begins: ClassVar[str] = "offsite owner init MODEL"

    model: str = Field("", description="the full model, for commands that are shown", json_schema_extra=USUAL)
    home: Path = Field(
        Path(),
        description="the project's folder: invitations and withdrawals are written there, and packages, jobs, results, "
        "audits and reports in it are shown",
        json_schema_extra=USUAL,
    )
    outbox: Path = Field(
        Path("outbox"),
        description="folder with what offsite seal wrote for clients; more can be added while serving",
        json_schema_extra=USUAL,
    )
    dashboard_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="address of the dashboard; this one is for this machine alone, whoever reaches another one meets "
        "the login",
        json_schema_extra=NETWORK,
    )
    dashboard_port: int = Field(
        8444, ge=0, le=65535, description="TCP port of the dashboard; 0 takes any free one", json_schema_extra=NETWORK
    )
    new_token: bool = Field(
        False,
        description="make a new token for the dashboard; the one before counts no longer",
        json_schema_extra=USUAL,
    )
    idle_minutes: int = Field(
        60,
        ge=1,
        le=720,
        description="minutes without a click after which the dashboard asks for the token again",
        json_schema_extra=LIMITS,
    )
