"""Settings of ``offsite serve``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from offsite.config import KEYS, LIMITS, NETWORK, PLUGGING, POSITIONAL, REPEATED, USUAL
from offsite.keys.config import KeysConfig
from offsite.modelling.config import BaseSettings
from offsite.training.config import DeviceSettings
from server.http.config import ListenSettings
from server.plugging.config import BetaSettings, MixSettings
from server.registry.config import ID_PATTERN


class ServeConfig(KeysConfig, DeviceSettings, ListenSettings, BaseSettings, MixSettings, BetaSettings):
    """Settings of ``offsite serve ADAPTED`` and ``offsite serve MODEL --adapter NAME=FOLDER``.

    The key is never a setting: it would show in the process list.
    """

    verb: ClassVar[str] = "serve"

    adapted: Path = Field(
        description="folder that plug-in wrote; a full model, with --adapter, --registry or --offset; or an encoder",
        json_schema_extra=POSITIONAL,
    )
    adapter: dict[str, Path] = Field(
        {},
        description="NAME=FOLDER, an adapter to serve on the full model under that name, as plug-in wrote it; may be "
        "repeated",
        json_schema_extra=USUAL | REPEATED,
    )
    registry: Path | None = Field(
        None,
        description="with a full model: registry whose accepted bundles are served, under their clients' names; "
        "otherwise one that is told that the bundle is served",
        json_schema_extra=USUAL,
    )
    package: tuple[Path, ...] = Field(
        (),
        description="with a full model and --registry: a package that is no longer where it was when its job was made; "
        "may be repeated",
        json_schema_extra=USUAL | REPEATED,
    )
    offset: str | None = Field(
        None,
        description="PACKAGE,ID: for an adapter that cannot be plugged in; with a full model and --registry. Its "
        "scores are moved by what the accepted bundle ID does to the emulator in PACKAGE",
        json_schema_extra=PLUGGING,
    )
    task: tuple[Path, ...] = Field(
        (),
        description="task.yaml, or an opened job that carries a task, answered at /v1/tasks/NAME; may be repeated",
        json_schema_extra=USUAL | REPEATED,
    )
    tenants: Path | None = Field(
        None,
        description="file with the tenants whose keys are taken beside the server's own, as tenant add wrote it",
        json_schema_extra=KEYS,
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes any free one", json_schema_extra=NETWORK)
    key_file: Path | None = Field(
        None,
        description="file with the bearer key; default: OFFSITE_API_KEY, otherwise a fresh key, printed once",
        json_schema_extra=KEYS,
    )
    model_id: str | None = Field(
        None,
        min_length=1,
        description="name clients ask for; default: the folder's, or the model's",
        json_schema_extra=USUAL,
    )
    context: int = Field(
        0,
        ge=0,
        description="tokens of prompt and answer together; 0: what the model was made for",
        json_schema_extra=LIMITS,
    )
    limit_tokens: int = Field(
        1024, ge=1, description="most tokens in one answer, whatever the client asks for", json_schema_extra=LIMITS
    )
    limit_waiting: int = Field(
        8, ge=0, description="requests that may wait for those being answered; then 429", json_schema_extra=LIMITS
    )
    limit_rows: int = Field(
        16,
        ge=1,
        le=1024,
        description="answers that are written together, token by token; 1 writes one after another",
        json_schema_extra=LIMITS,
    )
    limit_cache_bytes: int = Field(
        0,
        ge=0,
        description="memory for the keys and values of all answers under way; more requests wait, then 429; 0: 2 GiB, "
        "or one answer of the whole context",
        json_schema_extra=LIMITS,
    )
    prefill_tokens: int = Field(
        128,
        ge=1,
        description="tokens of prompts that are read between two tokens of answers; fewer keep answers flowing",
        json_schema_extra=LIMITS,
    )
    limit_bytes: int = Field(
        1_048_576, ge=1, description="largest request body, in bytes; then 413", json_schema_extra=LIMITS
    )

    @property
    def offset_parts(self) -> tuple[Path, str] | None:
        """The package and the bundle's id of an offset; None without one."""
        if self.offset is None:
            return None
        package, _, bundle_id = self.offset.rpartition(",")
        return Path(package), bundle_id

    @model_validator(mode="after")
    def _offset(self) -> Self:
        if self.offset is None:
            return self
        problems = []
        package, _, bundle_id = self.offset.rpartition(",")
        if not package or not re.fullmatch(ID_PATTERN, bundle_id):
            problems.append("--offset: expected PACKAGE,ID, the id being that of an accepted bundle in the registry")
        if self.registry is None:
            problems.append("--offset needs --registry, which knows the bundle")
        others = {"--adapter": self.adapter, "--package": self.package, "--base": self.base, "--mix": self.mix != 1}
        problems += [f"{flag} does not go with --offset, which serves one name" for flag, one in others.items() if one]
        if problems:
            raise ValueError("; ".join(problems))
        return self
