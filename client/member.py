"""A data owner's answer to one round: open it, tune on it, seal the bundle. The same on every way a round may come.

What belongs to a round lies in ``WORK/round-NNNN``: ``round``, the opened one; ``bundle.work``, checkpoints while it is
tuned; ``bundle``; ``sealed``, what goes back. Whatever is there already is not done again, so that a killed client goes
on where it was, and answers a round once.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from client.memberconfig import MemberConfig
from client.rounds import work_of
from client.tune import run as tune
from client.tune import work_folder
from offsite.bundle import open_bundle
from offsite.console import say
from offsite.errors import BadDigest, ConfigError, PolicyError, Replayed, RunFailed, WrongBinding
from offsite.job import read_job
from offsite.keys import open_identity
from offsite.ledger import Ledger
from offsite.package import open_package
from offsite.round import Round, open_round
from offsite.sealconfig import SealConfig
from offsite.sealing import open_sealed, seal_run
from offsite.trust import TrustStore

ROUND, BUNDLE, SEALED = "round", "bundle", "sealed"


class Member:
    """One client of one federation, with its keys open.

    Raises:
        ConfigError: when the settings do not fit each other or the job.
        ArtefactError: when package or job is unsound, or the keys do not open.
    """

    def __init__(self, config: MemberConfig) -> None:
        config.check()
        self.config, self.identity = config, open_identity(config)
        self.job, self.package = read_job(config.job).job, open_package(config.package)
        own = self.identity.public.fingerprint
        if self.job.client != own:
            raise WrongBinding(
                f"job {self.job.job_id[:12]} is for another client than these keys", hint="give the right --keys"
            )
        if self.job.package_digest != self.package.digest:
            raise WrongBinding(
                f"job {self.job.job_id[:12]} is about package {self.job.package_digest[:19]}, "
                f"{config.package.name!r} is {self.package.digest[:19]}"
            )
        if not config.data.is_file():
            raise ConfigError(f"no file named {config.data.name!r}", hint="check --data")
        try:
            config.work.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RunFailed(f"cannot use {config.work.name!r}: {(error.strerror or 'i/o error').lower()}") from None

    def take(self, sealed: Path) -> Round:
        """Return the round in the sealed folder, opened into its place; the same one again changes nothing.

        Raises:
            ArtefactError: when it is not from the job's owner, for this key, of this job, new or the same, and sound.
            PolicyError: when it asks for more steps than these settings allow.
        """
        fresh = self.config.work / ".round.partial"
        shutil.rmtree(fresh, ignore_errors=True)
        trust, now = TrustStore(self.config.keys), int(time.time())
        with Ledger(self.config.keys) as ledger:
            opened = open_sealed(sealed, fresh, identity=self.identity, trust=trust, ledger=ledger, now=now)
        try:
            return self._place(open_round(fresh), opened.manifest.round)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def answer(self, round_: Round) -> Path:
        """Return the sealed bundle that answers the round; what was done of it before is not done again.

        Raises:
            DataError, ConfigError, PolicyError, RunFailed: as tuning and sealing do; calling again goes on.
        """
        folder = round_.path.parent
        bundle, sealed = folder / BUNDLE, folder / SEALED
        if not sealed.is_dir():
            if not bundle.is_dir():
                resume = work_folder(bundle).is_dir()
                again = ", going on" if resume else ""
                say(f"round {round_.manifest.round} of {round_.manifest.num_rounds}: tuning{again}")
                tune(self.config.tuning(round_.path, bundle, resume=resume))
            if open_bundle(bundle).manifest.round_digest != round_.digest:
                raise BadDigest(f"{BUNDLE!r} of round {round_.manifest.round} answers another round than the one asked")
            seal_run(self._sealing(bundle, sealed, round_.manifest.round), identity=self.identity)
        return sealed

    def _sealing(self, bundle: Path, sealed: Path, number: int) -> SealConfig:
        return SealConfig(
            input=bundle,
            output=sealed,
            job=self.config.job,
            round=number,
            accept_leakage=self.config.accept_leakage,
            keys=self.config.keys,
            passphrase_file=self.config.passphrase_file,
        )

    def _place(self, found: Round, number: int) -> Round:
        """Return the opened round under its own name, once it is what the seal says and allowed here."""
        manifest = found.manifest
        if manifest.round != number:
            raise WrongBinding(f"sealed as round {number}, what came out is round {manifest.round}")
        if manifest.task == "finish":
            return found
        if manifest.steps > self.config.limit_steps:
            raise PolicyError(
                f"round {number} asks for {manifest.steps} steps, --limit-steps {self.config.limit_steps}"
            )
        place = work_of(self.config.work, number) / ROUND
        if place.is_dir():
            known = open_round(place)
            if known.digest != found.digest:
                raise Replayed(f"round {number} came before with another content", hint="tell the owner")
            return known
        place.parent.mkdir(mode=0o700, exist_ok=True)
        found.path.rename(place)
        return open_round(place)
