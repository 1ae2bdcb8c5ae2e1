"""Secure rounds at the owner's: what they are asked under, the messages of the protocol, and what becomes of the sum.

The owner sees that somebody takes part and how large the sum is, and no single update (``offsite/secagg/messages.py``).
So nothing can be checked of a single one, no rule can compare them, and a bad client can spoil a round: clients clip,
and the sum is held against what so many clipped updates can be. A round that was broken off is never asked again.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from adapters.norms import base_tensors
from adapters.updates import truncated
from adapters.vector import length, update_from
from offsite.artefacts.round import open_round
from offsite.console import muted, say
from offsite.errors import RunFailed, WrongBinding
from offsite.exchange.packing import unpack
from offsite.exchange.verbs import open_sealed, seal_run
from offsite.sealed.config import SealConfig
from offsite.sealed.ledger import Ledger
from offsite.sealed.manifest import NOTE_NAME, sealed_size
from offsite.secagg.terms import Terms, read_terms
from server.aggregation.secagg import ServerRound, Total
from server.federation.federation import Federation
from server.federation.state import SHARED, Told
from server.registry.federations import Finished
from server.registry.messages import MessageStore

_SLACK_BYTES = 2**21  # of a sealed folder beside its payload


class SecureRounds:
    """The secure rounds of a federation."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation

    def close_sum(self, number: int, total: Total, left_out: Mapping[str, str]) -> Finished:
        """The sum of a secure round counts: its mean is added, written, and the round is finished.

        Raises:
            RunFailed: when the sum is longer than that of so many clipped updates can be; nothing has changed then.
        """
        federation, num = self._federation, len(total.contributors)
        clip = federation.config.clip
        found = length(total.tensors)
        if not found <= clip * num * (1 + 1e-3):
            raise RunFailed(
                f"round {number}: the sum is {found:.4g} long, {num} updates of at most {clip:g} cannot be",
                hint="somebody did not clip; the model is as it was",
            )
        mean = {name: tensor / num for name, tensor in total.tensors.items()}
        base = base_tensors(federation.package, list(federation.shapes))
        start = federation.start_of(number)
        update = update_from(federation.spec, mean, start, base, is_conv1d=federation.is_conv1d)
        state = federation.stepped(update)
        figures = {"norm_sum": found, "num_contributors": float(num)}
        if federation.config.rank is not None:
            state, figures["truncation_error"] = truncated(state, federation.config.rank)
        told = Told(list(total.contributors), dict(left_out), {}, figures)
        return federation.finish_round(number, {SHARED: state}, told)

    def void_unfinished(self) -> None:
        """A secure round that was broken off is finished without effect: asked again, two sums could show an update."""
        number = self._federation.num_finished + 1
        asked = self._federation.store.asked(self._federation.job_ids, number)
        if self._federation.config.secure and asked:
            reasons = dict.fromkeys(asked, "the round was broken off and is not asked again")
            self._federation.finish_round(number, dict(self._federation.states), Told([], reasons, {}, {}))
            self.clear(number)
            say(f"round {number} was broken off: it counts for nothing, and the next one is asked")

    def terms(self, number: int) -> Terms:
        """Return what the secure round was asked under.

        Raises:
            RunFailed: when it was not asked.
        """
        asked = self._federation.store.asked(self._federation.job_ids, number)
        if not asked:
            raise RunFailed(f"round {number} was not asked")
        manifest = open_round(self._federation.registry.round_folder(next(iter(asked.values())))).manifest
        return read_terms((manifest.secure or "").encode())

    def owner_part(self, number: int) -> ServerRound:
        """Return the owner's part in the secure round, at its first stage."""
        terms, now = self.terms(number), int(time.time())
        return ServerRound(terms, {key: self._federation.trust.require(key, now=now) for key in terms.members})

    def note_for(self, client: str, number: int, step: int, content: bytes) -> Path:
        """Return a message to a client of a secure round, sealed into the outbox.

        Raises:
            Untrusted, Expired: when the client is trusted no longer, or its job over.
            RunFailed: when the disk fails.
        """
        job = self._federation.participants[client].job
        out = self._federation.outbox / f"note-{job.job_id[:12]}-{number:04d}-{step:02d}"
        shutil.rmtree(out, ignore_errors=True)  # of a round that was broken off
        plain = self._federation.folder / "note"
        shutil.rmtree(plain, ignore_errors=True)
        plain.mkdir(parents=True)
        (plain / NOTE_NAME).write_bytes(content)
        sealing = SealConfig(
            input=plain,
            output=out,
            job=self._federation.folder / "jobs" / job.job_id,
            round=number,
            keys=self._federation.config.keys,
            passphrase_file=self._federation.config.passphrase_file,
        )
        try:
            with muted():
                seal_run(sealing, identity=self._federation.identity)
        finally:
            shutil.rmtree(plain, ignore_errors=True)
        return out

    def read_note(self, client: str, number: int, parts: Mapping[str, bytes]) -> bytes:
        """Return a client's message of a secure round, once its seal is in order.

        Raises:
            ArtefactError: when it is not from that client, for this owner, of that job and round, and new; TooLarge
                before anything is written.
        """
        place, plain = self._federation.folder / "parcel", self._federation.folder / "note"
        for folder in (place, plain):
            shutil.rmtree(folder, ignore_errors=True)
        terms = self.terms(number)
        unpack(parts, place, limit_bytes=sealed_size(terms.limit_bytes + terms.num_vector_bytes) + _SLACK_BYTES)
        try:
            with Ledger(self._federation.config.keys) as ledger:
                now = int(time.time())
                opened = open_sealed(
                    place,
                    plain,
                    identity=self._federation.identity,
                    trust=self._federation.trust,
                    ledger=ledger,
                    now=now,
                )
            manifest, job_id = opened.manifest, self._federation.participants[client].job.job_id
            if (manifest.kind, manifest.job_id, manifest.issuer, manifest.round) != ("note", job_id, client, number):
                raise WrongBinding(f"what came is no message of this client for secure round {number}")
            return (plain / NOTE_NAME).read_bytes()
        finally:
            for folder in (place, plain):
                shutil.rmtree(folder, ignore_errors=True)

    def clear(self, number: int) -> None:
        """Messages of secure rounds up to that one are gone, those in the outbox and those that came."""
        for one in self._federation.participants.values():
            for path in self._federation.outbox.glob(f"note-{one.job.job_id[:12]}-*"):
                if re.fullmatch(r"note-[0-9a-f]{12}-[0-9]{4,}-[0-9]{2,}", path.name):
                    shutil.rmtree(path, ignore_errors=True)
        MessageStore(self._federation.registry).clear(number)
