"""What leaves: the verdict in words, the question before, the seal, and the way to the owner."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.exchange.http import ExchangeClient
from client.exchange.verbs import hand_in
from client.join.config import InvitedConfig
from client.join.fetch import Opened
from client.join.party import Joining
from client.join.people import agree, show_verdicts
from client.join.work import Place
from offsite.artefacts.bundle import Bundle, open_bundle
from offsite.audits.gates import Gate, bundle_gates, passed
from offsite.audits.record import BundleAudit, read_audit
from offsite.console import say
from offsite.errors import PolicyError, WrongBinding
from offsite.exchange.verbs import seal_run
from offsite.sealed.config import SealConfig
from offsite.sealed.folder import read_sealed
from offsite.sealed.manifest import SealedManifest
from offsite.sealed.release import read_release, release_path
from offsite.staging import remove
from offsite.strictjson import parse_strict

ACCEPTING = (
    "--accept-leakage lets the bundle go all the same: then what the audit found, or could not find, is known to you, "
    "stands in every report of this bundle, and the owner may learn that much of your text"
)


@dataclass(frozen=True)
class Left:
    """What left, or is ready to be handed over. `state` is the owner's verdict, or ``sealed`` without an exchange."""

    state: str
    sealed: Path
    sealed_digest: str
    id: str | None = None


def verdict(place: Place) -> tuple[Bundle, tuple[Gate, ...]]:
    """Return the bundle and its gates, as the audit in the work folder has them; shown in a table.

    Raises:
        WrongBinding: when the audit is of another bundle.
        ArtefactError: when either is unsound.
    """
    bundle, (audit, _) = open_bundle(place.made / "bundle"), read_audit(place.made / "audit")
    if not isinstance(audit, BundleAudit) or audit.run.bundle_digest != bundle.digest:
        raise WrongBinding(f"the audit in {place.made.name!r} is not of its bundle", hint="delete both")
    gates = bundle_gates(audit)
    say("the verdict:")
    show_verdicts([(gate.name, gate.verdict, gate.told) for gate in gates])
    return bundle, gates


def require_gates(config: InvitedConfig, gates: tuple[Gate, ...]) -> None:
    """Return only if every gate passed, or leakage is accepted by its own flag: no question and no --yes does so.

    Raises:
        PolicyError: naming the gates that did not pass; nothing has left.
    """
    if passed(gates) or config.accept_leakage:
        return
    named = ", ".join(f"{gate.name} ({gate.verdict})" for gate in gates if gate.verdict != "passed")
    raise PolicyError(f"nothing is sent: {named}", hint=ACCEPTING)


def leave(
    config: InvitedConfig,
    joining: Joining,
    place: Place,
    opened: Opened,
    bundle: Bundle,
    gates: tuple[Gate, ...],
    exchange: ExchangeClient | None,
) -> Left:
    """The bundle is sealed once somebody agreed, and is with the owner, or stands ready to be handed over.

    Raises:
        ConfigError, PolicyError: when nobody agreed; nothing has left.
        ArtefactError: when the owner refuses it, naming the check.
        RunFailed: when the exchange cannot be reached; the same command goes on.
    """
    sealed = place.made / "bundle.sealed"
    digest = _sealed_before(sealed, bundle, place)
    if digest is None:
        size = sum(path.stat().st_size for path in bundle.path.iterdir())
        way = "goes to the owner's exchange" if exchange is not None else "is yours to hand over"
        say(f"what would leave: the adapter, {size / 1e6:,.1f} MB, encrypted for the owner alone; it {way}")
        if not passed(gates):
            say("not every gate passed: it goes because --accept-leakage says so")
        agree("is it to be sealed and sent?", yes=config.yes, otherwise="nothing has left this machine")
        remove(sealed)
        release_path(sealed).unlink(missing_ok=True)
        settings: dict[str, Any] = {"keys": joining.keys, "accept_leakage": config.accept_leakage}
        settings |= {"job": place.folder / "job", "audit": place.made / "audit", "round": place.round}
        seal_run(SealConfig(input=bundle.path, output=sealed, **settings), identity=joining.identity)
        digest = read_sealed(sealed).digest
        place.note("sealed", {"bundle": bundle.digest, "sealed": digest})
    if exchange is None:
        place.note("sent", {"bundle": bundle.digest, "sealed": digest})
        say(f"next: give {sealed} to the owner, by any way; they run: offsite intake {shlex.quote(sealed.name)}")
        return Left("sealed", sealed, digest)
    status, _ = hand_in(exchange, sealed, verdict_seconds=config.verdict_seconds)
    place.note("sent", {"bundle": bundle.digest, "sealed": digest})
    if status.state == "verifying":
        say("with the owner, whose checks are not done yet; the same command asks again")
    else:
        say(f"with the owner: {status.state}; they accept it, and plug it in: offsite registry accept {status.id}")
    return Left(status.state, sealed, digest, status.id)


def _sealed_before(sealed: Path, bundle: Bundle, place: Place) -> str | None:
    """Return the digest of what was sealed before of this very bundle, whole; None when there is none."""
    if not sealed.is_dir() or not release_path(sealed).is_file():
        return None
    raw = read_sealed(sealed)
    manifest = parse_strict(raw.manifest_raw, SealedManifest, "manifest.json", {})
    release = read_release(release_path(sealed))
    same = (release.bundle_digest, release.sealed_digest) == (bundle.digest, raw.digest)
    if not same or manifest.kind != "bundle":
        return None
    place.note("sealed", {"bundle": bundle.digest, "sealed": raw.digest})
    return raw.digest


def open_terms(opened: Opened) -> list[str]:
    """Return what the job asks of a client, a plain sentence each, beside the facts that inspect shows."""
    job, lines = opened.job.job, []
    lines.append(
        "you would train a small adapter on your text, on this machine, and give back the adapter alone; "
        "the text stays, and so does whatever else is made here"
    )
    lines.append("an adapter is made from your text and may give some of it away: that is measured before it goes")
    if job.rounds > 1:
        lines.append(f"the job has {job.rounds} rounds; this command takes part in the first")
    return lines
