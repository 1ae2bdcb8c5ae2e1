"""``offsite join INVITATION --data FILE``: from an invitation to a bundle with its owner, on from wherever it ended.

In this order: the invitation, keys, the owner's card, job and package, terms, data, gates as far as they are known,
canaries, tuning, audit, verdict, seal, hand over. Nothing but signed requests leaves before somebody agreed to that.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.exchange.http import ExchangeClient
from client.join.config import InvitedConfig
from client.join.fetch import NotYet, Opened, clear_fetched, exchange_of, fetch, require_nothing_missing
from client.join.leave import leave, open_terms, require_gates, verdict
from client.join.outlook import all_can_pass, audit_share, expected_gates, num_canaries
from client.join.party import Joining, become, say_card, write_card
from client.join.people import agree
from client.join.work import Place, compute, data_digest, taken
from offsite.audits.gates import WEAK_EPSILON, passed
from offsite.audits.statistics import require_extra
from offsite.console import say, utc
from offsite.errors import ConfigError
from offsite.inspection.artefacts import show_job
from offsite.inspection.thing import Names, Thing
from offsite.sealed.invitation import Invited, read_invitation
from offsite.text.records import require_files
from offsite.text.rows import files_in


def run(config: InvitedConfig) -> dict[str, object]:
    """Carry out ``offsite join``.

    Raises:
        ConfigError: when a setting is wrong, or nobody is there to answer what has to be asked.
        DataError: when the data cannot be read as asked.
        PolicyError: when a gate did not pass, or somebody did not agree; nothing has left.
        ArtefactError: when anything that came is not what the owner signed for this key, or the owner refuses.
        RunFailed: when a step fails; what was done before is kept.
    """
    try:
        return _joined(config)
    except (KeyboardInterrupt, SystemExit):
        say(f"what was done is kept in {config.work.name!r}: the same command goes on from there")
        raise


def _joined(config: InvitedConfig) -> dict[str, object]:
    require_files(files_in(config.data))
    require_files(files_in(config.eval))
    require_extra()
    config.tuning(
        Path("package"), Path("job"), Path("bundle"), {}
    )  # what is wrong with --tune is told before anything else
    invited = read_invitation(config.invitation, now=int(time.time()))
    invitation = invited.invitation
    say(f"an invitation{f': {invitation.title}' if invitation.title else ''}, until {utc(invitation.expires)}")
    with taken(config.work) as place:
        joining = become(config, invited)
        exchange = exchange_of(invitation, joining, place.folder)
        try:
            return _with(config, place, invited, joining, exchange)
        finally:
            if exchange is not None:
                exchange.__exit__(None, None, None)


def _with(
    config: InvitedConfig, place: Place, invited: Invited, joining: Joining, exchange: ExchangeClient | None
) -> dict[str, object]:
    try:
        opened = fetch(
            invited.invitation, joining, exchange, beside=config.invitation.absolute().parent, work=place.folder
        )
    except NotYet as missing:
        require_nothing_missing(missing, invited.invitation)
        return _wait(place, joining, missing)
    clear_fetched(place.folder)
    rounds = opened.job.job.rounds
    if config.round > rounds:
        told = "one round, the first" if rounds == 1 else f"rounds 1 to {rounds}"
        raise ConfigError(f"--round {config.round}: the job allows {told}", hint="ask the owner for another job")
    _agree_to_terms(config, place, joining, opened)
    place = replace(place, round=config.round)
    place.made.mkdir(mode=0o700, exist_ok=True)
    words, planted, data = _prepared(config, place, opened)
    done = compute(config, place, opened, words, data=data, num_canaries=planted)
    bundle, gates = verdict(place)
    require_gates(config, gates)
    left = leave(config, joining, place, opened, bundle, gates, exchange)
    return {
        "state": left.state,
        "job_id": opened.job.job.job_id,
        "fingerprint": joining.own,
        "owner": joining.owner,
        "bundle_digest": bundle.digest,
        "sealed_digest": left.sealed_digest,
        "id": left.id,
        "round": place.round,
        "gates": {gate.name: gate.verdict for gate in gates},
        "passed": passed(gates),
        "accepted_leakage": config.accept_leakage and not passed(gates),
        "num_records": done["tune"]["num_records"],
        "output": str(left.sealed),
    }


def _wait(place: Place, joining: Joining, missing: NotYet) -> dict[str, object]:
    """The card lies ready for the owner, who has no job for it yet."""
    say(f"no job yet: {missing}")
    card = write_card(joining, place.folder)
    if missing.has_card:
        say("the owner has pinned this card; run the same command again once they have made a job for it")
    else:
        say_card(joining, card)
        say("once they did, run the same command again, with the new invitation if they send one")
    return {"state": "card", "fingerprint": joining.own, "owner": joining.owner, "card": str(card)}


def _agree_to_terms(config: InvitedConfig, place: Place, joining: Joining, opened: Opened) -> None:
    """The job's terms were shown, and somebody agreed to them; asked once of a job."""
    binding: dict[str, object] = {"job": opened.job.digest, "package": opened.package.digest}
    if place.recalled("terms") == binding:
        return
    show_job(Thing(place.folder / "job", Names(joining.keys), int(time.time())))
    for line in open_terms(opened):
        say(line)
    licence = opened.package.manifest.licence
    say(f"the package's licence, in its owner's words: {licence or 'none stated'}")
    agree("do you take part on these terms?", yes=config.yes, otherwise="nothing was trained, nothing has left")
    place.note("terms", binding)


def _prepared(config: InvitedConfig, place: Place, opened: Opened) -> tuple[list[str], int, str]:
    """Return the words of tuning, how many canaries to plant, and the data's digest.

    The data is checked, and going on agreed to, once of the same data and settings.
    """
    from client.join.check import check_data, show_check, show_expected  # it loads torch

    digest, job, folder = data_digest(config), opened.job.job, place.folder
    more: dict[str, object] = {} if job.adapter.head is None else {"objective": job.adapter.task}
    where = (folder / "package", folder / "job", place.made / "unmade")
    settings = config.tuning(*where, more)
    package = opened.package
    apart = package.is_encoder or package.is_seq2seq
    asks = not apart and settings.objective != "rloo"
    writes = asks and not settings.has_head and settings.objective != "dpo"
    how: dict[str, Any] = {"writes": writes, "asks": asks, "is_causal": not apart, "retunings": config.retunings}
    binding = {
        "data": digest,
        "job": opened.job.digest,
        "words": config.tune_words(more),
        "canaries": config.canaries,
        "retunings": [config.retunings, config.retuning_minutes],
    }
    known = place.recalled("data")
    if known is not None and known["of"] == binding:
        return config.tune_words({**more, "audit_share": known["audit_share"]}), known["num_canaries"], digest
    if place.recalled("sent") is not None:
        raise ConfigError(
            f"a bundle of this job's round {place.round} has left already, or lies ready to; "
            "these are other data or other settings",
            hint="give the same again to hear what became of it; for another bundle "
            + (f"say --round {place.round + 1}, " if place.round < job.rounds else "ask the owner for another job, ")
            + "or, if it was never handed over, give another --work",
        )
    say("reading the data, as tuning will read it")
    checked = check_data(settings, **how)
    asks_rows = checked.numbers.epsilon is None or checked.numbers.epsilon > WEAK_EPSILON
    more = {**more, "audit_share": audit_share(checked.num_rows) if asks_rows else 0.0}
    before, settings = settings.audit_share, config.tuning(*where, more)
    if settings.audit_share != before:
        checked = check_data(settings, **how)
    planted = config.canaries
    if planted is None:
        planted = num_canaries(checked.num_rows, is_private=config.is_private)
    planted = planted if writes else 0
    checked = checked.planting(planted)
    show_check(settings, checked)
    expected = expected_gates(checked.numbers)
    show_expected(expected)
    if not all_can_pass(expected):
        say("not every gate can pass with this data: at the end nothing is sent without --accept-leakage")
    agree("go on, and tune?", yes=config.yes, otherwise="nothing was trained, nothing has left")
    settled = {"of": binding, "num_canaries": planted, "audit_share": settings.audit_share}
    place.note("data", {**settled, "found": checked.told()})
    return config.tune_words(more), planted, digest
