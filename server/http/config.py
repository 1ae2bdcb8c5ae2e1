"""Settings of every HTTP server of the owner."""

from __future__ import annotations

from pydantic import Field

from offsite.config import NETWORK, VerbConfig


class ListenSettings(VerbConfig):
    """Base of verbs that listen."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="address to listen on; this one is for this machine alone",
        json_schema_extra=NETWORK,
    )
