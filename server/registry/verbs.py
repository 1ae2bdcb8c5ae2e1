"""``offsite registry list|show|accept|refuse`` and ``offsite log verify``: the owner looks, and decides."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from offsite.console import say, say_next, table, utc
from offsite.errors import ConfigError
from server.registry.config import (
    LogVerifyConfig,
    RegistryAcceptConfig,
    RegistryConfig,
    RegistryListConfig,
    RegistryRefuseConfig,
    RegistryShowConfig,
)
from server.registry.registry import Registry
from server.registry.rows import Entry


def list_run(config: RegistryListConfig) -> dict[str, object]:
    """Carry out ``offsite registry list``."""
    with _opened(config) as registry:
        entries, refused = registry.entries(), registry.refusals()
    rows = [[entry.id, entry.state, entry.client[:9], str(entry.round), _date(entry.changed)] for entry in entries]
    table("bundles", ["id", "state", "client", "round", "since"], rows)
    for found in refused:
        say(f"refused on arrival: {found.id}, {found.reason_class}: {found.message}")
    return {
        "bundles": [_shown(entry) for entry in entries],
        "refused": [
            {"digest": found.digest, "check": found.reason_class, "message": found.message} for found in refused
        ],
    }


def show_run(config: RegistryShowConfig) -> dict[str, object]:
    """Carry out ``offsite registry show``."""
    with _opened(config) as registry:
        entry = registry.named(config.id)
        job = registry.job(entry.job_id)
    shown = {**_shown(entry), "adapter": job.adapter.model_dump(mode="json"), "package_digest": job.package_digest}
    for name, value in shown.items():
        say(f"{name:<15} {utc(int(str(value))) if name in ('received', 'changed') else value}")
    return shown


def _decided(registry: Registry, word: str) -> Entry:
    """Return the bundle that is decided on; of several that wait another may be the latest by now."""
    waiting = [entry.id for entry in registry.entries() if entry.state == "verified"]
    if word == "latest" and len(waiting) > 1:
        raise ConfigError(f"{len(waiting)} bundles wait: {', '.join(waiting)}", hint="name the one that is meant")
    return registry.named(word)


def accept_run(config: RegistryAcceptConfig) -> dict[str, object]:
    """Carry out ``offsite registry accept``."""
    with _opened(config) as registry:
        entry = registry.advance(_decided(registry, config.id).id, "accepted")
    say(f"{entry.id} is {entry.state}")
    plug_in = ["offsite", "plug-in", "MODEL", entry.id, "--registry", config.registry]
    say_next(*plug_in, *config.key_words(), "-o", f"adapted-{entry.id}")
    return _shown(entry)


def refuse_run(config: RegistryRefuseConfig) -> dict[str, object]:
    """Carry out ``offsite registry refuse``."""
    with _opened(config) as registry:
        entry = registry.refuse(_decided(registry, config.id).id)
    say(f"{entry.id} is refused and its files are gone; round {entry.round} of its job is free")
    return _shown(entry)


def log_verify_run(config: LogVerifyConfig) -> dict[str, object]:
    """Carry out ``offsite log verify``."""
    with _opened(config) as registry:
        head = registry.verify_log()
    say(f"{head.number} line(s), each follows from the one before, and the head in the keys folder is the last;")
    say("the registry's rows are those that the lines lead to")
    return {"lines": head.number, "head": head.hash}


def _opened(config: RegistryConfig) -> Registry:
    return Registry.open(config.registry, config.keys)


def _shown(entry: Entry) -> dict[str, object]:
    figures = json.loads(entry.figures) if entry.figures else None
    return {**asdict(entry), "figures": figures}


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
