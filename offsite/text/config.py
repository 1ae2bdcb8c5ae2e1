"""Settings that say how text is read and cut, declared once for every verb that does."""

from __future__ import annotations

from pydantic import Field

from offsite.config import DATA, VerbConfig


class BlockSettings(VerbConfig):
    """Base of verbs that cut text into blocks."""

    block_tokens: int = Field(
        256, ge=2, description="context: tokens per block, and the most of one row", json_schema_extra=DATA
    )


class TextSettings(BlockSettings):
    """Base of verbs that read a file of text."""

    fields: dict[str, str] = Field(
        {}, description="columns under other names, as prompt=question,completion=answer", json_schema_extra=DATA
    )
    document_field: str | None = Field(
        None, description="column that tells documents apart; each row is one by default", json_schema_extra=DATA
    )
    separator: str | None = Field(
        None, description="plain text: what stands between documents; default: blank lines", json_schema_extra=DATA
    )


class PackedTextSettings(TextSettings):
    """Base of verbs that fill blocks of text, or keep rows apart."""

    pack: bool = Field(
        True, description="fill blocks of tokens across rows; otherwise one row per sequence", json_schema_extra=DATA
    )
