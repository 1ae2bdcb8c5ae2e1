"""``offsite invite``: one file by which a client joins a job, and what is sealed for it in its place."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

from offsite.artefacts.job import JOB_NAME, OpenedJob, read_job
from offsite.artefacts.package import open_package
from offsite.console import say, say_next, utc
from offsite.errors import ConfigError, Expired, WrongBinding
from offsite.exchange.verbs import seal_run
from offsite.folders import read_plain
from offsite.keys.identity import Identity, open_identity
from offsite.keys.trust import TrustStore
from offsite.sealed.config import SealConfig
from offsite.sealed.folder import read_sealed
from offsite.sealed.invitation import CERTIFICATE_LIMIT_BYTES, Invitation, fingerprint_words, write_invitation
from offsite.sealed.manifest import SealedManifest
from offsite.staging import refuse_existing
from offsite.strictjson import parse_strict
from server.exchange.config import InviteConfig


def run(config: InviteConfig, *, identity: Identity | None = None) -> dict[str, object]:
    """Carry out ``offsite invite``. What is sealed stands before the invitation does.

    Args:
        identity: the keys, where they are open already.

    Raises:
        ConfigError: when the output exists, or a setting does not go with what is invited to.
        Expired: when the job is past its date.
        WrongBinding: when the job is another owner's, or the package is not the job's.
        ArtefactError: when job or package is unsound, or the client is not pinned.
    """
    refuse_existing(config.output)
    now, identity = int(time.time()), identity or open_identity(config)
    opened = read_job(config.what) if (config.what / JOB_NAME).exists() else None
    stated = _of_package(config, now) if opened is None else _of_job(config, opened, identity, now)
    invitation = Invitation(
        title=config.title,
        card=base64.b64encode(identity.public.card).decode(),
        url=config.url,
        certificate=_certificate(config.certificate),
        created=now,
        **stated,
    )
    sealed = {} if opened is None else _sealed(config, opened, identity)
    digest = write_invitation(config.output, invitation, identity)
    _say_what_next(config, opened, identity, invitation)
    return {
        "invitation": config.output.name,
        "digest": digest,
        "fingerprint": identity.public.fingerprint,
        "job_id": invitation.job_id,
        "package_digest": invitation.package_digest,
        "client": invitation.client,
        "url": invitation.url,
        "expires": invitation.expires,
        "sealed": sealed,
    }


def _of_job(config: InviteConfig, opened: OpenedJob, identity: Identity, now: int) -> dict[str, Any]:
    job = opened.job
    if job.owner != identity.public.fingerprint:
        raise WrongBinding(f"job {job.job_id[:12]} is of another owner than these keys", hint="give the right --keys")
    if now > job.expires:
        raise Expired(f"job {job.job_id[:12]} expired on {utc(job.expires)}", hint="make a new one: offsite job create")
    if "days" in config.model_fields_set:
        raise ConfigError("--days: an invitation to a job counts as long as the job", hint="leave --days out")
    TrustStore(config.keys).require(job.client, now=now)
    named = {"job_id": job.job_id, "job_digest": opened.digest, "client": job.client}
    return {**named, "package_digest": job.package_digest, "expires": job.expires}


def _of_package(config: InviteConfig, now: int) -> dict[str, Any]:
    given = {"--package": config.package, "--outbox": config.outbox}
    if wrong := [flag for flag, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(wrong)}: nothing is sealed before there is a job", hint="name a job folder")
    digest = open_package(config.what).digest
    return {"package_digest": digest, "expires": now + config.days * 86400}


def _certificate(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return read_plain(path, CERTIFICATE_LIMIT_BYTES, "certificate").decode("ascii")
    except UnicodeDecodeError:
        raise ConfigError(f"--certificate {path.name!r} is not a certificate in PEM") from None


def _sealed(config: InviteConfig, opened: OpenedJob, identity: Identity) -> dict[str, str]:
    """The job and its package are sealed for the client, where a package is named; return their names by kind.

    What an earlier call sealed of the same job is kept, so that a call that broke off can be repeated.
    """
    if config.package is None:
        return {}
    place, name = config.outbox or config.output.parent, opened.job.job_id[:12]
    found = {}
    for kind, source, job in (("job", config.what, None), ("package", config.package, config.what)):
        out = place / f"{kind}-{name}.sealed"
        found[kind] = out.name
        if out.is_dir():
            _require_same(out, kind, opened)
            say(f"{out.name!r} was sealed before")
            continue
        settings: dict[str, Any] = {"keys": config.keys, "passphrase_file": config.passphrase_file}
        seal_run(SealConfig(input=source, output=out, job=job, **settings), identity=identity)
    return found


def _require_same(sealed: Path, kind: str, opened: OpenedJob) -> None:
    manifest = parse_strict(read_sealed(sealed).manifest_raw, SealedManifest, "manifest.json", {})
    job = opened.job
    if (manifest.kind, manifest.job_id, manifest.issuer) != (kind, job.job_id, job.owner):
        raise WrongBinding(f"{sealed.name!r} is in the way: it was sealed for something else", hint="move it away")


def _say_what_next(config: InviteConfig, opened: OpenedJob | None, identity: Identity, invitation: Invitation) -> None:
    own, out = identity.public.fingerprint, config.output
    say(f"{out.name} counts until {utc(invitation.expires)}; it holds no secret, whoever reads it learns where to ask")
    say(f"read this to the client over another channel, letters or words:\n  {own}")
    say(f"  {' '.join(fingerprint_words(own))}")
    keys = config.key_words()
    if opened is None:
        say("the client runs: offsite join INVITATION --data FILE; it sends back its card. Once you compared it:")
        say_next("offsite", "trust", "add", "CARD", *config.key_words(opens=False))
        return
    if config.package is None:
        place = config.outbox or out.parent
        say_next("offsite", "seal", config.what, *keys, "-o", place / "job.sealed")
        say_next("offsite", "seal", "PACKAGE", "--job", config.what, *keys, "-o", place / "package.sealed")
    beside = "" if config.url is not None else ", with the sealed folders beside it"
    say(f"send {out.name}{beside}; the client runs: offsite join {out.name} --data FILE")
