"""Settings of ``offsite audit plugged-in``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from server.registry.config import RegistryConfig


class AuditPluggedConfig(RegistryConfig):
    """Settings of ``offsite audit plugged-in MODEL ID --registry DIR --commitment DIR --reveal DIR -o AUDIT``."""

    verb: ClassVar[str] = "audit plugged-in"

    model: str = Field(
        description="full model: a folder, a hub id, or a fetched name", json_schema_extra={"positional": True}
    )
    id: str = Field(description="id of a bundle that was taken in and accepted", json_schema_extra={"positional": True})
    output: Path = Field(description="audit folder to write", json_schema_extra={"short": "-o"})
    commitment: Path = Field(description="the client's commitment, opened: it came before the bundle")
    reveal: Path = Field(description="the canaries that the client revealed, opened")
    package: Path | None = Field(
        None, description="package the bundle was tuned on; default: where it was when its job was made"
    )
    epsilon: float | None = Field(None, ge=0, description="epsilon that the client claims, to hold the bound against")
    delta: float = Field(1e-5, ge=0, lt=1, description="delta of that claim")
    samples: int = Field(50, ge=0, le=1000, description="draws for each secret, to read it back out")
    seed: int = Field(0, ge=0, description="seed of these draws")
    batch_size: int = Field(32, ge=1, description="rows in one forward pass")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic and dtype of the model")
    device: str = Field("auto", description="cpu, cuda, or auto for an accelerator if there is one")
