"""``offsite job create``: the owner's terms for one client, known to the registry before they are sent."""

from __future__ import annotations

import secrets
import time

from adapters.settings import head_of
from offsite.artefacts.bundle import ENCODER_TASKS
from offsite.artefacts.job import Job, Policy, job_bytes, write_job
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import open_package
from offsite.console import say, say_next
from offsite.errors import BadSchema, ConfigError
from offsite.keys.files import check_folder, read_limited
from offsite.keys.identity import CARD_LIMIT_BYTES, CARD_NAME, read_card
from offsite.keys.trust import TrustStore
from offsite.seq2seq.refusals import refuse_settings
from offsite.staging import refuse_existing
from offsite.tasks.read import read_task
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
    trust = TrustStore(config.keys)
    client = trust.require(trust.named(config.client, now=now), now=now)
    if client.fingerprint == owner.fingerprint:
        raise ConfigError("--client is this party's own fingerprint", hint="give the one of a card pinned by trust add")
    package = open_package(config.package)
    record = read_owner_record(owner_record_path(config.package))
    if record.package_digest != package.digest:
        raise BadSchema(f"the owner's record beside {config.package.name!r} is of another package")
    task = None if config.task is None else read_task(config.task)
    spec = config.spec()
    from adapters.heads import encoder_of, read_size, require_classifier
    from adapters.targets import require_carried

    if package.is_encoder and config.head not in ENCODER_TASKS:
        what = "text" if config.head == "none" else config.head
        raise ConfigError(
            f"package {config.package.name!r} holds an encoder: no adapter for {what} goes on it",
            hint="make the job with --head classify --labels A,B, or regress, or tag",
        )
    if package.is_seq2seq:
        hint = "make the job for an adapter for text, without --head"
        refuse_settings(f"package {config.package.name!r}", {f"--head {config.head}": config.head != "none"}, hint)
    if config.head != "none":
        model = package.empty_model()
        require_classifier(model, config.head)
        head = head_of(config.head, config.labels, read_size(model), encoder_of(model))
        spec = spec.model_copy(update={"head": head})
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
            max_relative_frobenius=config.max_relative_frobenius,
            max_relative_spectral=config.max_relative_spectral,
            max_head_norm=config.max_head_norm,
        ),
        terms=config.terms,
        task=task,
    )
    job_bytes(job)  # nothing is registered that cannot be read
    with Registry.open(config.registry, config.keys, create=True) as registry:
        registry.add_job(job, package=config.package, client_name=client.name, now=now)
    digest = write_job(config.output, job)
    if task is not None:
        say(f"task {task.name!r} crosses in the job, with {len(task.samples)} samples and {len(task.tests)} tests")
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
        **({} if task is None else {"task": task.name, "task_digest": task.digest}),
        "expires": job.expires,
    }
