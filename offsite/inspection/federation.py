"""What a federation left, in words: its result, and a message of a secure sum."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offsite.artefacts.round import FEDERATION_PATTERN
from offsite.console import say
from offsite.digests import DIGEST_PATTERN
from offsite.errors import BadSchema
from offsite.evaluation.results import LIMIT_BYTES, RESULTS_NAME
from offsite.inspection.thing import Thing, read_plain
from offsite.inspection.words import facts, rows
from offsite.sealed.manifest import NOTE_NAME

_FORM = "its form alone; it is not signed"


class _Stated(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class _Round(_Stated):
    round: int = Field(ge=1)
    used: list[str]
    left_out: dict[str, str]


class _FederationResult(_Stated):
    """What is shown of the ``results.json`` that a federation's owner has."""

    name: str
    federation_id: str = Field(pattern=FEDERATION_PATTERN)
    mode: str
    package_digest: str = Field(pattern=DIGEST_PATTERN)
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    rounds: list[_Round]
    zero_shot: dict[str, float]
    plugged_in: dict[str, float]
    not_better: list[str]


def show_federation(thing: Thing) -> dict[str, object]:
    """The result of a federation is told.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    raw = read_plain(thing.path / RESULTS_NAME, LIMIT_BYTES)
    try:
        found = _FederationResult.model_validate_json(raw)
    except ValidationError:
        raise BadSchema(f"{RESULTS_NAME} of {thing.name!r} is neither results nor a federation's result") from None
    say(f"result of a federation {thing.name}; checked: {_FORM}")
    facts(
        {
            "federation": f"{found.name}, {found.federation_id}",
            "adapter": "one of all" if found.mode == "shared" else f"{found.mode}: one for each client",
            "package": found.package_digest,
            "base model": found.base_digest,
            "rounds": len(found.rounds),
        }
    )
    rows("rounds", ["round", "used", "left out"], [
        [str(one.round), ", ".join(one.used) or "nobody", ", ".join(one.left_out) or "nobody"] for one in found.rounds
    ])  # fmt: skip
    if found.plugged_in:
        rows("perplexity on the owner's held-out texts", ["text", "plugged in"], [
            [name, f"{value:.4g}"] for name, value in found.plugged_in.items()
        ])  # fmt: skip
    return {
        "kind": "federation",
        "federation_id": found.federation_id,
        "rounds": len(found.rounds),
        "package_digest": found.package_digest,
        "base_digest": found.base_digest,
        "zero_shot": found.zero_shot,
        "plugged_in": found.plugged_in,
        "not_better": found.not_better,
        "verified": False,
        "checked": _FORM,
    }


def show_note(thing: Thing) -> dict[str, object]:
    """A message of a secure sum is told by its size; nothing of it is read."""
    num_bytes = (thing.path / NOTE_NAME).lstat().st_size
    checked = "nothing; it means something within its round only"
    say(f"note {thing.name}: one message of a secure sum, {num_bytes:,} bytes; checked: {checked}")
    return {"kind": "note", "bytes": num_bytes, "verified": False, "checked": checked}
