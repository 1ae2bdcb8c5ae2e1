"""Settings of ``offsite federate node``: a client's node under an owner's SuperLink of Flower's."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from offsite.config import NETWORK, POSITIONAL, VerbConfig


class NodeConfig(VerbConfig):
    """Settings of ``offsite federate node HOST:PORT``; TLS and a key of the node's own are not a choice."""

    verb: ClassVar[str] = "federate node"

    superlink: str = Field(
        pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*):[0-9]{1,5}$",
        description="HOST:PORT of the owner's SuperLink",
        json_schema_extra=POSITIONAL,
    )
    client: Path = Field(description="file with this client's settings of every round, as offsite federate join has")
    app: str = Field(
        pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the one Flower app to answer; the owner tells it"
    )
    node_key: Path = Field(description="private key that the SuperLink knows this node by: EC, OpenSSH, mode 0600")
    root_certificate: Path | None = Field(
        None,
        description="PEM certificate that the SuperLink's is checked against; default: the system's",
        json_schema_extra=NETWORK,
    )
    port: int = Field(
        0,
        ge=0,
        le=65535,
        description="loopback port between Flower's SuperNode and this; 0: any free",
        json_schema_extra=NETWORK,
    )
    wait_seconds: float = Field(
        86_400.0,
        gt=0,
        description="seconds without the SuperLink after which the node gives up",
        json_schema_extra=NETWORK,
    )
