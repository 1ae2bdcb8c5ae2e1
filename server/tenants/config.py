"""Settings of ``offsite tenant``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import LIMITS, OUTPUT, POSITIONAL, REPEATED, USUAL, VerbConfig

TENANT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class TenantConfig(VerbConfig):
    """What every verb on tenants needs: their file."""

    tenants: Path = Field(description="file with the tenants; tenant add makes one")


class NamedTenantConfig(TenantConfig):
    """What every verb on one tenant needs, too: its name."""

    tenant: str = Field(
        pattern=TENANT_PATTERN,
        description="name of the tenant: letters, digits, '.', '_', '-'",
        json_schema_extra=POSITIONAL,
    )


class TenantAddConfig(NamedTenantConfig):
    """Settings of ``offsite tenant add TENANT --tenants FILE -o KEY``."""

    verb: ClassVar[str] = "tenant add"

    output: Path = Field(description="file to write the key to, mode 0600", json_schema_extra=OUTPUT)
    models: tuple[str, ...] = Field(
        (),
        description="model that the tenant may ask for; may be repeated; default: every one",
        json_schema_extra=USUAL | REPEATED,
    )
    requests_at_once: int = Field(
        0, ge=0, description="requests under way at once; then 429; 0: no limit", json_schema_extra=LIMITS
    )
    tokens_per_day: int = Field(
        0,
        ge=0,
        description="tokens of prompts and answers a day (UTC); then 429; 0: no limit",
        json_schema_extra=LIMITS,
    )


class TenantListConfig(TenantConfig):
    """Settings of ``offsite tenant list --tenants FILE``."""

    verb: ClassVar[str] = "tenant list"


class TenantRevokeConfig(NamedTenantConfig):
    """Settings of ``offsite tenant revoke TENANT --tenants FILE``."""

    verb: ClassVar[str] = "tenant revoke"
