"""Settings of ``offsite exchange pull``, ``push`` and ``status``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from offsite.config import KEYS, LIMITS, NETWORK, OUTPUT, POSITIONAL, USUAL, VerbConfig
from offsite.keys.config import IdentityConfig


class ExchangeConfig(IdentityConfig):
    """What every verb that talks to an exchange needs."""

    url: str = Field(
        description="address of the owner's exchange, as in https://owner.example:8443", json_schema_extra=POSITIONAL
    )
    certificate: Path | None = Field(
        None,
        description="the exchange's TLS certificate, PEM, trusted alone; default: the usual authorities",
        json_schema_extra=NETWORK,
    )
    owner: str | None = Field(
        None,
        description="name or fingerprint of the owner, pinned by trust add; default: the only party pinned",
        json_schema_extra=KEYS,
    )
    patience_seconds: float = Field(
        60.0,
        ge=0,
        description="seconds without progress for which a busy or broken connection is tried again",
        json_schema_extra=NETWORK,
    )
    timeout_seconds: float = Field(
        30.0, gt=0, description="seconds in which the exchange must answer or send", json_schema_extra=NETWORK
    )

    @field_validator("owner")
    @classmethod
    def _as_compared(cls, fingerprint: str | None) -> str | None:
        return None if fingerprint is None else fingerprint.strip().lower()


class PullConfig(ExchangeConfig):
    """Settings of ``offsite exchange pull URL -o SEALED``."""

    verb: ClassVar[str] = "exchange pull"

    output: Path = Field(
        description="sealed folder to write; OUTPUT.work keeps a broken download", json_schema_extra=OUTPUT
    )
    kind: Literal["job", "package", "round", "report"] | None = Field(
        None, description="take what is of this kind", json_schema_extra=USUAL
    )
    job: str | None = Field(
        None, pattern=r"^[0-9a-f]{4,32}$", description="take what is of the job of this id", json_schema_extra=USUAL
    )
    digest: str | None = Field(
        None,
        pattern=r"^(sha256:)?[0-9a-f]{4,64}$",
        description="take what has this sealed digest, or begins with it",
        json_schema_extra=USUAL,
    )
    limit_bytes: int = Field(
        2**40, ge=1, description="largest sealed folder to fetch, in bytes", json_schema_extra=LIMITS
    )


class VerdictSettings(VerbConfig):
    """Base of verbs that hand something in and wait for what becomes of it."""

    verdict_seconds: float = Field(
        600.0, ge=0, description="seconds to wait for the owner's verdict", json_schema_extra=NETWORK
    )


class PushConfig(VerdictSettings, ExchangeConfig):
    """Settings of ``offsite exchange push URL SEALED``."""

    verb: ClassVar[str] = "exchange push"

    sealed: Path = Field(description="sealed bundle folder", json_schema_extra=POSITIONAL)


class StatusConfig(ExchangeConfig):
    """Settings of ``offsite exchange status URL [SEALED]``."""

    verb: ClassVar[str] = "exchange status"

    sealed: str | None = Field(
        None,
        description="sealed bundle folder, or its digest; without it: what the owner offers",
        json_schema_extra=USUAL | POSITIONAL,
    )
