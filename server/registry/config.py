"""Settings of the owner's verbs around the registry: ``job create``, ``intake``, ``registry ...``, ``log verify``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from adapters.settings import AdapterSettings
from offsite.artefacts.layout import Text
from offsite.config import LIMITS, OUTPUT, POSITIONAL, USUAL, VerbConfig
from offsite.keys.config import IdentityConfig, KeysConfig

ID_PATTERN = r"^[0-9a-f]{16}$"


class NormCaps(VerbConfig):
    """Base of verbs that make jobs: the caps on what a client's adapter may do to a module."""

    max_relative_frobenius: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="cap on a module's update: its Frobenius norm over that of the module's weight",
        json_schema_extra=LIMITS,
    )
    max_relative_spectral: float = Field(
        2.0,
        gt=0,
        le=1e6,
        description="cap on a module's update: its largest singular value over the weight's",
        json_schema_extra=LIMITS,
    )


class JobCreateConfig(KeysConfig, AdapterSettings, NormCaps):
    """Settings of ``offsite job create PACKAGE --client FINGERPRINT --registry DIR -o JOB``."""

    verb: ClassVar[str] = "job create"

    package: Path = Field(description="package folder the client is to tune on", json_schema_extra=POSITIONAL)
    client: str = Field(description="fingerprint of the client's card, pinned by trust add")
    registry: Path = Field(description="registry folder; made if there is none")
    output: Path = Field(description="job folder to write", json_schema_extra=OUTPUT)
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="peak rate that the client is advised to use, as rehearse found it",
        json_schema_extra=USUAL,
    )
    rounds: int = Field(
        1, ge=1, le=10_000, description="bundles the client may hand in, one for each round", json_schema_extra=USUAL
    )
    days: int = Field(
        30, ge=1, le=3650, description="days until nothing more is taken in for the job", json_schema_extra=USUAL
    )
    terms: Text = Field("", description="terms in words, for people", json_schema_extra=USUAL)


class RegistryConfig(KeysConfig):
    """What every verb on an existing registry needs: the folder, and the keys folder that holds its head."""

    registry: Path = Field(description="registry folder that job create made")


class RegisteredConfig(RegistryConfig):
    """What every verb about one arrival needs, too: its id."""

    id: str = Field(description="id of a bundle, as intake said", json_schema_extra=POSITIONAL)


class OwnRegistryConfig(IdentityConfig, RegistryConfig):
    """What every verb needs that takes bundles in: the registry, and this owner's keys with their passphrase."""


class IntakeConfig(OwnRegistryConfig):
    """Settings of ``offsite intake SEALED --registry DIR``."""

    verb: ClassVar[str] = "intake"

    sealed: Path = Field(description="sealed bundle from the client", json_schema_extra=POSITIONAL)
    verify_package: bool = Field(
        False,
        description="hash every file of the package again, also those unchanged since they were hashed last",
        json_schema_extra=LIMITS,
    )


class RegistryListConfig(RegistryConfig):
    """Settings of ``offsite registry list --registry DIR``."""

    verb: ClassVar[str] = "registry list"


class RegistryShowConfig(RegisteredConfig):
    """Settings of ``offsite registry show ID --registry DIR``."""

    verb: ClassVar[str] = "registry show"


class RegistryAcceptConfig(RegisteredConfig):
    """Settings of ``offsite registry accept ID --registry DIR``."""

    verb: ClassVar[str] = "registry accept"


class RegistryRefuseConfig(RegisteredConfig):
    """Settings of ``offsite registry refuse ID --registry DIR``."""

    verb: ClassVar[str] = "registry refuse"


class LogVerifyConfig(RegistryConfig):
    """Settings of ``offsite log verify --registry DIR``."""

    verb: ClassVar[str] = "log verify"
