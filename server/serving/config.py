"""Settings of ``offsite serve``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import KEYS, LIMITS, NETWORK, POSITIONAL, USUAL
from offsite.keys.config import KeysConfig
from offsite.training.config import DeviceSettings
from server.http.config import ListenSettings
from server.plugging.config import MixSettings


class ServeConfig(KeysConfig, DeviceSettings, ListenSettings, MixSettings):
    """Settings of ``offsite serve ADAPTED``. The key is never a setting: it would show in the process list."""

    verb: ClassVar[str] = "serve"

    adapted: Path = Field(description="folder that plug-in wrote", json_schema_extra=POSITIONAL)
    base: str | None = Field(
        None,
        description="full model, when ADAPTED holds only an adapter and names another one",
        json_schema_extra=USUAL,
    )
    registry: Path | None = Field(
        None, description="registry that is told that the bundle is served; default: none is", json_schema_extra=USUAL
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes any free one", json_schema_extra=NETWORK)
    key_file: Path | None = Field(
        None,
        description="file with the bearer key; default: OFFSITE_API_KEY, otherwise a fresh key, printed once",
        json_schema_extra=KEYS,
    )
    model_id: str | None = Field(
        None, min_length=1, description="name clients ask for; default: ADAPTED's folder name", json_schema_extra=USUAL
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
        8, ge=0, description="requests that may wait for the one being answered; then 429", json_schema_extra=LIMITS
    )
    limit_bytes: int = Field(
        1_048_576, ge=1, description="largest request body, in bytes; then 413", json_schema_extra=LIMITS
    )
