"""Settings of ``offsite mark`` and ``offsite trace``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from offsite.config import OUTPUT, POSITIONAL, REPEATED, USUAL
from offsite.keys.config import KeysConfig


def _fingerprint(text: str) -> str:
    from offsite.keys.identity import FINGERPRINT_PATTERN

    found = text.strip().lower()
    if not re.fullmatch(FINGERPRINT_PATTERN, found):
        raise ValueError("expected a fingerprint as 'offsite trust list' shows it: 13 groups of four, a-z and 2-7")
    return found


Fingerprint = Annotated[str, AfterValidator(_fingerprint)]


class MarkConfig(KeysConfig):
    """Settings of ``offsite mark PACKAGE --recipient FINGERPRINT -o MARKED``."""

    verb: ClassVar[str] = "mark"

    package: Path = Field(description="package folder that distill wrote, without a mark", json_schema_extra=POSITIONAL)
    recipient: str = Field(description="the one client that is to get the marked package: its name, or its fingerprint")
    output: Path = Field(description="package folder to write", json_schema_extra=OUTPUT)


class TraceConfig(KeysConfig):
    """Settings of ``offsite trace SUSPECT --package PACKAGE``."""

    verb: ClassVar[str] = "trace"

    suspect: Path = Field(
        description="package or transformers checkpoint that may come from a marked package",
        json_schema_extra=POSITIONAL,
    )
    package: Path = Field(description="package folder without a mark, from which the marked ones were made")
    recipient: tuple[Fingerprint, ...] = Field(
        (),
        description="fingerprint of a recipient to look for; repeat it for others; default: everybody whom this "
        "package was marked for with these keys",
        json_schema_extra=USUAL | REPEATED,
    )
