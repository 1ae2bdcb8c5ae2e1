"""``offsite federate join``: take part in an owner's federation over its exchange, round after round, until it ends.

The client pulls; nothing reaches into its machine, and what runs is this program. A sealed round is fetched, opened,
tuned on and answered (``client/federation/member.py``), as it is under Flower's own transport
(``client/federation/flower.py``). Killed, the same command goes on: with the download, the tuning's checkpoint, the
sealed bundle or the upload that it had come to.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from client.exchange.http import ExchangeClient
from client.exchange.verbs import exchange_client, fetch_offer, hand_in, owner_of
from client.federation.config import JoinConfig
from client.federation.member import Member
from offsite.console import say
from offsite.errors import ArtefactError, PolicyError, RunFailed, WrongBinding
from offsite.exchange.wire import Offers, OfferSummary
from offsite.faults import reach
from offsite.keys.trust import TrustStore

Result = TypeVar("Result")

_PULLED = "pulled"
_VERDICT_SECONDS = 600.0


def join_run(config: JoinConfig) -> dict[str, object]:
    """Carry out ``offsite federate join``.

    Raises:
        ConfigError, DataError: when settings, job, package or data do not fit.
        PolicyError: when this client's own rules end its part: a budget that is spent, a round that asks too much.
        ArtefactError: when a round is not from the owner, or the owner refuses a bundle.
        RunFailed: when the exchange is not to be reached for long, or tuning breaks off.
    """
    member = Member(config.member())
    trust = TrustStore(config.keys)
    owner = owner_of(config.owner or member.job.owner, trust)
    if owner != member.job.owner:
        raise WrongBinding("the job is from another owner than --owner")
    say(f"joined as {member.job.client[:9]}; waiting for rounds of job {member.job.job_id[:12]}")
    with exchange_client(config, member.identity, owner) as exchange:
        numbers = _Loop(config, member, exchange, trust).run()
    say(f"the federation is finished; {len(numbers)} round(s) were answered from here")
    return {"job_id": member.job.job_id, "answered": sorted(numbers), "num_rounds": len(numbers)}


class _Loop:
    """Looks for the newest round of the job, and answers it, until one says that it was the last."""

    def __init__(self, config: JoinConfig, member: Member, exchange: ExchangeClient, trust: TrustStore) -> None:
        self._config, self._member, self._exchange, self._trust = config, member, exchange, trust
        self._heard = time.monotonic()
        self._handled: set[str] = set()

    def run(self) -> set[int]:
        """Return the rounds that were answered."""
        answered: set[int] = set()
        while True:
            offer = self._due()
            if offer is None:
                if time.monotonic() - self._heard > self._config.idle_seconds:
                    raise RunFailed("the owner has asked nothing for too long", hint="run the same command again")
                time.sleep(self._config.poll_seconds)
                continue
            self._heard = time.monotonic()
            pulled = self._pulled(offer)
            if pulled is None:
                continue
            number = self._followed(pulled) if offer.kind == "note" else self._answer(pulled)
            if number is None:
                return answered
            answered.add(number)
            self._handled.add(offer.digest)
            self._heard = time.monotonic()

    def _due(self) -> OfferSummary | None:
        """Return what is to be answered next: a message of the secure round under way, or the newest round."""
        offers = self._offers()
        if self._member.secure_round is not None:
            notes = [one for one in offers if one.kind == "note" and one.digest not in self._handled]
            if notes:
                return min(notes, key=lambda one: one.sequence)
        newest = _newest(offers)
        return None if newest is None or newest.digest in self._handled else newest

    def _offers(self) -> list[OfferSummary]:
        offers = self._patiently(lambda: self._exchange.ask("GET", "/v1/sealed", Offers)).offers
        return [one for one in offers if one.job_id == self._member.job.job_id]

    def _answer(self, pulled: Path) -> int | None:
        """Return the number of the round that was answered now or before; None when it asks for nothing more."""
        member = self._member
        round_ = member.take(pulled)
        number = round_.manifest.round
        if round_.manifest.task == "finish":
            shutil.rmtree(pulled, ignore_errors=True)
            return None
        if member.has_joined(round_):
            say(f"round {number} was joined before this start, and its secrets are gone: waiting for the next round")
            self._hand_in_note(member.drop_out(round_), number)  # so that the others need not wait for this client
            return number
        sealed = member.answer(round_)
        reach("round-sealed")
        if round_.manifest.secure is not None:
            self._hand_in_note(sealed, number)
            return number
        status, _ = self._patiently(lambda: hand_in(self._exchange, sealed, verdict_seconds=_VERDICT_SECONDS))
        say(f"round {number} of {round_.manifest.num_rounds}: {status.state} by the owner")
        shutil.rmtree(pulled, ignore_errors=True)
        return number

    def _followed(self, pulled: Path) -> int:
        """Return the number of the secure round whose next message was answered, or refused: the next round comes."""
        number = self._member.secure_round or 0
        try:
            self._hand_in_note(self._member.follow(pulled), number)
        except (ArtefactError, PolicyError) as error:  # one bad peer or owner must not end this client's part for good
            out = "" if self._member.secure_round is not None else "; this client is out of it, and waits for the next"
            say(f"secure round {number}: {type(error).__name__}: {error}{out}")
        shutil.rmtree(pulled, ignore_errors=True)
        return number

    def _hand_in_note(self, sealed: Path, number: int) -> None:
        """The message is with the owner, unless it takes none of that round any more."""
        try:
            self._patiently(lambda: hand_in(self._exchange, sealed, verdict_seconds=_VERDICT_SECONDS))
        except ArtefactError as error:
            say(f"secure round {number}: the owner does not take this client's message: {error}")

    def _pulled(self, offer: OfferSummary) -> Path | None:
        """Return the sealed round; None when the owner took it back meanwhile, as when it was closed."""
        out = self._config.work / _PULLED / offer.digest
        if out.is_dir():
            return out
        out.parent.mkdir(mode=0o700, exist_ok=True)
        own, limit = self._member.job.client, self._config.limit_bytes
        try:
            self._patiently(
                lambda: fetch_offer(self._exchange, offer, out, trust=self._trust, own=own, limit_bytes=limit)
            )
        except ArtefactError:
            if any(one.digest == offer.digest for one in self._offers()):
                raise
            shutil.rmtree(out.with_name(f"{out.name}.work"), ignore_errors=True)
            return None
        return out

    def _patiently(self, work: Callable[[], Result]) -> Result:
        """Return what comes of `work`; while the exchange is away it is tried again, for the idle time at most."""
        began, told = time.monotonic(), False
        while True:
            try:
                return work()
            except RunFailed as error:
                if time.monotonic() - began > self._config.idle_seconds:
                    raise
                if not told:
                    say(f"{error}; trying again")
                    told = True
                time.sleep(self._config.poll_seconds)


def _newest(offers: list[OfferSummary]) -> OfferSummary | None:
    rounds = [one for one in offers if one.kind == "round"]
    return max(rounds, key=lambda one: one.sequence, default=None)
