"""Settings that say how text is read and cut, declared once for every verb that does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from offsite.config import DATA, VerbConfig


def _several(given: Any) -> Any:
    """Return one path as several of one, and none as none of them."""
    if given is None:
        return ()
    if isinstance(given, str | Path):
        return (given,)
    return tuple(given) if isinstance(given, list) else given


TextFiles = Annotated[tuple[Path, ...], BeforeValidator(_several)]
"""Files of text that are read in their order, as one; a single path may stand alone."""


class BlockSettings(VerbConfig):
    """Base of verbs that cut text into blocks."""

    block_tokens: int = Field(
        256, ge=2, description="context: tokens per block, and the most of one row", json_schema_extra=DATA
    )


class ColumnSettings(VerbConfig):
    """Base of verbs that read rows with named columns."""

    fields: dict[str, str] = Field(
        {}, description="columns under other names, as prompt=question,completion=answer", json_schema_extra=DATA
    )


class TextSettings(ColumnSettings, BlockSettings):
    """Base of verbs that read a file of text."""

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
