"""What a federation leaves at its end: ``results.json``, and of a shared adapter the adapted model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from offsite.artefacts.manifest import read_manifest
from offsite.console import say, table
from offsite.errors import ConfigError
from offsite.staging import leftovers, remove, staged_file
from server.federation.config import RoundsConfig
from server.federation.evaluation import Watch, better, text_of, write_adapted
from server.federation.federation import Federation
from server.plugging.adapted import ADAPTED_FORMAT, AdaptedManifest

RESULTS, ADAPTED = "results.json", "adapted"


def watch_of(federation: Federation) -> Watch | None:
    """Return what measures the model after each round, when the owner has held-out text."""
    return Watch(federation) if federation.config.heldout else None


def require_output(config: RoundsConfig) -> None:
    """Return only if the output is new or a federation's own.

    Raises:
        ConfigError: when something else stands there.
    """
    out = config.output
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output {out.name!r} is not a folder")
    if out.is_dir():
        for name in (RESULTS, ADAPTED):  # what a run left that was killed while it wrote them
            for path in leftovers(out / name):
                remove(path)
        if {path.name for path in out.iterdir()} - {RESULTS, ADAPTED}:
            raise ConfigError(f"output {out.name!r} holds something else", hint="choose another folder with -o")


def require_own(federation: Federation) -> None:
    """Return only if no other federation's result stands in the output.

    Raises:
        ConfigError: when one does, or this one's with another share.
        ArtefactError: when the manifest of the adapted model in it is unsound.
    """
    out = federation.config.output
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        found = json.loads((out / RESULTS).read_text(encoding="utf-8")).get("federation_id")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != federation.store.id:
        raise ConfigError(
            f"output {out.name!r} holds another federation's result", hint="choose another folder with -o"
        )
    if (out / ADAPTED).exists():
        written = read_manifest(out / ADAPTED, AdaptedManifest, ADAPTED_FORMAT)[0].plugged
        if written != federation.config.way:
            raise ConfigError(
                f"output {out.name!r} holds the model with {written.told}, here it is {federation.config.way.told}",
                hint="choose another folder with -o; rounds that are closed are not run again",
            )


def finish(federation: Federation, watch: Watch | None = None) -> dict[str, object]:
    """Write ``results.json`` and, of a shared adapter, the adapted model; return what the command prints.

    Raises:
        RunFailed: when the disk is full.
    """
    config = federation.config
    config.output.mkdir(parents=True, exist_ok=True)
    last = watch(federation.num_finished) if watch is not None else {}
    zero_shot = dict(watch.zero_shot) if watch is not None else {}
    names = {key: one.name for key, one in federation.participants.items()}
    result = results_of(federation, zero_shot, last)
    with staged_file(config.output / RESULTS, replace=True) as stage:
        stage.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    adapted = config.output / ADAPTED
    if not federation.states:
        say("no round counted: there is nothing to adapt the model with")
    elif config.mode == "shared" and config.merge and not adapted.exists():
        write_adapted(federation, adapted)
        say(f"adapted model: {adapted.name} in {config.output.name!r}; offsite serve opens it")
    if last:
        rows = [[one, f"{zero_shot[text_of(one, zero_shot)]:.3f}", f"{score:.3f}"] for one, score in last.items()]
        table("perplexity on the owner's held-out texts", ["text", "zero-shot", "plugged in"], rows)
        for name in better(zero_shot, last):
            say(f"not better than zero-shot: {name}")
    told = {key: result[key] for key in ("name", "mode", "rounds", "zero_shot", "plugged_in", "not_better")}
    return {**told, "clients": sorted(names.values()), "output": config.output.name}


def results_of(federation: Federation, zero_shot: Mapping[str, float], last: Mapping[str, float]) -> dict[str, Any]:
    """Return what ``results.json`` holds."""
    names = {key: one.name for key, one in federation.participants.items()}
    rounds = []
    for one in federation.finished:
        content = one.content
        rounds.append(
            {
                "round": one.round,
                "used": [names.get(key, key) for key in content["used"]],
                "left_out": {names.get(key, key): reason for key, reason in content["left_out"].items()},
                "norms": {names.get(key, key): value for key, value in content["norms"].items()},
                "figures": content["figures"],
                "flags": {names.get(key, key): reason for key, reason in content["flags"].items()},
            }
        )
    way = federation.config.way
    return {
        **({} if way.is_plain else {"way": str(way)}),
        "name": federation.config.name,
        "federation_id": federation.store.id,
        "mode": federation.config.mode,
        "settings": federation.config.fixed(),
        "package_digest": federation.package.digest,
        "base_digest": federation.record.base_digest,
        "rounds": rounds,
        "zero_shot": dict(zero_shot),
        "plugged_in": dict(last),
        "not_better": better(zero_shot, last),
    }
