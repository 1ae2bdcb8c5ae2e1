"""A client's answer to one round of a federation: open it, tune on it, seal the bundle, however the round came.

What belongs to a round lies in ``WORK/round-NNNN``: ``round``, the opened one; ``bundle.work``, checkpoints while it is
tuned; ``bundle``; ``audit``, where one is asked for; ``sealed``, what goes back. Whatever is there already is not done
again, so that a killed client goes on where it was, and answers a round once.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.audit.audit import run as audit_run
from client.federation.config import MemberConfig
from client.federation.secureround import SecureRound, last_joined
from client.tuning.ready import work_folder
from client.tuning.rounds import work_of
from client.tuning.verb import run as tune
from offsite.artefacts.bundle import open_bundle
from offsite.artefacts.job import read_job
from offsite.artefacts.package import open_package
from offsite.artefacts.round import Round, open_round
from offsite.audits.gates import bundle_gates
from offsite.audits.record import BundleAudit, read_audit
from offsite.audits.statistics import require_extra
from offsite.console import muted, say
from offsite.errors import (
    BadDigest,
    ConfigError,
    OffsiteError,
    PolicyError,
    Replayed,
    RunFailed,
    TooLarge,
    WrongBinding,
)
from offsite.exchange.verbs import open_sealed, seal_run
from offsite.keys.identity import open_identity
from offsite.keys.trust import TrustStore
from offsite.sealed.config import SealConfig
from offsite.sealed.ledger import Ledger
from offsite.sealed.manifest import NOTE_NAME
from offsite.text.records import require_files
from offsite.text.rows import files_in

ROUND, BUNDLE, AUDIT, SEALED, NOTES = "round", "bundle", "audit", "sealed", "notes"


class Member:
    """One client of one federation, with its keys open.

    Raises:
        ConfigError: when the settings do not fit each other or the job.
        ArtefactError: when package or job is unsound, or the keys do not open.
    """

    def __init__(self, config: MemberConfig) -> None:
        config.check()
        if config.audit:
            require_extra()
        self._secure: SecureRound | None = None
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
        require_files(files_in(config.data))
        try:
            config.work.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RunFailed(f"cannot use {config.work.name!r}: {(error.strerror or 'i/o error').lower()}") from None

    def take(self, sealed: Path) -> Round:
        """Return the round in the sealed folder, opened into its place; the same one again changes nothing.

        Raises:
            ArtefactError: when it is not from the job's owner, for this key, of this job, new or the same, and sound.
            PolicyError: when it asks for more steps than these settings allow, or for a bundle where only secure sums
                are taken part in, by these settings or since a secure round of the job was joined.
            ConfigError: when the work folder holds another federation's rounds.
            RunFailed: while another process is at work in that folder.
        """
        fresh = self.config.work / ".round.partial"
        trust, now = TrustStore(self.config.keys), int(time.time())
        with self._alone():
            shutil.rmtree(fresh, ignore_errors=True)
            try:
                with Ledger(self.config.keys) as ledger:
                    opened = open_sealed(sealed, fresh, identity=self.identity, trust=trust, ledger=ledger, now=now)
                return self._place(open_round(fresh), opened.manifest.round)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)

    def answer(self, round_: Round) -> Path:
        """Return the sealed bundle that answers the round; what was done of it before is not done again.

        Raises:
            DataError, ConfigError, PolicyError, RunFailed: as tuning and sealing do; calling again goes on.
        """
        with self._alone():
            return self._answered(round_)

    @property
    def secure_round(self) -> int | None:
        """Number of the secure round whose secrets are in this process; None when none is under way."""
        return None if self._secure is None else self._secure.terms.round

    def has_joined(self, round_: Round) -> bool:
        """Tell whether this secure round was joined with these keys before, so that it cannot be answered again."""
        return round_.manifest.secure is not None and self._last_joined() >= round_.manifest.round

    def drop_out(self, round_: Round) -> Path:
        """Return a sealed note that is no message of the protocol: the owner then goes on without this client."""
        with self._alone():
            return self._note(b"dropped out", round_)

    def follow(self, sealed: Path) -> Path:
        """Return the sealed answer to the owner's next message of the secure round that is under way.

        Raises:
            PolicyError: when none is, or the message asks for more than the sum; the round is over then.
            WrongBinding: when it is for another round; the one under way goes on then.
            ArtefactError: when it is not from the job's owner, for this key, new, or not what peers signed; the round
                is over then.
        """
        fresh = self.config.work / ".note.partial"
        trust, now = TrustStore(self.config.keys), int(time.time())
        with self._alone():
            if self._secure is None:
                raise PolicyError("no secure round is under way here", hint="this client has dropped out of it")
            shutil.rmtree(fresh, ignore_errors=True)
            try:
                with Ledger(self.config.keys) as ledger:
                    opened = open_sealed(sealed, fresh, identity=self.identity, trust=trust, ledger=ledger, now=now)
                secure, manifest = self._secure, opened.manifest
                is_due = manifest.kind == "note" and manifest.round == secure.terms.round
                if is_due and manifest.files[0].bytes > secure.terms.limit_bytes:
                    raise TooLarge(f"a message of {manifest.files[0].bytes} bytes, limit {secure.terms.limit_bytes}")
                answer = secure.follow((fresh / NOTE_NAME).read_bytes()) if is_due else b""
            except OffsiteError:
                self._secure = None  # a refusal ends the round for this client
                raise
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
            if not is_due:  # as of a round that the owner broke off: nothing of the protocol was asked
                raise WrongBinding(f"this {manifest.kind} is not for the secure round that is under way")
            return self._note(answer, secure.round)

    def _note(self, content: bytes, round_: Round) -> Path:
        """Return one sealed message to the owner."""
        folder = round_.path.parent / NOTES
        number = len(list(folder.glob("*.sealed"))) if folder.is_dir() else 0
        plain, sealed = folder / f"{number:02d}", folder / f"{number:02d}.sealed"
        plain.mkdir(parents=True, exist_ok=True)
        try:
            (plain / NOTE_NAME).write_bytes(content)
            with muted():
                seal_run(self._sealing(plain, sealed, round_.manifest.round), identity=self.identity)
        except OSError as error:
            raise RunFailed(f"cannot write a message: {(error.strerror or 'i/o error').lower()}") from None
        finally:
            shutil.rmtree(plain, ignore_errors=True)
        return sealed

    def _last_joined(self) -> int:
        """Return the last secure round that was joined with these keys; in whatever work folder, the ledger knows."""
        with Ledger(self.config.keys) as ledger:
            return max(last_joined(self.config.work), ledger.last_round(self.job.job_id, "note"))

    def _joined(self, round_: Round, bundle: Path) -> Path:
        """Return the first message of a secure round, whose secrets live in this process from now on."""
        self._secure = None
        secure = SecureRound(
            round_,
            self.package,
            self.identity,
            TrustStore(self.config.keys),
            self.config.work,
            owner=self.job.owner,
            last_round=self._last_joined(),
            colluders=self.config.colluders,
        )
        sealed = self._note(secure.begin(bundle), round_)
        self._secure = secure
        return sealed

    def _answered(self, round_: Round) -> Path:
        folder = round_.path.parent
        bundle, sealed = folder / BUNDLE, folder / SEALED
        if self.has_joined(round_):
            raise Replayed(
                f"round {round_.manifest.round} was joined before from here, and its secrets are gone",
                hint="this client takes part again in the next round",
            )
        if not sealed.is_dir():
            if not bundle.is_dir():
                resume = work_folder(bundle).is_dir()
                again = ", going on" if resume else ""
                say(f"round {round_.manifest.round} of {round_.manifest.num_rounds}: tuning{again}")
                tune(self.config.tuning(round_.path, bundle, resume=resume))
            if open_bundle(bundle).manifest.round_digest != round_.digest:
                raise BadDigest(f"{BUNDLE!r} of round {round_.manifest.round} answers another round than the one asked")
            shutil.rmtree(work_folder(bundle), ignore_errors=True)  # of a run that was killed when all was done
            audit = self._audited(round_, bundle)
            if round_.manifest.secure is not None:
                return self._joined(round_, bundle)
            sealing = self._sealing(bundle, sealed, round_.manifest.round).model_copy(update={"audit": audit})
            seal_run(sealing, identity=self.identity)
        return sealed

    def _audited(self, round_: Round, bundle: Path) -> Path | None:
        """Return the audit of the round's bundle, made unless it was; None where these settings ask for none.

        Raises:
            PolicyError: when a gate failed; what could not be measured is a matter of ``accept_leakage``.
        """
        if not self.config.audit:
            return None
        audit = round_.path.parent / AUDIT
        if not audit.is_dir():
            say(f"round {round_.manifest.round} of {round_.manifest.num_rounds}: measuring what the bundle gives away")
            audit_run(self.config.auditing(round_.path, bundle, audit))
        found, _ = read_audit(audit)
        if not isinstance(found, BundleAudit) or found.run.bundle_digest != open_bundle(bundle).digest:
            raise BadDigest(f"{AUDIT!r} of round {round_.manifest.round} is of another bundle")
        if failed := [gate for gate in bundle_gates(found) if gate.verdict == "failed"]:
            raise PolicyError(
                f"round {round_.manifest.round}: gate {failed[0].name!r} failed: {failed[0].told}",
                hint="the bundle stays here and was not sent; tune.dp bounds what the next one gives away",
            )
        return audit

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process takes or answers a round in the work folder meanwhile."""
        handle = os.open(self.config.work / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise RunFailed(f"another process answers rounds in {self.config.work.name!r}") from None
        try:
            yield
        finally:
            os.close(handle)

    def _sealing(self, plain: Path, sealed: Path, number: int) -> SealConfig:
        return SealConfig(
            input=plain,
            output=sealed,
            job=self.config.job,
            round=number,
            accept_leakage=self.config.accept_leakage and plain.name == BUNDLE,
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
        if manifest.secure is None and (self.config.secure_only or self._last_joined() >= 0):
            raise PolicyError(
                f"round {number} asks for the bundle itself, not for a part of a sum",
                hint="a federation is secure from its first round to its last, or never; ask the owner",
            )
        place = work_of(self.config.work, number) / ROUND
        if place.is_dir():
            known = open_round(place)
            if known.manifest.federation_id != manifest.federation_id:
                raise ConfigError(
                    f"{self.config.work.name!r} holds rounds of another federation",
                    hint="give another folder to --work",
                )
            if known.digest != found.digest:
                raise Replayed(f"round {number} came before with another content", hint="tell the owner")
            return known
        place.parent.mkdir(mode=0o700, exist_ok=True)
        found.path.rename(place)
        return open_round(place)
