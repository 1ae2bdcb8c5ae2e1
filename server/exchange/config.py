"""Settings of ``offsite exchange serve`` and ``offsite exchange certificate``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from offsite.config import VerbConfig
from offsite.keys.config import IdentityConfig


class ServeExchangeConfig(IdentityConfig):
    """Settings of ``offsite exchange serve --registry DIR --outbox DIR``."""

    verb: ClassVar[str] = "exchange serve"

    registry: Path = Field(description="registry folder that job create made; unfinished uploads lie in it, too")
    outbox: Path = Field(description="folder with what offsite seal wrote for clients; more can be added while serving")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; others than loopback need TLS")
    port: int = Field(8443, ge=0, le=65535, description="TCP port; 0 takes any free one")
    certificate: Path | None = Field(None, description="TLS certificate (chain), PEM")
    certificate_key: Path | None = Field(None, description="its private key, PEM, mode 0600")
    limit_upload_bytes: int = Field(4 * 2**30, ge=1, description="largest sealed bundle, in bytes")
    limit_disk_bytes: int = Field(32 * 2**30, ge=1, description="all unfinished uploads together, in bytes")
    limit_free_bytes: int = Field(2**30, ge=0, description="bytes of the disk that uploads leave free")
    limit_client_uploads: int = Field(8, ge=1, description="unfinished uploads of one client")
    limit_part_bytes: int = Field(4 * 2**20, ge=1, le=2**30, description="largest part of an upload, in bytes")
    limit_bodies: int = Field(16, ge=1, description="parts taken at once; memory is about this many of the largest")
    limit_waiting: int = Field(128, ge=1, description="whole bundles that may wait to be verified; then 429")
    limit_connections: int = Field(512, ge=1, description="connections at once; further ones are cut")
    limit_rate: float = Field(50.0, gt=0, description="requests a second of one client, with bursts of four times that")
    head_seconds: float = Field(10.0, gt=0, description="seconds in which a request's head must arrive")
    body_seconds: float = Field(10.0, gt=0, description="seconds a body may take, besides what min_rate allows")
    min_rate: float = Field(65_536.0, gt=0, description="bytes a second at which a body must come at least")
    stall_seconds: float = Field(30.0, gt=0, description="seconds for which a download may stand still")
    idle_hours: float = Field(24.0, gt=0, description="hours after which an upload that stands still is discarded")

    @model_validator(mode="after")
    def _both_or_none(self) -> ServeExchangeConfig:
        if (self.certificate is None) != (self.certificate_key is None):
            raise ValueError("--certificate and --certificate-key belong together")
        return self


class CertificateConfig(VerbConfig):
    """Settings of ``offsite exchange certificate --host NAME -o DIR``."""

    verb: ClassVar[str] = "exchange certificate"

    output: Path = Field(description="folder to write", json_schema_extra={"short": "-o"})
    host: tuple[str, ...] = Field(
        min_length=1, description="name or address clients use; may be repeated", json_schema_extra={"repeated": True}
    )
    days: int = Field(365, ge=1, le=3650, description="days it is valid")
