"""``offsite withdraw ID``: one client's adapter is taken out again, and what cannot be taken back is said.

The registry calls the bundle withdrawn and deletes its files; a running server, which looks there, serves it no longer.
Adapted folders that hold it are deleted. The full model was never changed by plugging in: with ``--model`` its digest
is taken once more and held against the one the package was made of. What a federation summed up stays in its sum.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from offsite.artefacts.manifest import MANIFEST_NAME
from offsite.console import say
from offsite.digests import model_digest, sha256_file
from offsite.errors import ConfigError, RunFailed, WrongBinding
from offsite.keys.identity import Identity, open_identity
from offsite.modelling.load import load_model
from offsite.sealed.withdrawal import Statement, write_withdrawal
from offsite.staging import refuse_existing, remove, require_place, staged_file
from server.plugging.adapted import open_adapted
from server.plugging.config import WithdrawConfig
from server.plugging.fit import require_base
from server.registry.federations import sums_with
from server.registry.registry import Registry
from server.registry.rows import Entry

_STANDING = ("accepted", "plugged-in", "served", "withdrawn")


@dataclass(frozen=True)
class _Folder:
    """An adapted folder that holds the bundle, and the digest of its manifest."""

    path: Path
    digest: str


def run(config: WithdrawConfig, *, identity: Identity | None = None) -> dict[str, object]:
    """Carry out ``offsite withdraw``: everything is checked first, then the registry, then the folders.

    A run that was killed in between is repeated: what is gone already is not missed.

    Args:
        identity: the keys, where they are open already.

    Raises:
        ConfigError: when the output exists, or no bundle or folder is there under that name.
        PolicyError: when the bundle was not accepted yet, or a plugging in is under way.
        WrongBinding: when a folder holds another bundle, or `model` is not the one it was plugged into.
        ArtefactError: with its class, when it was refused.
        RunFailed: when something could not be deleted; nothing is signed then.
        BadKey: when the keys do not open.
    """
    refuse_existing(config.output)
    require_place(config.output)
    if config.id == "latest":
        raise ConfigError("withdraw needs an id: the latest may be another by now", hint="offsite registry list")
    identity = identity or open_identity(config)
    with Registry.open(config.registry, config.keys) as registry:
        entry = registry.named(config.id)
        folders = _folders(config.adapted, entry) if entry.state in _STANDING else []
        if entry.state in _STANDING:
            _check_model(config.model, registry.job(entry.job_id).base_digest)
        gone = registry.withdraw(entry.id)  # refuses what does not stand
        _require_gone(registry.bundle_folder(entry.id))
        say(f"{entry.id}: withdrawn; its files are gone, and a server that looks in this registry serves it no longer")
        for folder in folders:
            remove(folder.path)
            _require_gone(folder.path)
            say(f"{folder.path.name}: deleted")
        job, sums = registry.job(entry.job_id), sums_with(registry, entry)
    statement = Statement(
        issuer=identity.public.fingerprint,
        client=gone.client,
        created=int(time.time()),
        bundle=gone.digest,
        bundle_digest=cast(str, gone.bundle_digest),
        job_id=gone.job_id,
        round=gone.round,
        package_digest=job.package_digest,
        base_digest=job.base_digest,
        was=entry.state,  # type: ignore[arg-type] # the registry has refused any other
        removed=tuple(folder.digest for folder in folders),
        model_checked=config.model is not None,
        sums=sums,
    )
    with staged_file(config.output) as stage:
        stage.write_bytes(write_withdrawal(statement, identity))
    _tell(statement, config)
    return {**statement.model_dump(mode="json"), "id": gone.id, "withdrawal": config.output.name}


def _folders(paths: Sequence[Path], entry: Entry) -> list[_Folder]:
    """Return the folders that are there and hold the bundle, each once; one that is gone is not missed.

    Raises:
        ConfigError: when one is a link: what it leads to would stay.
        WrongBinding: when one holds another bundle, or does not say which.
        ArtefactError: when one is no adapted folder, or its files do not agree with it.
    """
    found: list[_Folder] = []
    for path in paths:
        if path.is_symlink():
            hint = "name the folder that it leads to"
            raise ConfigError(f"--adapted {path.name!r} is a link, which would be all that is deleted", hint=hint)
        if any(path.exists() and path.samefile(one.path) for one in found):
            continue
        if not path.exists():
            say(f"{path.name}: not there")
            continue
        manifest = open_adapted(path)
        if manifest.intake != entry.id or manifest.bundle_digest != entry.bundle_digest:
            raise WrongBinding(f"{path.name!r} holds another bundle than {entry.id}; nothing was withdrawn")
        found.append(_Folder(path, sha256_file(path / MANIFEST_NAME)))
    return found


def _require_gone(path: Path) -> None:
    """Return only if nothing stands at `path`: what is signed afterwards says that it was deleted.

    Raises:
        RunFailed: when the disk did not let go of it.
    """
    if path.exists():
        raise RunFailed(
            f"{path.name!r} is withdrawn, and could not be deleted whole", hint="look why, then the same command again"
        )


def _check_model(model: str | None, base_digest: str) -> None:
    if model is None:
        return
    loaded = load_model(model)
    require_base(loaded, model_digest(loaded), base_digest, "the bundle's package")
    say(f"the full model's digest is {base_digest[:19]}, as before anything was plugged in")


def _tell(statement: Statement, config: WithdrawConfig) -> None:
    if not config.adapted:
        say("adapted folders were not looked for: name those that plug-in wrote with --adapted, and restart what")
        say("serves one without --registry")
    for one in statement.sums:
        since = f", and {one.rounds_since} round(s) after it stand on that" if one.rounds_since else ""
        say(f"federation {one.federation[:12]}: the sum of round {one.round} holds it{since};")
        say("  that cannot be taken back: leave its result unused, or begin anew without this client")
    say(f"{config.output.name}: signed; give it to the client, offsite inspect shows it")
