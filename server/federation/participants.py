"""Who takes part in a federation: clients whose cards are pinned, each with one valid job of its package.

Which they are follows from the registry and the trust store each time a run is started. A client may leave between two
starts, and none may come (``server/registry/federations.py``); a job belongs to one federation for ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import Job
from offsite.artefacts.manifest import read_manifest
from offsite.artefacts.round import ROUND_FORMAT, RoundManifest
from offsite.errors import ConfigError, WrongBinding
from offsite.keys.trust import TrustStore
from server.federation.config import FederationConfig, RoundsConfig
from server.registry.federations import first_asked, known_id
from server.registry.registry import Registry


@dataclass(frozen=True)
class Participant:
    """One client of the federation: its name on its card, and its job."""

    name: str
    job: Job

    @property
    def key(self) -> str:
        """The client's fingerprint."""
        return self.job.client


def participants(config: FederationConfig, registry: Registry, trust: TrustStore) -> dict[str, Participant]:
    """Return the clients of a federation by fingerprint: pinned, and with one valid job of its package.

    Raises:
        ConfigError: when a client has several, a job that was named is none of them, or they are too few.
    """
    if not config.package.is_dir():
        raise ConfigError(f"no package folder named {config.package.name!r}", hint="check --package")
    now, found = int(time.time()), {}
    names = {peer.keys.fingerprint: peer.keys.name for peer in trust.peers() if peer.state(now=now) == "trusted"}
    for key, name in sorted(names.items()):
        fitting = [job for job in registry.jobs_of(key) if _fits(config, registry, job, now)]
        if len(fitting) > 1:
            raise ConfigError(f"client {name!r} has {len(fitting)} jobs of this package", hint="name one with --jobs")
        if fitting:
            found[key] = Participant(name, fitting[0])
    if unknown := [given for given in config.jobs if not any(p.job.job_id.startswith(given) for p in found.values())]:
        raise ConfigError(f"--jobs: {unknown[0]!r} is no valid job of this package and of a pinned client")
    if len(found) < config.min_clients:
        raise ConfigError(
            f"{len(found)} client(s) have a valid job of this package, --min-clients {config.min_clients}",
            hint="offsite trust add pins a client, offsite job create makes its job",
        )
    return found


def require_unused(registry: Registry, name: str, job_ids: Iterable[str]) -> None:
    """Return only if no other federation asked anything of these jobs: a job's round has one content, for ever.

    Raises:
        ConfigError: naming the job.
    """
    own = known_id(registry, name)
    for job_id in job_ids:
        digest = first_asked(registry, job_id)
        if digest is None:
            continue
        manifest, _ = read_manifest(registry.round_folder(digest), RoundManifest, ROUND_FORMAT)
        if manifest.federation_id != own:
            raise ConfigError(
                f"job {job_id[:12]} has rounds of another federation than {name!r}",
                hint="offsite job create makes new jobs; --jobs names those to use",
            )


def _fits(config: FederationConfig, registry: Registry, job: Job, now: int) -> bool:
    if config.jobs and not any(job.job_id.startswith(given) for given in config.jobs):
        return False
    try:
        path = registry.package_path(job.package_digest)
    except WrongBinding:
        return False
    return now <= job.expires and path.resolve() == config.package.resolve()


def require_kind(kind: str, dtype: str, config: RoundsConfig) -> None:
    """Return only if updates of such adapters can be put together.

    Raises:
        ConfigError: when they cannot, or bundles of that dtype would not hold them.
    """
    if kind == "dora":
        raise ConfigError("the jobs ask for dora, whose updates cannot be put together", hint="use lora or blocks")
    if kind not in ("lora", "rslora") and dtype != "float32":
        raise ConfigError(
            f"the jobs ask for {kind} in {dtype}: weights that are rounded lose what a round moves them by",
            hint="--adapter-dtype float32, or a LoRA",
        )
    if config.share_a and kind not in ("lora", "rslora"):
        raise ConfigError(f"--share-a: an adapter of kind {kind} has no factor A")


def one_adapter(jobs: Iterable[Job], config: FederationConfig) -> AdapterSpec:
    """Return the adapter that all jobs ask for.

    Raises:
        ConfigError: when they differ, allow fewer rounds, or it is not one whose updates can be put together.
    """
    found = list(jobs)
    spec = found[0].adapter
    if any(job.adapter != spec for job in found):
        raise ConfigError("the clients' jobs ask for different adapters", hint="make jobs with the same adapter")
    if few := [job for job in found if job.rounds < config.rounds]:
        raise ConfigError(f"job {few[0].job_id[:12]} allows {few[0].rounds} round(s), --rounds {config.rounds}")
    require_kind(spec.kind, spec.dtype, config)
    return spec
