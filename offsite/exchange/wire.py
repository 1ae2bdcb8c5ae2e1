"""The exchange's protocol 1: its routes, and the JSON messages of client and server besides sealed files.

::

    GET  /v1/sealed                                      -> Offers: what is sealed for the caller
    GET  /v1/sealed/<digest>/<file>                      -> manifest.json, signatures.json or keys.json
    GET  /v1/sealed/<digest>/payload/<file>              -> an encrypted file; Range: bytes=<offset>-
    POST /v1/bundles                    Declaration      -> Status; the sealed manifest is checked here
    PUT  /v1/bundles/<digest>/payload/<file>/<offset>    -> Status; the next bytes of one encrypted file
    POST /v1/bundles/<digest>/complete                   -> Status; 200 with the verdict, 202 while it is worked on
    GET  /v1/bundles/<digest>                            -> Status

Digests are SHA-256 in hex. Every request is signed (``offsite/exchange/requests.py``). Anything else than what was
asked for is a `Problem` with status 400 or above.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Literal

from pydantic import Field

from offsite.artefacts.job import JOB_ID_PATTERN, LATEST_SECOND
from offsite.errors import BadSchema
from offsite.sealed.folder import RawSealed
from offsite.sealed.manifest import MAX_FILE_BYTES, MAX_FILES, SEALED_MANIFEST_LIMIT_BYTES, SIGNATURES_LIMIT_BYTES, Kind
from offsite.sealed.recipients import KEYS_LIMIT_BYTES
from offsite.strictjson import Strict, parse_strict

DECLARATION_FORMAT: Literal["offsite/declaration/1"] = "offsite/declaration/1"
DECLARATION_LIMIT_BYTES = 4 * (SEALED_MANIFEST_LIMIT_BYTES + SIGNATURES_LIMIT_BYTES + KEYS_LIMIT_BYTES) // 3 + 1024
ANSWER_LIMIT_BYTES = 8 * 2**20
MAX_OFFERS = 4096

HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PayloadName = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\.enc$")]
NumBytes = Annotated[int, Field(ge=0, le=MAX_FILES * 2 * MAX_FILE_BYTES)]
Second = Annotated[int, Field(ge=0, le=LATEST_SECOND)]
State = Literal[
    "receiving", "verifying", "received", "verified", "accepted", "plugged-in", "served", "refused", "withdrawn"
]


class Declaration(Strict):
    """The three small files of a sealed bundle, base64, before any of its payload."""

    format: Literal["offsite/declaration/1"] = DECLARATION_FORMAT
    manifest: str
    signatures: str
    keys: str


class Part(Strict):
    """How far one encrypted file has come."""

    offset: NumBytes
    bytes: NumBytes


class Status(Strict):
    """What became of a bundle. `reason` is the class of the check that refused it."""

    digest: HexDigest
    state: State
    id: str = Field("", max_length=64)
    reason: str = Field("", max_length=64)
    message: str = Field("", max_length=2000)
    part_bytes: NumBytes = 0
    parts: dict[PayloadName, Part] = {}

    def is_whole(self) -> bool:
        """Tell whether every encrypted file has arrived."""
        return all(part.offset == part.bytes for part in self.parts.values())


class OfferSummary(Strict):
    """One sealed folder that is offered to the caller."""

    digest: HexDigest
    kind: Kind
    job_id: str = Field(pattern=JOB_ID_PATTERN)
    created: Second
    expires: Second
    sequence: int = Field(ge=1, le=2**53)
    bytes: NumBytes


class Offers(Strict):
    """All that is offered to the caller, oldest first."""

    offers: tuple[OfferSummary, ...] = Field((), max_length=MAX_OFFERS)


class Problem(Strict):
    """Why something was not done: the name of the check, a line for people, and the offset reached if that helps."""

    reason: str = Field(max_length=64)
    message: str = Field(max_length=2000)
    offset: NumBytes | None = None


def declare(raw: RawSealed) -> bytes:
    """Return the body that declares a sealed bundle."""
    words = (base64.b64encode(part).decode("ascii") for part in (raw.manifest_raw, raw.signatures_raw, raw.keys_raw))
    manifest, signatures, keys = words
    content = Declaration(manifest=manifest, signatures=signatures, keys=keys)
    return json.dumps(content.model_dump(mode="json")).encode("ascii")


def read_declaration(body: bytes) -> RawSealed:
    """Return the three small files that `body` declares; the caller has limited its size.

    Raises:
        BadSchema, WrongBinding: when it is not a declaration of this format.
    """
    found = parse_strict(body, Declaration, "declaration", {"format": DECLARATION_FORMAT})
    return RawSealed(*(_decoded(text) for text in (found.manifest, found.signatures, found.keys)))


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadSchema("declaration holds a field that is not base64") from None
