"""Canaries, their commitment and their reveal, in words: numbers and digests, never a text or a coin."""

from __future__ import annotations

from offsite.audits.canaries import (
    CANARIES_FORMAT,
    CANARIES_LIMIT_BYTES,
    CANARIES_NAME,
    COMMITMENT_LIMIT_BYTES,
    REPORT_NAME,
    USED_FORMAT,
    USED_NAME,
    CanarySet,
    Used,
    commitment_of,
    read_commitment,
)
from offsite.console import say
from offsite.inspection.thing import Thing, read_plain
from offsite.inspection.words import facts
from offsite.strictjson import parse_strict

_FORM = "its form alone; it is not signed"


def show(thing: Thing) -> dict[str, object]:
    """A folder of canaries is told: how many, and for which bundle they were used.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    say(f"canaries {thing.name}: stay with the client until the bundle is sent; their texts are not shown")
    told = _set(read_plain(thing.path / CANARIES_NAME, CANARIES_LIMIT_BYTES))
    used = _used(thing)
    state = "no run was begun on them"
    if used is not None:
        state = "a run was begun on them" if used.bundle is None else f"for bundle {used.bundle}"
    facts({"used": state})
    return {"kind": "canaries", **told, "used": used is not None, "bundle_digest": used and used.bundle, **_checked()}


def show_reveal(thing: Thing) -> dict[str, object]:
    """A reveal is told; its texts are not.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    say(f"revealed canaries {thing.name}: for whoever has their commitment; their texts are not shown")
    told = _set(read_plain(thing.path / REPORT_NAME, CANARIES_LIMIT_BYTES))
    return {"kind": "reveal", **told, **_checked()}


def show_commitment(thing: Thing) -> dict[str, object]:
    """A commitment is told.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    found = read_commitment(thing.path)
    say(f"commitment {thing.name}: to canaries that are revealed later; sent before tuning")
    facts(
        {
            "commitment": found.digest,
            "canaries": f"{found.num:,}, and {found.num_secrets:,} secrets",
            "package": found.package_digest,
            "job": found.job_id,
        }
    )
    stated = found.model_dump(mode="json", exclude={"format", "digest"})
    return {"kind": "commitment", "commitment": found.digest, **stated, **_checked()}


def _set(raw: bytes) -> dict[str, object]:
    found = parse_strict(raw, CanarySet, CANARIES_NAME, {"format": CANARIES_FORMAT})
    commitment, num = commitment_of(raw), len(found.synthetic)
    facts(
        {
            "commitment": commitment,
            "canaries": f"{num:,} of at most {found.tokens} tokens, at temperature {found.temperature:g}",
            "secrets": f"{len(found.secrets):,}, those trained on {found.repeats} time(s) each",
            "package": found.package_digest,
            "job": found.job_id,
        }
    )
    return {
        "commitment": commitment,
        "num": num,
        "num_secrets": len(found.secrets),
        "package_digest": found.package_digest,
        "job_id": found.job_id,
    }


def _used(thing: Thing) -> Used | None:
    path = thing.path / USED_NAME
    if not path.exists() and not path.is_symlink():
        return None
    return parse_strict(read_plain(path, COMMITMENT_LIMIT_BYTES), Used, USED_NAME, {"format": USED_FORMAT})


def _checked() -> dict[str, object]:
    return {"verified": False, "checked": _FORM}
