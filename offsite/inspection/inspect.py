"""``offsite inspect THING``: what it is, told by its files and never by its name, and what it holds, in words.

A folder is known by a file in it and the format that the file states; a file, by its own format. Of what this package
may not import, because only an owner has it, the table names the function and nothing is imported before it is met.
"""

from __future__ import annotations

import importlib
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from offsite.artefacts.manifest import MANIFEST_LIMIT_BYTES
from offsite.console import say
from offsite.errors import ArtefactError, BadSchema, WrongBinding
from offsite.folders import kind_of
from offsite.inspection.config import InspectConfig
from offsite.inspection.thing import Names, Thing, name_of, read_plain
from offsite.inspection.words import rows, shown
from offsite.keys.config import DEFAULT_KEYS
from offsite.sealed.manifest import REPORT_LIMIT_BYTES
from offsite.strictjson import parse_object

_MAX_ENTRIES = 500
_MAX_NAMED = 5

_ARTEFACT = "offsite.inspection.artefacts:show"
FOLDERS: dict[str, dict[str, tuple[str, str]]] = {
    "offsite.json": {
        "offsite/package/1": ("package", _ARTEFACT),
        "offsite/bundle/1": ("bundle", _ARTEFACT),
        "offsite/round/1": ("round", _ARTEFACT),
        "offsite/adapted/1": ("adapted folder", "server.plugging.inspect:show"),
    },
    "manifest.json": {"offsite/sealed/1": ("sealed folder", "offsite.inspection.parties:show_sealed")},
    "job.json": {"offsite/job/1": ("job", "offsite.inspection.artefacts:show_job")},
    "report.signatures.json": {
        "offsite/signatures/1": ("privacy report", "offsite.inspection.evidence:show_report"),
    },
    "report.json": {
        "offsite/canaries-commitment/1": ("commitment to canaries", "offsite.inspection.canaries:show_commitment"),
        "offsite/canaries/1": ("revealed canaries", "offsite.inspection.canaries:show_reveal"),
    },
    "canaries.json": {"offsite/canaries/1": ("canaries", "offsite.inspection.canaries:show")},
    "results.json": {
        "offsite/results/1": ("results", "offsite.inspection.evidence:show_results"),
        "": ("result of a federation", "offsite.inspection.federation:show_federation"),
    },
    "audit.json": {"offsite/audit/1": ("audit", "offsite.inspection.evidence:show_audit")},
    "card.json": {"offsite/card/1": ("keys folder", "offsite.inspection.parties:show_keys")},
}
"""By the file that tells a folder's kind, and the format it states: what the folder is, and what shows it."""

MARKED: dict[str, tuple[str, str]] = {
    "registry.id": ("registry", "server.registry.inspect:show"),
    "note.bin": ("note", "offsite.inspection.federation:show_note"),
}
"""By files that state no format."""

FILES: dict[str, tuple[str, str]] = {
    "offsite/card/1": ("card", "offsite.inspection.parties:show_card"),
    "offsite/invitation/1": ("invitation", "offsite.inspection.parties:show_invitation"),
    "offsite/job/1": ("job", "offsite.inspection.artefacts:show_job"),
    "offsite/owner/1": ("owner's record of a package", "offsite.inspection.artefacts:show_owner"),
    "offsite/release/1": ("record of a release", "offsite.inspection.evidence:show_release"),
    "offsite/run/1": ("record of a run", "offsite.inspection.evidence:show_run"),
    "offsite/withdrawal/1": ("withdrawal", "offsite.inspection.parties:show_withdrawal"),
}

ELSEWHERE: dict[str, tuple[str, str]] = {
    "offsite/trust/1": ("the pinned parties of a keys folder", "offsite trust list"),
    "offsite/marks/1": ("an owner's marks", "offsite trace"),
    "offsite/dashboard/1": ("the hash of a dashboard's token", "offsite owner up"),
    "offsite/exploration/1": (
        "an exploration of sizes; it is JSON that a person can read",
        "offsite distill --explore",
    ),
    "offsite/rehearsal/1": ("a rehearsal; it is JSON that a person can read", "offsite rehearse"),
}
"""Files of offsite that other verbs work with."""

_WITHIN = frozenset({"report.json", "results.json", "audit.json", "canaries.json", "offsite.json", "manifest.json"})
"""Files that are told with the folder they lie in."""

_KNOWN = ", ".join(
    dict.fromkeys(
        kind
        for kind, _ in (*(one for each in FOLDERS.values() for one in each.values()), *MARKED.values(), *FILES.values())
    )
)


@dataclass(frozen=True)
class Recognised:
    """What a thing is, in a word or two, the file or folder that is shown for it, and the function that shows it."""

    what: str
    path: Path
    shower: str


def run(config: InspectConfig) -> dict[str, object]:
    """Show the thing on stderr, and return what it is, its main fields, and whether anything of it was verified.

    Raises:
        ArtefactError: when it is nothing that offsite knows, or a check of it failed.
    """
    default = DEFAULT_KEYS.expanduser()
    keys = config.keys if config.keys is not None else default if default.is_dir() else None
    names = Names(keys)
    if config.keys is not None:
        names.store  # noqa: B018 - a folder that is named must be one
    path = config.thing if config.thing.name else config.thing.absolute()  # "." has no name to be told by
    thing = Thing(path, names, int(time.time()), config.tensors)
    try:
        found = recognise(thing.path)
    except ArtefactError as error:
        things = _things_in(thing.path) if type(error) is ArtefactError else {}
        if not things:
            raise
        return _show_folder(thing, things)
    shower: Callable[[Thing], dict[str, object]] = _resolve(found.shower)
    return shower(replace(thing, path=found.path))


def recognise(path: Path) -> Recognised:
    """Return what lies at `path`, by what its files state; nothing else of it is read.

    Raises:
        ArtefactError: when it is nothing that offsite knows; says what was found.
        WrongBinding: when it states a format that offsite does not know, BadSchema when it states none.
        WrongNames: when what tells its kind is a link, a pipe or a device.
    """
    if path.is_dir():
        return _folder(path)
    raw = read_plain(path, REPORT_LIMIT_BYTES)
    name = name_of(path)
    if path.name in _WITHIN:
        return _folder(path.parent)
    try:
        stated = _format(raw, name)
    except BadSchema:
        _refuse_part(path)
        raise ArtefactError(f"{name!r} is no file that offsite shows", hint=_hint()) from None
    if stated in ELSEWHERE:
        what, verb = ELSEWHERE[stated]
        raise ArtefactError(f"{name!r} is {what}", hint=f"{verb} works with it")
    if stated not in FILES:
        if not stated:
            _refuse_part(path)
        raise WrongBinding(f"{name!r} states {_named(stated)}, which is no file that offsite shows", hint=_hint())
    return Recognised(FILES[stated][0], path, FILES[stated][1])


def _refuse_part(path: Path) -> None:
    """Return only if the file does not lie in a folder that is told as a whole, such as one of keys.

    Raises:
        ArtefactError: naming that folder; what the file holds is not told.
    """
    folder = Path(os.path.normpath(path.absolute())).parent
    kind = kind_of(folder)
    if kind is not None and kind != "a model":
        given = shlex.quote(os.path.normpath(path.parent))
        raise ArtefactError(f"{name_of(path)!r} lies in {kind} and is told with it", hint=f"offsite inspect {given}")


def _folder(path: Path) -> Recognised:
    names = _names_in(path)
    for marker, formats in FOLDERS.items():
        if marker in names:
            raw = read_plain(path / marker, max(MANIFEST_LIMIT_BYTES, REPORT_LIMIT_BYTES))
            stated = _format(raw, f"{marker} of {name_of(path)!r}")
            if stated not in formats:
                raise WrongBinding(
                    f"{name_of(path)!r}: {marker} states {_named(stated)}, expected "
                    f"{' or '.join(one for one in formats if one)}",
                    hint="both sides need the same offsite" if stated.startswith("offsite/") else _hint(),
                )
            return Recognised(formats[stated][0], path, formats[stated][1])
    for marker, (what, shower) in MARKED.items():
        if marker in names:
            return Recognised(what, path, shower)
    listed = ", ".join(repr(shown(one, 60)) for one in names[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
    told = f"folder {name_of(path)!r} holds {listed}{more}: nothing that offsite knows"
    raise ArtefactError(told if names else f"folder {name_of(path)!r} is empty", hint=_hint(names))


def _hint(names: list[str] | None = None) -> str:
    if names is not None and "config.json" in names and any(one.endswith(".safetensors") for one in names):
        return "it looks like a model; offsite distill makes a package of one"
    return f"offsite knows: {_KNOWN}"


def _names_in(path: Path) -> list[str]:
    try:
        with os.scandir(path) as found:
            return sorted(entry.name for entry in islice(found, _MAX_ENTRIES))
    except OSError:
        raise ArtefactError(f"folder {name_of(path)!r} cannot be read") from None


def _format(raw: bytes, what: str) -> str:
    """Return the format that a JSON object states, empty when it states none."""
    stated = parse_object(raw, what).get("format")
    return stated if isinstance(stated, str) else ""


def _named(stated: str) -> str:
    return f"format {shown(stated, 60)!r}" if stated else "no format"


def _things_in(path: Path) -> dict[str, str]:
    """Return the names in a folder that offsite knows, and what each is."""
    if not path.is_dir():
        return {}
    found = {}
    for name in _names_in(path):
        try:
            found[name] = recognise(path / name).what
        except ArtefactError:
            continue  # unknown or unsound: inspecting it says which
    return found


def _show_folder(thing: Thing, things: dict[str, str]) -> dict[str, object]:
    checked = "nothing; inspect each by its name"
    say(f"folder {thing.name}: {len(things):,} thing(s) that offsite knows")
    rows("things", ["name", "what it is"], things.items())
    return {"kind": "folder", "things": things, "verified": False, "checked": checked}


def _resolve(spec: str) -> Any:
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)
