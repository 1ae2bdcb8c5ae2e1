"""Settings of ``offsite exchange serve``, ``offsite exchange certificate`` and ``offsite invite``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from offsite.artefacts.layout import Line
from offsite.config import LIMITS, NETWORK, OUTPUT, POSITIONAL, REPEATED, USUAL, VerbConfig
from offsite.keys.config import IdentityConfig
from offsite.sealed.invitation import URL_PATTERN
from server.http.config import ListenSettings
from server.registry.config import OwnRegistryConfig


class ServeExchangeConfig(OwnRegistryConfig, ListenSettings):
    """Settings of ``offsite exchange serve --registry DIR --outbox DIR``."""

    verb: ClassVar[str] = "exchange serve"

    outbox: Path = Field(description="folder with what offsite seal wrote for clients; more can be added while serving")
    port: int = Field(8443, ge=0, le=65535, description="TCP port; 0 takes any free one", json_schema_extra=NETWORK)
    certificate: Path | None = Field(
        None,
        description="TLS certificate (chain), PEM; needed to listen on more than this machine",
        json_schema_extra=NETWORK,
    )
    certificate_key: Path | None = Field(None, description="its private key, PEM, mode 0600", json_schema_extra=NETWORK)
    limit_upload_bytes: int = Field(
        4 * 2**30, ge=1, description="largest sealed bundle, in bytes", json_schema_extra=LIMITS
    )
    limit_disk_bytes: int = Field(
        32 * 2**30, ge=1, description="all unfinished uploads together, in bytes", json_schema_extra=LIMITS
    )
    limit_free_bytes: int = Field(
        2**30, ge=0, description="bytes of the disk that uploads leave free", json_schema_extra=LIMITS
    )
    limit_client_uploads: int = Field(8, ge=1, description="unfinished uploads of one client", json_schema_extra=LIMITS)
    limit_part_bytes: int = Field(
        4 * 2**20, ge=1, le=2**30, description="largest part of an upload, in bytes", json_schema_extra=LIMITS
    )
    limit_bodies: int = Field(
        16, ge=1, description="parts taken at once; memory is about this many of the largest", json_schema_extra=LIMITS
    )
    limit_waiting: int = Field(
        128, ge=1, description="whole bundles that may wait to be verified; then 429", json_schema_extra=LIMITS
    )
    limit_connections: int = Field(
        512, ge=1, description="connections at once; further ones are cut", json_schema_extra=LIMITS
    )
    limit_rate: float = Field(
        50.0,
        gt=0,
        description="requests a second of one client, with bursts of four times that",
        json_schema_extra=LIMITS,
    )
    head_seconds: float = Field(
        10.0, gt=0, description="seconds in which a request's head must arrive", json_schema_extra=NETWORK
    )
    body_seconds: float = Field(
        10.0, gt=0, description="seconds a body may take, besides what min_rate allows", json_schema_extra=NETWORK
    )
    min_rate: float = Field(
        65_536.0, gt=0, description="bytes a second at which a body must come at least", json_schema_extra=NETWORK
    )
    stall_seconds: float = Field(
        30.0, gt=0, description="seconds for which a download may stand still", json_schema_extra=NETWORK
    )
    idle_hours: float = Field(
        24.0, gt=0, description="hours after which an upload that stands still is discarded", json_schema_extra=LIMITS
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> ServeExchangeConfig:
        if (self.certificate is None) != (self.certificate_key is None):
            raise ValueError("--certificate and --certificate-key belong together")
        return self


class CertificateConfig(VerbConfig):
    """Settings of ``offsite exchange certificate --host NAME -o DIR``."""

    verb: ClassVar[str] = "exchange certificate"

    output: Path = Field(description="folder to write", json_schema_extra=OUTPUT)
    host: tuple[str, ...] = Field(
        min_length=1, description="name or address clients use; may be repeated", json_schema_extra=REPEATED
    )
    days: int = Field(365, ge=1, le=3650, description="days it is valid", json_schema_extra=USUAL)


class AddressSettings(VerbConfig):
    """Base of verbs that tell clients where the exchange is."""

    url: str | None = Field(
        None,
        pattern=URL_PATTERN,
        description="address of your exchange, as https://owner.example:8443; default: sealed folders go by hand",
        json_schema_extra=USUAL,
    )


class InviteConfig(IdentityConfig, AddressSettings):
    """Settings of ``offsite invite JOB -o INVITATION``."""

    verb: ClassVar[str] = "invite"

    what: Path = Field(
        description="job folder that job create wrote; or a package folder, for a client whose card is not pinned yet",
        json_schema_extra=POSITIONAL,
    )
    output: Path = Field(
        description="invitation to write, as invitation.offsite.json; it is signed and holds no secret",
        json_schema_extra=OUTPUT,
    )
    package: Path | None = Field(
        None,
        description="the job's package folder: it and the job are sealed for the client beside the invitation",
        json_schema_extra=USUAL,
    )
    title: Line = Field("", description="what it is about, in a line that the client is shown", json_schema_extra=USUAL)
    outbox: Path | None = Field(
        None,
        description="folder that job and package are sealed into, as the exchange's; default: the invitation's own",
        json_schema_extra=USUAL,
    )
    days: int = Field(
        30, ge=1, le=3650, description="days that an invitation without a job counts", json_schema_extra=USUAL
    )
    certificate: Path | None = Field(
        None,
        description="the exchange's TLS certificate, PEM, which the client is to trust alone",
        json_schema_extra=NETWORK,
    )

    @model_validator(mode="after")
    def _goes_together(self) -> InviteConfig:
        if self.certificate is not None and self.url is None:
            raise ValueError("--certificate: there is no --url")
        return self
