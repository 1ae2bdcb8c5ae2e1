"""Two parties in two folders who exchange sealed artefacts by hand: the part of the demo that two companies would play.

Each party has keys of its own and has pinned the other's card. What lies between the two folders is sealed: it is
copied as it is, and checked by the verb of whoever receives it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.console import say
from offsite.digests import sha256_bytes
from offsite.stages import Stage, play

KEYS = ("--keys", "keys", "--passphrase-file", "passphrase")


@dataclass(frozen=True)
class Parties:
    """The two folders, the notes of what was played, and the fingerprints that each has pinned of the other."""

    owner: Path
    client: Path
    notes: Path
    owner_is: str
    client_is: str


def introduce(owner: Path, client: Path, notes: Path) -> Parties:
    """Return the parties once each has keys and has pinned the other's card by its fingerprint.

    An owner with new keys begins a new registry.
    """
    made = {}
    for party in (owner, client):
        passphrase = party / "passphrase"
        if not passphrase.is_file():
            with os.fdopen(os.open(passphrase, os.O_WRONLY | os.O_CREAT, 0o600), "w") as handle:
                handle.write(secrets.token_urlsafe(24))
        words = ["keygen", "-o", "keys", "--name", party.name, "--passphrase-file", "passphrase"]
        made[party.name] = Stage(f"{party.name}-keys", party, words, party / "keys")
    play(list(made.values()), notes)
    if not made["owner"].reused:
        shutil.rmtree(owner / "registry", ignore_errors=True)
    fingerprints = {name: str(stage.outcome["fingerprint"]) for name, stage in made.items()}
    stages = []
    for party, other in ((owner, client), (client, owner)):
        card = f"{other.name}.card.json"
        shutil.copyfile(other / "keys" / "card.json", party / card)
        words = ["trust", "add", card, "--fingerprint", fingerprints[other.name], "--keys", "keys"]
        inputs = {"card": sha256_bytes((party / card).read_bytes()), "keys": fingerprints[party.name]}
        stages.append(Stage(f"{party.name}-trust", party, words, party / "keys" / "trust.json", inputs))
    play(stages, notes)
    return Parties(owner, client, notes, fingerprints["owner"], fingerprints["client"])


def set_terms(parties: Parties, package_digest: str, adapter: list[str]) -> str:
    """Return the id of the owner's job for this client: an adapter (flags of ``job create``) for a package."""
    words = ["job", "create", "package", "--client", parties.client_is, "--registry", "registry", "--keys", "keys"]
    inputs = {"package": package_digest, "owner": parties.owner_is}
    stage = Stage("job", parties.owner, [*words, *adapter, "-o", "job"], parties.owner / "job", inputs)
    play([stage], parties.notes)
    return str(stage.outcome["job_id"])


def send(
    parties: Parties, sender: Path, name: str, *, job_id: str, digest: str, words: list[str], source: str | None = None
) -> str:
    """Seal the sender's artefact `name` and carry it into the other party's folder. Returns the sealed digest.

    Args:
        digest: what stands for the artefact's content.
        words: further words of ``offsite seal``.
        source: folder that is sealed, where it is not called `name`.
    """
    receiver = parties.client if sender == parties.owner else parties.owner
    sealed = sender / f"{name}.sealed"
    inputs = {"job": job_id, "digest": digest, "keys": parties.owner_is + parties.client_is}
    stage = Stage(f"seal-{name}", sender, ["seal", source or name, *words, *KEYS, "-o", sealed.name], sealed, inputs)
    play([stage], parties.notes)
    arrived = receiver / sealed.name
    shutil.rmtree(arrived, ignore_errors=True)
    shutil.copytree(sealed, arrived)
    size = sum(path.stat().st_size for path in sealed.rglob("*") if path.is_file())
    say(
        f"  {sealed.name} crosses: {size / 1e6:,.1f} MB, encrypted for the {receiver.name}, signed by the {sender.name}"
    )
    return str(stage.outcome["sealed_digest"])


def receive(parties: Parties, name: str, sealed_digest: str, *, receiver: Path | None = None) -> None:
    """The receiver (the client) has opened `name`: signatures, recipient, dates, order and every byte were right."""
    party = receiver or parties.client
    words = ["open", f"{name}.sealed", *KEYS, "-o", name]
    inputs = {"sealed": sealed_digest, "keys": parties.client_is if party == parties.client else parties.owner_is}
    play([Stage(f"open-{name}", party, words, party / name, inputs)], parties.notes)


def take_in(parties: Parties) -> dict[str, Any]:
    """Return the owner's verdict on the client's sealed bundle, once it is accepted."""
    owner = parties.owner
    words = ["intake", "bundle.sealed", "--registry", "registry", *KEYS]
    arrived = Stage("intake", owner, words)
    play([arrived], parties.notes)
    words = ["registry", "accept", str(arrived.outcome["id"]), "--registry", "registry", "--keys", "keys"]
    play([Stage("accept", owner, words)], parties.notes)
    return arrived.outcome
