"""Settings of ``offsite serve``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.keys.config import KeysConfig


class ServeConfig(KeysConfig):
    """Settings of ``offsite serve ADAPTED``. The key is never a setting: it would show in the process list."""

    verb: ClassVar[str] = "serve"

    adapted: Path = Field(description="folder that plug-in wrote", json_schema_extra={"positional": True})
    base: str | None = Field(None, description="full model, when ADAPTED holds only an adapter and names another one")
    registry: Path | None = Field(None, description="registry that is told that the bundle is served; default: none is")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; other machines need another one")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes any free one")
    key_file: Path | None = Field(
        None, description="file with the bearer key; default: OFFSITE_API_KEY, otherwise a fresh key, printed once"
    )
    model_id: str | None = Field(None, min_length=1, description="name clients ask for; default: ADAPTED's folder name")
    device: str = Field("auto", description="torch device; auto: the first GPU if there is one, otherwise the CPU")
    context: int = Field(0, ge=0, description="tokens of prompt and answer together; 0: what the model was made for")
    limit_tokens: int = Field(1024, ge=1, description="most tokens in one answer, whatever the client asks for")
    limit_waiting: int = Field(8, ge=0, description="requests that may wait for the one being answered; then 429")
    limit_bytes: int = Field(1_048_576, ge=1, description="largest request body, in bytes; then 413")
