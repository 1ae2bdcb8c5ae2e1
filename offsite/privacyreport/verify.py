"""``offsite report verify``: whether a privacy report is its issuer's, and says no more than its own figures give.

In this order: the folder holds what it may; the issuer is trusted; both signatures over the bytes as received; schema;
date; what follows from the audits, worked out anew; what is stated of the machine; epsilon, recomputed from the claim's
constants; the page, made anew; and the bundle and package that were given. The first check that fails is named in one
line.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from offsite import __version__
from offsite.artefacts.bundle import Bundle
from offsite.artefacts.inspect import inspect_artefact
from offsite.attestation.evidence import TpmQuote
from offsite.attestation.policy import read_policy, require_trusted
from offsite.console import say
from offsite.digests import sha256_bytes
from offsite.errors import ArtefactError, BadDigest, Expired, Untrusted, WrongBinding, WrongNames
from offsite.folders import kind_of, listed, names_in
from offsite.keys.files import read_limited
from offsite.keys.identity import CARD_LIMIT_BYTES, CARD_NAME, PublicKeys, read_card
from offsite.keys.trust import MAX_SKEW_SECONDS, Peer, TrustStore
from offsite.privacyreport.board import board
from offsite.privacyreport.config import ReportVerifyConfig
from offsite.privacyreport.issue import REPORT_FOLDER, show, told
from offsite.privacyreport.page import page
from offsite.privacyreport.recompute import Recomputed, recompute, require_claim, require_same
from offsite.privacyreport.record import (
    LIMITS_BYTES,
    PAGE_NAME,
    PRIVACY_FORMAT,
    REPORT_NAME,
    SIGN_PURPOSE,
    SIGNATURES_NAME,
    PrivacyReport,
    conclude,
    nonce_of,
    parse_report,
    read_file,
    require_about,
)
from offsite.sealed.manifest import read_signatures
from offsite.staging import refuse_existing, staged_file


def run(config: ReportVerifyConfig) -> dict[str, object]:
    """Carry out ``offsite report verify``.

    Raises:
        ConfigError: when ``--page`` or ``--board`` exists, there are no keys, or epsilon cannot be recomputed here.
        ArtefactError: with the subclass of the check that failed; nothing is written then.
    """
    for out in (config.page, config.board):
        if out is not None:
            refuse_existing(out)
    now = int(time.time())
    report, digest = verify(config, now=now)
    if config.page is not None:
        with staged_file(config.page) as stage:
            stage.write_text(page(report), encoding="utf-8")
    if config.board is not None:
        with staged_file(config.board) as stage:
            stage.write_text(board(report, digest), encoding="utf-8")
    show(report)
    attested = config.attestation_policy is not None  # which is held against it, or there is no result
    return {**told(report, digest), "attestation_verified": attested, "verified": True}


def verify(config: ReportVerifyConfig, *, now: int) -> tuple[PrivacyReport, str]:
    """Return the report in the folder and the digest of its ``report.json``, once every check has passed.

    Args:
        now: seconds since 1970.

    Raises:
        ConfigError: when there are no keys, or the extra ``privacy`` is needed and missing.
        ArtefactError: with the subclass of the check that failed.
    """
    folder = config.report
    names = _names(folder)
    _passed("folder", f"{', '.join(sorted(names))}; nothing else")
    raw = read_file(folder, REPORT_NAME)
    issuer, signatures = read_signatures(read_file(folder, SIGNATURES_NAME))
    keys, how = _issuer(config, issuer, now=now)
    _passed("issuer", f"{keys.name}, {keys.fingerprint}: {how}")
    keys.verify(SIGN_PURPOSE, raw, signatures)
    _passed("signatures", f"Ed25519 and ML-DSA-65, over the {len(raw):,} bytes of {REPORT_NAME} as received")
    report = parse_report(raw)
    if report.issuer != issuer:
        raise WrongBinding(f"{REPORT_NAME} names another issuer than the one who signed it")
    if report.created > now + MAX_SKEW_SECONDS:
        raise Expired(f"this report is dated {report.created - now} seconds in the future")
    _passed("schema", f"{PRIVACY_FORMAT}, every interval in order, of {_date(report.created)}")
    _require_conclusions(report)
    _require_attestation(config, report)
    _require_epsilon(report)
    _require_page(folder, names, report)
    _require_artefacts(config, report)
    return report, sha256_bytes(raw)


def _names(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise ArtefactError(f"no report folder named {folder.name!r}", hint="check the path")
    looks = kind_of(folder)
    if looks is not None and looks.startswith("a sealed"):
        raise WrongNames(
            f"{folder.name!r} is {looks}, not a report that was opened",
            hint=f"open it first: offsite open {shlex.quote(folder.name)} -o NEW-FOLDER",
        )
    names = names_in(folder)
    if REPORT_NAME not in names and (folder / REPORT_FOLDER / REPORT_NAME).is_file():
        inner = Path(folder.name) / REPORT_FOLDER
        raise WrongNames(
            f"{folder.name!r} is no report; the signed one lies in it",
            hint=f"offsite report verify {shlex.quote(str(inner))}",
        )
    if extra := names - LIMITS_BYTES.keys():
        raise WrongNames(
            f"{folder.name!r}: no signature of the report covers {listed(extra)}",
            hint=f"it may hold {', '.join(LIMITS_BYTES)} and nothing else",
        )
    return names


def _issuer(config: ReportVerifyConfig, issuer: str, *, now: int) -> tuple[PublicKeys, str]:
    """Return the issuer's keys and why they count: pinned, the keys folder's own, or the card that was given."""
    if config.card is not None:
        return _from_card(config, config.card, issuer, now=now), "the card that was given"
    store = TrustStore(config.keys)
    own = config.keys / CARD_NAME
    if own.is_file():
        keys = read_card(read_limited(own, CARD_LIMIT_BYTES, what="card"))
        if keys.fingerprint == issuer:
            _require_state(keys, now=now)
            return keys, "the keys folder's own"
    return store.require(issuer, now=now), "pinned here"


def _from_card(config: ReportVerifyConfig, card: Path, issuer: str, *, now: int) -> PublicKeys:
    keys = read_card(read_limited(card, CARD_LIMIT_BYTES, what="card"))
    if keys.fingerprint != str(config.fingerprint).strip().lower():
        raise Untrusted(
            f"the card's fingerprint is {keys.fingerprint}, not the one given",
            hint="somebody may have changed the card on its way: ask for both again, over separate channels",
        )
    if keys.fingerprint != issuer:
        raise Untrusted(f"the report was signed by {issuer}, the card is another's")
    _require_state(keys, now=now)
    if config.keys.is_dir():  # a card is no way around a revocation
        for peer in TrustStore(config.keys).peers():
            if peer.keys.fingerprint == issuer and peer.revoked is not None:
                raise Untrusted(f"the key {issuer} is revoked", hint="offsite trust list")
    return keys


def _require_state(keys: PublicKeys, *, now: int) -> None:
    state = Peer(keys, now, None).state(now=now)
    if state != "trusted":
        raise Untrusted(f"the card of {keys.fingerprint} is {state}", hint="ask its holder for a new one")


def _require_conclusions(report: PrivacyReport) -> None:
    """Everything that follows from the audits is what follows from them here."""
    claim = report.audits.bundle.run.claim if report.audits.bundle is not None else None
    if (claim is None) != (report.privacy is None):
        raise WrongBinding("privacy: the report quotes a claim that it does not state, or states one it does not quote")
    again = conclude(
        issuer=report.issuer,
        created=report.created,
        audits=report.audits,
        release=report.release,
        job=report.job,
        limits=report.limits,
        recomputed=_stated(report),
        versions=report.versions,
        attestation=report.attestation,
    )
    _passed("about", f"audits quoted: {len(report.audits.given)}; all of one bundle, package and base model")
    for name in PrivacyReport.model_fields:
        if getattr(again, name) != getattr(report, name):
            raise ArtefactError(f"{name} is not what follows from the audits", hint=_hint(report))
    _passed("conclusions", f"first line, {len(report.gates.every)} gate(s), digests and non-claims, worked out again")


def _stated(report: PrivacyReport) -> Recomputed | None:
    return None if report.privacy is None else report.privacy.recomputed


def _require_attestation(config: ReportVerifyConfig, report: PrivacyReport) -> None:
    """What the report states of its machine is about this report; with a policy, it is verified against that."""
    if config.attestation_policy is None:
        require_about(report)
        if isinstance(report.attestation, TpmQuote):
            say("--  attestation  a TPM's quote about this report, NOT VERIFIED: give --attestation-policy")
        else:
            _passed("attestation", "none is given, and none is claimed")
        return
    policy = read_policy(config.attestation_policy)
    quote = require_trusted(report.attestation, nonce_of(report), policy)
    _passed(
        "attestation",
        f"by the policy's TPM, about this report; PCRs {', '.join(map(str, quote.pcrs))} as the policy states",
    )


def _require_epsilon(report: PrivacyReport) -> None:
    if report.privacy is None:
        _passed("epsilon", "none is claimed")
        return
    claim = report.privacy.claim
    found = recompute(claim)
    require_claim(claim, found)
    require_same(report.privacy.recomputed, found)
    _passed(
        "epsilon",
        f"{claim.epsilon:.4f} at delta {claim.delta:.2g} by {found.accountant}, {claim.epsilon_rdp:.4f} by RDP, "
        f"{claim.epsilon_total:.4f} in all of {claim.num_runs} run(s): as recomputed from the constants",
    )


def _require_page(folder: Path, names: set[str], report: PrivacyReport) -> None:
    if PAGE_NAME not in names:
        _passed("page", f"no {PAGE_NAME} here; --page writes it")
        return
    if read_file(folder, PAGE_NAME) != page(report).encode():
        raise BadDigest(
            f"{PAGE_NAME} is not the page that {REPORT_NAME} gives",
            hint=_hint(report, "delete it, and write it anew with --page"),
        )
    _passed("page", f"{PAGE_NAME} is what {REPORT_NAME} gives, byte for byte")


def _require_artefacts(config: ReportVerifyConfig, report: PrivacyReport) -> None:
    for name, path, stated in (
        ("bundle", config.bundle, report.digests.bundle),
        ("package", config.package, report.digests.package),
    ):
        if path is None:
            continue
        found = inspect_artefact(path)
        if isinstance(found, Bundle) != (name == "bundle"):
            raise WrongBinding(f"{path.name!r} is no {name}")
        if found.digest != stated:
            about = "no bundle" if stated is None else f"{name} {stated[:19]}"
            raise WrongBinding(f"{path.name!r} is {name} {found.digest[:19]}, the report is about {about}")
        _passed(name, f"{found.digest}, every file as its manifest states")


def _hint(report: PrivacyReport, otherwise: str = "do not rely on this report") -> str:
    made_by = report.versions.get("offsite")
    return otherwise if made_by == __version__ else f"made by offsite {made_by}, this is {__version__}: use that one"


def _passed(check: str, found: str) -> None:
    say(f"ok  {check:<12} {found}")


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
