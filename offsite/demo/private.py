"""What `offsite demo --dp EPSILON` plays besides: canaries committed to, a private run, its audit, signed reports.

The client makes up canaries and commits to them before it tunes; the bundle leaves only if its gates pass, without
``--accept-leakage``; the client signs a privacy report and the owner verifies it. Then the client reveals the canaries,
and the owner audits the full model with the adapter in it, which the client cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.console import say
from offsite.demo.handover import KEYS, Parties, receive, send
from offsite.digests import sha256_file
from offsite.sealed.release import release_path
from offsite.stages import Stage, play

ADAPTER = ["--adapter", "lora", "--rank", "2", "--targets", "attention", "--placement", "all"]
"""Few numbers: the noise that hides one row grows with the root of their count."""

BUDGETS = 4
"""The data's budget, in runs: the demo's ledger remembers runs that were broken off or repeated."""

FULL = {
    "canaries": ["--count", "240", "--secrets", "16", "--candidates", "32", "--tokens", "24"],
    "tune": ["--learning-rate", "4e-3", "--batch-size", "64", "--block-tokens", "96", "--steps", "12"],
    "audit": ["--rows", "100", "--tokens-per-row", "48"],
}
SHORT = {
    "canaries": ["--count", "200", "--secrets", "16", "--candidates", "16", "--tokens", "16"],
    "tune": ["--learning-rate", "2e-3", "--batch-size", "16", "--block-tokens", "48", "--steps", "4"],
    "audit": ["--rows", "40", "--tokens-per-row", "32"],
}
HELD_OUT = ["--validation", "0.012", "--audit-share", "0.06"]


@dataclass(frozen=True)
class Privacy:
    """What the demo shows about privacy at its end: the client's and the owner's verified figures."""

    epsilon: float
    delta: float
    client_page: Path
    owner_page: Path


def plant(parties: Parties, package_digest: str, job_id: str, words: list[str]) -> str:
    """Return the digest that the client committed to, by which the owner will know the canaries it reveals."""
    client = parties.client
    made = ["canaries", "package", "--job", "job", *words, "-o", "canaries"]
    inputs = {"package": package_digest, "job": job_id}
    play([Stage("canaries", client, made, client / "canaries", inputs)], parties.notes)
    commitment = client / "canaries" / "commitment" / "report.json"
    _send_report(parties, "commitment", "canaries/commitment", job_id, sha256_file(commitment), round_="0")
    return sha256_file(client / "canaries" / "canaries.json")


def tune_words(epsilon: float, words: list[str]) -> list[str]:
    """Return what a private run adds to the words of `offsite tune`."""
    budget = f"epsilon={epsilon:g},budget={BUDGETS * epsilon:g},ledger=ledger"
    return ["--dp", budget, "--canaries", "canaries", *HELD_OUT, *words]


def audit(parties: Parties, bundle_digest: str, canaries: str, words: list[str]) -> Stage:
    """Return the finished stage of the client's audit of its bundle."""
    client = parties.client
    asked = ["audit", "bundle", "package", "bundle", "--data", "private.jsonl.gz", "--canaries", "canaries"]
    inputs = {"bundle": bundle_digest, "canaries": canaries}
    stage = Stage("audit", client, [*asked, *words, "-o", "audit"], client / "audit", inputs)
    play([stage], parties.notes)
    return stage


def conclude(parties: Parties, model: str, arrived: dict[str, Any], job_id: str, canaries: str) -> Privacy:
    """Return what both sides' reports say, once each has verified the other's.

    Args:
        arrived: the owner's verdict on the bundle.
        canaries: digest of the client's canaries.
    """
    owner, client, id_ = parties.owner, parties.client, str(arrived["id"])
    release = release_path(client / "bundle.sealed")
    words = ["--audit", "audit", "--release", release.name, "--job", "job"]
    inputs = {"audit": sha256_file(client / "audit" / "audit.json"), "release": sha256_file(release)}
    _report(parties, client, words, inputs)
    _send_report(parties, "privacy", "privacy", job_id, _digest(client), round_="1")
    claim = _verify(parties, owner, ["--bundle", f"registry/bundles/{id_}", "--package", "package"])["claim"]
    say("\nCLIENT reveals its canaries; the owner asks the full model, with the adapter in it, what it knows of them")
    _send_report(parties, "reveal", "canaries/reveal", job_id, canaries, round_="1")
    words = ["audit", "plugged-in", model, id_, "--registry", "registry", "--keys", "keys"]
    words += ["--commitment", "commitment", "--reveal", "reveal", "-o", "audit"]
    words += ["--epsilon", repr(claim["epsilon"]), "--delta", repr(claim["delta"])]
    inputs = {"bundle": id_, "canaries": canaries}
    play([Stage("audit-plugged-in", owner, words, owner / "audit", inputs)], parties.notes)
    _report(parties, owner, ["--audit", "audit", "--job", "job"], inputs, out="own")
    return Privacy(
        epsilon=float(claim["epsilon"]),
        delta=float(claim["delta"]),
        client_page=client / "privacy" / "report.html",
        owner_page=owner / "own" / "report.html",
    )


def _report(parties: Parties, party: Path, words: list[str], inputs: dict[str, str], *, out: str = "privacy") -> None:
    """The party's signed report stands in its folder `out`."""
    asked = ["report", "privacy", *words, *KEYS, "-o", out]
    play([Stage(f"{party.name}-report", party, asked, party / out, inputs)], parties.notes)


def _verify(parties: Parties, party: Path, words: list[str]) -> dict[str, Any]:
    stage = Stage(f"{party.name}-verify", party, ["report", "verify", "privacy", "--keys", "keys", *words])
    play([stage], parties.notes)
    return stage.outcome


def _send_report(parties: Parties, name: str, source: str, job_id: str, digest: str, *, round_: str) -> None:
    words = ["--job", "job", "--round", round_]
    sealed = send(parties, parties.client, name, job_id=job_id, digest=digest, words=words, source=source)
    receive(parties, name, sealed, receiver=parties.owner)


def _digest(party: Path) -> str:
    return sha256_file(party / "privacy" / "report.json")
