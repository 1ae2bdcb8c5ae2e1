"""Settings of ``offsite serve``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import KEYS, LIMITS, NETWORK, POSITIONAL, REPEATED, USUAL
from offsite.keys.config import KeysConfig
from offsite.training.config import DeviceSettings
from server.http.config import ListenSettings
from server.plugging.config import MixSettings


class ServeConfig(KeysConfig, DeviceSettings, ListenSettings, MixSettings):
    """Settings of ``offsite serve ADAPTED`` and ``offsite serve MODEL --adapter NAME=FOLDER``.

    The key is never a setting: it would show in the process list.
    """

    verb: ClassVar[str] = "serve"

    adapted: Path = Field(
        description="folder that plug-in wrote; or a full model, with --adapter or --registry",
        json_schema_extra=POSITIONAL,
    )
    adapter: dict[str, Path] = Field(
        {},
        description="NAME=FOLDER, an adapter to serve on the full model under that name, as plug-in wrote it; may be "
        "repeated",
        json_schema_extra=USUAL | REPEATED,
    )
    base: str | None = Field(
        None,
        description="full model, when ADAPTED holds only an adapter and names another one",
        json_schema_extra=USUAL,
    )
    registry: Path | None = Field(
        None,
        description="with a full model: registry whose accepted bundles are served, under their clients' names; "
        "otherwise one that is told that the bundle is served",
        json_schema_extra=USUAL,
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
