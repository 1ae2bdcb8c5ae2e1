"""``offsite federate join``: take part in an owner's federation over its exchange, round after round, until it ends.

The client pulls; nothing reaches into its machine, and what runs is this program. A sealed round is fetched, opened,
tuned on and answered (``client/member.py``), as it is under Flower's own transport (``client/flower.py``). Killed, the
same command goes on: with the download, the tuning's checkpoint, the sealed bundle or the upload that it had come to.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from client.courier import Courier
from client.exchange import courier_of, fetch_offer, hand_in, owner_of
from client.member import Member
from client.memberconfig import JoinConfig
from offsite.console import say
from offsite.errors import RunFailed, WrongBinding
from offsite.faults import reach
from offsite.trust import TrustStore
from offsite.wire import Offers, OfferSummary

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
    with courier_of(config, member.identity, owner) as courier:
        numbers = _Loop(config, member, courier, trust).run()
    say(f"the federation is finished; {len(numbers)} round(s) were answered from here")
    return {"job_id": member.job.job_id, "answered": sorted(numbers), "num_rounds": len(numbers)}


class _Loop:
    """Looks for the newest round of the job, and answers it, until one says that it was the last."""

    def __init__(self, config: JoinConfig, member: Member, courier: Courier, trust: TrustStore) -> None:
        self._config, self._member, self._courier, self._trust = config, member, courier, trust
        self._heard = time.monotonic()

    def run(self) -> set[int]:
        """Return the rounds that were answered."""
        answered: set[int] = set()
        handled: set[str] = set()
        while True:
            offer = self._newest()
            if offer is None or offer.digest in handled:
                if time.monotonic() - self._heard > self._config.idle_seconds:
                    raise RunFailed("the owner has asked nothing for too long", hint="run the same command again")
                time.sleep(self._config.poll_seconds)
                continue
            self._heard = time.monotonic()
            number = self._answer(offer)
            if number is None:
                return answered
            answered.add(number)
            handled.add(offer.digest)
            self._heard = time.monotonic()

    def _newest(self) -> OfferSummary | None:
        offers = self._patiently(lambda: self._courier.ask("GET", "/v1/sealed", Offers)).offers
        own = [one for one in offers if one.kind == "round" and one.job_id == self._member.job.job_id]
        return max(own, key=lambda one: one.sequence, default=None)

    def _answer(self, offer: OfferSummary) -> int | None:
        """Return the number of the round that was answered now or before; None when it asks for nothing more."""
        member, pulled = self._member, self._pulled(offer)
        round_ = member.take(pulled)
        number = round_.manifest.round
        if round_.manifest.task == "finish":
            shutil.rmtree(pulled, ignore_errors=True)
            return None
        sealed = member.answer(round_)
        reach("round-sealed")
        status = self._patiently(lambda: hand_in(self._courier, sealed, verdict_seconds=_VERDICT_SECONDS))
        say(f"round {number} of {round_.manifest.num_rounds}: {status.state} by the owner")
        shutil.rmtree(pulled, ignore_errors=True)
        return number

    def _pulled(self, offer: OfferSummary) -> Path:
        out = self._config.work / _PULLED / offer.digest
        if out.is_dir():
            return out
        out.parent.mkdir(mode=0o700, exist_ok=True)
        own, limit = self._member.job.client, self._config.limit_bytes
        self._patiently(lambda: fetch_offer(self._courier, offer, out, trust=self._trust, own=own, limit_bytes=limit))
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
