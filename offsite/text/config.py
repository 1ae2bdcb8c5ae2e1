"""Settings that say how a file of text is read, declared once for every verb that reads one."""

from __future__ import annotations

from pydantic import Field

from offsite.config import VerbConfig


class TextSettings(VerbConfig):
    """Base of verbs that read text."""

    fields: dict[str, str] = Field({}, description="columns under other names, as prompt=question,completion=answer")
    document_field: str | None = Field(
        None, description="column that tells documents apart; each row is one by default"
    )
    separator: str | None = Field(None, description="plain text: what stands between documents; default: blank lines")
    block_tokens: int = Field(256, ge=2, description="context: tokens per block, and the most of one row")
