"""Settings of the owner's verbs around the registry: ``job create``, ``intake``, ``registry ...``, ``log verify``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from adapters.settings import AdapterSettings, LabelSettings, head_problems
from offsite.artefacts.job import MAX_HEAD_NORM
from offsite.artefacts.layout import Text
from offsite.config import FROM_PROJECT, LIMITS, OUTPUT, POSITIONAL, USUAL, VerbConfig, flag_name
from offsite.keys.config import IdentityConfig, KeysConfig

ID_PATTERN = r"^[0-9a-f]{16}$"
WORD_PATTERN = r"^([0-9a-f]{4,16}|latest)$"
"""What a person may type for an id: its first digits, or the newest arrival."""


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


class JobCreateConfig(KeysConfig, AdapterSettings, LabelSettings, NormCaps):
    """Settings of ``offsite job create PACKAGE --client NAME --registry DIR -o JOB``."""

    verb: ClassVar[str] = "job create"

    package: Path = Field(description="package folder the client is to tune on", json_schema_extra=POSITIONAL)
    head: Literal["none", "reward", "classify", "regress", "tag"] = Field(
        "none",
        description="what is trained beside the adapter: nothing; reward: a number for each answer; classify: labels; "
        "regress: a value of a text; tag: a label of each word, on an encoder",
        json_schema_extra=USUAL,
    )
    max_head_norm: float = Field(
        MAX_HEAD_NORM,
        gt=0,
        le=1e6,
        description="cap on the Frobenius norm of a head, which begins at zero",
        json_schema_extra=LIMITS,
    )
    client: str = Field(description="the client, pinned by trust add: its name, or its fingerprint")
    registry: Path = Field(
        description="registry folder, made if there is none; else offsite.toml's", json_schema_extra=FROM_PROJECT
    )
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
    task: Path | None = Field(
        None,
        description="task.yaml that crosses in the job: how the client's rows are asked and answered",
        json_schema_extra=USUAL,
    )
    terms: Text = Field("", description="terms in words, for people", json_schema_extra=USUAL)

    @model_validator(mode="after")
    def _has_labels(self) -> Self:
        """Raise ValueError with what is wrong with the labels, or with a cap on a head that there is not."""
        problems = [] if self.head == "none" else head_problems(self.head, self.labels)
        if self.head == "none":
            given = [name for name in ("labels", "max_head_norm") if name in self.model_fields_set]
            problems += [f"{flag_name(name)}: there is no --head" for name in given]
        elif self.task is not None:
            problems.append(f"--task: its rows are prompts and answers, --head {self.head} is trained on others")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class RegistryConfig(KeysConfig):
    """What every verb on an existing registry needs: the folder, and the keys folder that holds its head."""

    registry: Path = Field(
        description="registry folder that job create made; else offsite.toml's", json_schema_extra=FROM_PROJECT
    )


class RegisteredConfig(RegistryConfig):
    """What every verb about one arrival needs, too: its id."""

    id: str = Field(
        description="id of a bundle, as intake said, its first digits, or latest", json_schema_extra=POSITIONAL
    )


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
