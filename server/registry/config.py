"""Settings of the owner's verbs around the registry: ``job create``, ``intake``, ``registry ...``, ``log verify``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from adapters.settings import AdapterSettings
from offsite.artefacts.layout import Text
from offsite.keys.config import IdentityConfig, KeysConfig

ID_PATTERN = r"^[0-9a-f]{16}$"


class JobCreateConfig(KeysConfig, AdapterSettings):
    """Settings of ``offsite job create PACKAGE --client FINGERPRINT --registry DIR -o JOB``."""

    verb: ClassVar[str] = "job create"

    package: Path = Field(description="package folder the client is to tune on", json_schema_extra={"positional": True})
    client: str = Field(description="fingerprint of the client's card, pinned by trust add")
    registry: Path = Field(description="registry folder; made if there is none")
    output: Path = Field(description="job folder to write", json_schema_extra={"short": "-o"})
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="peak rate that the client is advised to use, as rehearse found it"
    )
    rounds: int = Field(1, ge=1, le=10_000, description="bundles the client may hand in, one for each round")
    days: int = Field(30, ge=1, le=3650, description="days until nothing more is taken in for the job")
    max_relative_frobenius: float = Field(
        1.0, gt=0, le=1e6, description="cap on a module's update: its Frobenius norm over that of the module's weight"
    )
    max_relative_spectral: float = Field(
        2.0, gt=0, le=1e6, description="cap on a module's update: its largest singular value over the weight's"
    )
    terms: Text = Field("", description="terms in words, for people")


class IntakeConfig(IdentityConfig):
    """Settings of ``offsite intake SEALED --registry DIR``."""

    verb: ClassVar[str] = "intake"

    sealed: Path = Field(description="sealed bundle from the client", json_schema_extra={"positional": True})
    registry: Path = Field(description="registry folder that job create made")


class RegistryConfig(KeysConfig):
    """What every verb on an existing registry needs: the folder, and the keys folder that holds its head."""

    registry: Path = Field(description="registry folder that job create made")


class RegistryListConfig(RegistryConfig):
    """Settings of ``offsite registry list --registry DIR``."""

    verb: ClassVar[str] = "registry list"


class RegistryShowConfig(RegistryConfig):
    """Settings of ``offsite registry show ID --registry DIR``."""

    verb: ClassVar[str] = "registry show"

    id: str = Field(description="id of a bundle, as intake said", json_schema_extra={"positional": True})


class RegistryAcceptConfig(RegistryConfig):
    """Settings of ``offsite registry accept ID --registry DIR``."""

    verb: ClassVar[str] = "registry accept"

    id: str = Field(description="id of a verified bundle", json_schema_extra={"positional": True})


class RegistryRefuseConfig(RegistryConfig):
    """Settings of ``offsite registry refuse ID --registry DIR``."""

    verb: ClassVar[str] = "registry refuse"

    id: str = Field(description="id of a bundle that is not plugged in", json_schema_extra={"positional": True})


class LogVerifyConfig(RegistryConfig):
    """Settings of ``offsite log verify --registry DIR``."""

    verb: ClassVar[str] = "log verify"
