"""``offsite job create``: the owner's terms for one client, known to the registry before they are sent."""

from __future__ import annotations

import secrets
import time

from offsite.artefacts.job import Job, Policy, write_job
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import open_package
from offsite.console import say, say_next
from offsite.errors import BadSchema, ConfigError
from offsite.keys.files import check_folder, read_limited
from offsite.keys.identity import CARD_LIMIT_BYTES, CARD_NAME, read_card
from offsite.keys.trust import TrustStore
from offsite.staging import refuse_existing
from server.registry.config import JobCreateConfig
from server.registry.registry import Registry


def run(config: JobCreateConfig) -> dict[str, object]:
    """Carry out ``offsite job create``. The job is registered first, so that no client holds one that is not.

    Raises:
        ConfigError: when the output exists, or the package cannot carry the adapter.
        UnsupportedModel: when the adapter cannot be put on this architecture; the hint says what can.
        ArtefactError: when the package is rejected, or has no owner's record.
        Untrusted: when the client's card is not pinned, or no longer counts.
    """
    refuse_existing(config.output)
    now = int(time.time())
    check_folder(config.keys)
    owner = read_card(read_limited(config.keys / CARD_NAME, CARD_LIMIT_BYTES, what="card"))
    client = TrustStore(config.keys).require(config.client.strip().lower(), now=now)
    if client.fingerprint == owner.fingerprint:
        raise ConfigError("--client is this party's own fingerprint", hint="give the one of a card pinned by trust add")
    package = open_package(config.package)
    record = read_owner_record(owner_record_path(config.package))
    if record.package_digest != package.digest:
        raise BadSchema(f"the owner's record beside {config.package.name!r} is of another package")
    spec = config.spec()
    from adapters.targets import require_carried

    num_tensors = require_carried(package, spec)
    job = Job(
        job_id=secrets.token_hex(16),
        owner=owner.fingerprint,
        client=client.fingerprint,
        package_digest=package.digest,
        base_digest=package.manifest.base_digest,
        adapter=spec,
        learning_rate=config.learning_rate,
        rounds=config.rounds,
        created=now,
        expires=now + config.days * 86400,
        policy=Policy(
            max_relative_frobenius=config.max_relative_frobenius, max_relative_spectral=config.max_relative_spectral
        ),
        terms=config.terms,
    )
    with Registry.open(config.registry, config.keys, create=True) as registry:
        registry.add_job(job, package=config.package, client_name=client.name, now=now)
    digest = write_job(config.output, job)
    say(f"{config.output.name}: {num_tensors} tensors of {spec.kind}, {config.rounds} round(s), for {client.name}")
    keys = config.key_words()
    say_next("offsite", "seal", config.output, *keys, "-o", f"{config.output}.sealed")
    sealed = config.package.with_name(f"{config.package.name}.sealed")
    say_next("offsite", "seal", config.package, "--job", config.output, *keys, "-o", sealed)
    return {
        "job": config.output.name,
        "job_id": job.job_id,
        "job_digest": digest,
        "client": job.client,
        "owner": job.owner,
        "package_digest": job.package_digest,
        "base_digest": job.base_digest,
        "adapter": spec.model_dump(mode="json"),
        "rounds": job.rounds,
        "expires": job.expires,
    }
