"""What ``offsite inspect`` shows of a registry: jobs, federations, and what became of every bundle."""

from __future__ import annotations

import re

from offsite.console import say, utc
from offsite.errors import BadSchema
from offsite.inspection.thing import Thing, read_plain
from offsite.inspection.words import ends, facts, rows, shown
from server.registry.registry import Registry

_ID_LIMIT_BYTES = 64
_STANDS = "database, log and the head in the keys folder, which agree"
_CLOSED = "nothing: it is opened only with the keys folder in which its head lies (--keys)"


def show(thing: Thing) -> dict[str, object]:
    """A registry is told, opened against the head in the keys folder; without that head nothing of it is opened.

    Raises:
        BadSchema: when ``registry.id`` is not an id.
        ArtefactError, RunFailed: as `Registry.open`.
    """
    found = read_plain(thing.path / "registry.id", _ID_LIMIT_BYTES).decode("ascii", "replace").strip()
    if not re.fullmatch(r"[0-9a-f]{32}", found):
        raise BadSchema(f"registry.id of {thing.name!r} is not 32 hex digits")
    keys = thing.names.keys
    if keys is None or not (keys / f"registry-{found}.head").is_file():
        say(f"registry {thing.name}; checked: {_CLOSED}")
        facts({"id": found})
        return {"kind": "registry", "id": found, "verified": False, "checked": _CLOSED}
    with Registry.open(thing.path, keys) as registry:
        entries, refused = registry.entries(), registry.refusals()
        jobs = registry.store.rows(
            "SELECT job_id, jobs.expires AS expires, name FROM jobs JOIN clients ON client = fingerprint"
            " ORDER BY jobs.expires DESC, job_id"
        )
        federations = registry.store.rows(
            "SELECT name, begun, (SELECT count(*) FROM finished AS one"
            " WHERE one.federation_id = federations.federation_id) AS rounds FROM federations ORDER BY begun"
        )
    say(f"registry {thing.name}; checked: {_STANDS}")
    facts({"id": found})
    rows("jobs", ["job", "client", "expires"], [
        [job["job_id"], job["name"], ends(job["expires"], thing.now)] for job in jobs
    ])  # fmt: skip
    rows("bundles", ["id", "state", "since", "round", "job", "client"], [
        [one.id, one.state, utc(one.changed), str(one.round), one.job_id[:12], one.client[:9]] for one in entries
    ])  # fmt: skip
    for one in entries:
        if one.state == "refused":
            say(f"  {one.id} was refused: {shown(one.reason)}: {shown(one.message)}")
    for verdict in refused:
        say(f"  refused on arrival: {verdict.id}, {verdict.reason_class}: {shown(verdict.message)}")
    if federations:
        rows("federations", ["name", "begun", "rounds finished"], [
            [one["name"], utc(one["begun"]), str(one["rounds"])] for one in federations
        ])  # fmt: skip
    return {
        "kind": "registry",
        "id": found,
        "jobs": {job["job_id"]: job["expires"] for job in jobs},
        "bundles": {one.id: one.state for one in entries},
        "refused": [verdict.id for verdict in refused],
        "federations": {one["name"]: one["rounds"] for one in federations},
        "verified": True,
        "checked": _STANDS,
    }
