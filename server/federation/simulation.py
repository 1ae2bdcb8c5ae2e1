"""``offsite federate simulate``: a whole federation in one process, for trials and benchmarks.

Everything is as between strangers: keys, jobs, seals, the registry's checks, Flower's loop and the client's own app.
Only the way between them is a call. The folder that it leaves holds every party's secrets, which no real owner has.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from offsite.artefacts.job import read_job
from offsite.artefacts.package import open_package
from offsite.artefacts.round import MAX_STEPS
from offsite.console import muted, say
from offsite.errors import ConfigError, RunFailed
from offsite.exchange.verbs import open_run, seal_run
from offsite.keys.config import KeygenConfig, TrustAddConfig
from offsite.keys.files import write_private
from offsite.keys.identity import CARD_NAME, open_identity, read_card
from offsite.keys.identity import run as keygen
from offsite.keys.trust import add as trust
from offsite.sealed.config import OpenConfig, SealConfig
from offsite.staging import staged_file
from server.federation.config import FederationConfig, RoundsConfig
from server.federation.federation import opened_federation, rule_of
from server.federation.participants import require_kind
from server.federation.results import finish, require_output, require_own, watch_of
from server.federation.simulationconfig import SimulateConfig
from server.registry.config import JobCreateConfig
from server.registry.job import run as create_job

CLIENT_APP = "client.federation.flower:app"
JOB = "job"
_DAYS = 365


@dataclass(frozen=True)
class Home:
    """A party's own folder."""

    folder: Path

    @property
    def keys(self) -> Path:
        """Its keys."""
        return self.folder / "keys"

    @property
    def passphrase(self) -> Path:
        """The file that opens them."""
        return self.folder / "passphrase"

    @property
    def fingerprint(self) -> str:
        """Of its card."""
        return read_card((self.keys / CARD_NAME).read_bytes()).fingerprint


def run(config: SimulateConfig) -> dict[str, object]:
    """Carry out ``offsite federate simulate``.

    Raises:
        ConfigError: when a file is missing or settings do not fit.
        RunFailed: when a round has too few answers; the same command goes on.
    """
    require_output(config)
    federation_config, settings = prepared(config)
    say(f"keys, jobs and settings of {len(settings)} clients are in {config.work.name!r}")
    outbox = config.work / "outbox"
    outbox.mkdir(exist_ok=True)
    with opened_federation(federation_config, open_identity(federation_config), outbox=outbox) as federation:
        from server.federation.flower import run as run_rounds
        from server.federation.grids import in_process

        require_own(federation)
        watch = watch_of(federation)
        grid = in_process({node: {"client": str(path)} for node, path in enumerate(settings.values(), 2)}, CLIENT_APP)
        run_rounds(federation, grid, watch=watch)
        return finish(federation, watch)


def prepared(config: SimulateConfig) -> tuple[FederationConfig, dict[str, Path]]:
    """Everybody's keys, jobs and settings are in the work folder; return the owner's settings and the clients' files.

    Raises:
        ConfigError: when a client's text is missing, the rule does not bear so few, or the folder was begun with other
            settings.
        ArtefactError: when the package is unsound.
    """
    if missing := sorted(name for name, path in config.clients.items() if not Path(path).is_file()):
        raise ConfigError(f"--clients: no file of client {missing[0]!r}: {Path(config.clients[missing[0]]).name!r}")
    open_package(config.package)
    rule_of(config)
    require_kind(config.adapter, config.adapter_dtype, config)  # all three before anything is made
    with muted():
        owner = _home(config.work / "owner", "owner")
        homes = {name: _home(config.work / "clients" / name, name) for name in sorted(config.clients)}
        settings = {name: _client(config, owner, homes[name], name) for name in homes}
        if config.secure:  # peers believe each other by their pinned cards, never by the owner's word
            _introduce(list(homes.values()))
        jobs = tuple(read_job(home.folder / JOB).job.job_id for home in homes.values())
    registry = config.work / "registry"
    own = {name: getattr(config, name) for name in RoundsConfig.model_fields}
    made = FederationConfig(**own, registry=registry, keys=owner.keys, passphrase_file=owner.passphrase, jobs=jobs)
    return made, settings


def _home(folder: Path, name: str) -> Home:
    """Return the party's folder, with keys in it; made unless it was."""
    home = Home(folder)
    if not (home.keys / CARD_NAME).is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not home.passphrase.is_file():
                write_private(home.passphrase, secrets.token_urlsafe(24).encode())
        except OSError as error:
            raise RunFailed(f"cannot use {folder.name!r}: {(error.strerror or 'i/o error').lower()}") from None
        keygen(KeygenConfig(output=home.keys, name=name, days=_DAYS, passphrase_file=home.passphrase))
    return home


def _client(config: SimulateConfig, owner: Home, client: Home, name: str) -> Path:
    """Return the client's settings file, once both know each other and the client has its job."""
    settings = client.folder / "member.json"
    content = {
        "package": str(config.package.resolve()),
        "job": str((client.folder / JOB).resolve()),
        "data": str(Path(config.clients[name]).resolve()),
        "work": str((client.folder / "work").resolve()),
        "keys": str(client.keys.resolve()),
        "passphrase_file": str(client.passphrase.resolve()),
        "accept_leakage": True,
        "limit_steps": MAX_STEPS,
        "tune": config.tune,
        **({"secure_only": True} if config.secure else {}),
    }
    if settings.is_file():
        known = {**json.loads(settings.read_text(encoding="utf-8")), "limit_steps": MAX_STEPS}
        spec = _terms(config, owner, client, name).spec()
        if known != json.loads(json.dumps(content)) or read_job(client.folder / JOB).job.adapter != spec:
            raise ConfigError(
                f"client {name!r} was set up with other settings in {config.work.name!r}",
                hint="put them back to go on, or give another --work",
            )
        return settings
    trust(TrustAddConfig(keys=owner.keys, card=client.keys / CARD_NAME, fingerprint=client.fingerprint))
    trust(TrustAddConfig(keys=client.keys, card=owner.keys / CARD_NAME, fingerprint=owner.fingerprint))
    _job(config, owner, client, name)
    with staged_file(settings) as stage:
        stage.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return settings


def _introduce(homes: list[Home]) -> None:
    for one, other in permutations(homes, 2):
        trust(TrustAddConfig(keys=one.keys, card=other.keys / CARD_NAME, fingerprint=other.fingerprint))


def _terms(config: SimulateConfig, owner: Home, client: Home, name: str) -> JobCreateConfig:
    """Return the settings of the client's job."""
    return JobCreateConfig(
        keys=owner.keys,
        package=config.package,
        client=client.fingerprint,
        registry=config.work / "registry",
        output=owner.folder / f"job-{name}",
        adapter=config.adapter,
        placement=config.placement,
        targets=config.targets,
        rank=config.lora_rank,
        alpha=config.alpha,
        adapter_dtype=config.adapter_dtype,
        rounds=config.rounds,
        days=_DAYS,
        max_relative_frobenius=config.max_relative_frobenius,
        max_relative_spectral=config.max_relative_spectral,
    )


def _job(config: SimulateConfig, owner: Home, client: Home, name: str) -> None:
    """The client's job is made, sealed and opened; what of it was done before is not done again."""
    terms, sealed, opened = (
        _terms(config, owner, client, name),
        owner.folder / f"job-{name}.sealed",
        client.folder / JOB,
    )
    if not terms.output.is_dir():
        create_job(terms)
    if not sealed.is_dir():
        seal_run(SealConfig(input=terms.output, output=sealed, keys=owner.keys, passphrase_file=owner.passphrase))
    if not opened.is_dir():
        open_run(OpenConfig(sealed=sealed, output=opened, keys=client.keys, passphrase_file=client.passphrase))
