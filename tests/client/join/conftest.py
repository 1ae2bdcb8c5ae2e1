"""An owner and a client with no keys yet: an invitation, what is sealed beside it, and join with steps played here."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import offsite.stages
from client.join.config import InvitedConfig
from client.join.verb import run
from offsite import cli
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import Job, write_job
from offsite.config import build
from offsite.errors import PolicyError
from offsite.exchange.verbs import seal_run
from offsite.keys.identity import read_card
from offsite.keys.trust import TrustStore
from offsite.sealed.config import SealConfig
from offsite.sealed.invitation import Invitation, write_invitation

TUNE = "steps=12,block_tokens=48,batch_size=4,precision=fp32,sealed_off=false,checkpoint_every=4"
ROWS = [
    {"question": f"what of ward {number}?", "answer": f" the cough of bed {number % 7} went after {number % 9} days"}
    for number in range(40)
]
QUICK = {"canaries": ["candidates=8", "tokens=16"], "audit": ["secrets_samples=1", "batch_size=64"]}
"""What makes steps short here; join does not say it."""

PASSPHRASE = "of the join's own tests"


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.returncode = code

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None:
        raise AssertionError("it has ended")


class Players:
    """An owner's folder, a client's, and between them a folder of mail; verbs of join's steps run in this process."""

    def __init__(self, folder: Path, owner_keys: Path, owner: Any, package: Any, patch: pytest.MonkeyPatch) -> None:
        self.owner_keys, self.owner, self.package, self.patch = owner_keys, owner, package, patch
        self.mail, self.client = folder / "mail", folder / "client"
        for place in (self.mail, self.client):
            place.mkdir()
        self.data = self.client / "private.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        self.played: list[str] = []
        self.stop_before = ""
        self.quick = dict(QUICK)
        patch.setattr(offsite.stages, "_start", self._start)
        patch.setattr("offsite.keys.files.SCRYPT_COST", 2**4)
        patch.setenv("OFFSITE_PASSPHRASE", PASSPHRASE)
        patch.chdir(self.client)

    def _start(self, stage: Any, notes: Path, _num: int) -> Any:
        """Run the verb here and return a process that has ended."""
        assert "OFFSITE_PASSPHRASE" in stage.hiding
        if stage.name == self.stop_before:
            raise KeyboardInterrupt
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = cli.run([*stage.words, *self.quick.get(stage.name, [])])
        (notes / f"{stage.name}.out").write_text(out.getvalue())
        self.played.append(stage.name)
        return Ended(code)

    def invitation(self, name: str = "invitation.offsite.json", *, identity: Any = None, **changes: Any) -> Path:
        """Return an invitation to the package, or what `changes` make of it."""
        now, identity = int(time.time()), identity or self.owner
        stated = {"title": "a trial", "package_digest": self.package.digest, "created": now, "expires": now + 86400}
        stated["card"] = base64.b64encode(identity.public.card).decode()
        out = self.mail / name
        out.unlink(missing_ok=True)
        write_invitation(out, Invitation(**{**stated, **changes}), identity)
        return out

    def job(self, client: str, folder: Path, **changes: Any) -> Job:
        """Return the owner's job for the client, in a folder of its own."""
        now = int(time.time())
        stated: dict[str, Any] = {
            "job_id": "5" * 32,
            "owner": self.owner.public.fingerprint,
            "client": client,
            "package_digest": self.package.digest,
            "base_digest": self.package.manifest.base_digest,
            "adapter": AdapterSpec(kind="lora", placement="1+0", targets="attention", rank=1, dtype="float32"),
            "created": now,
            "expires": now + 86400,
        }
        job = Job(**{**stated, **changes})
        write_job(folder, job)
        return job

    def seal(self, source: Path, name: str, job: Path | None = None) -> Path:
        """Seal as the owner into the mail."""
        out = self.mail / name
        seal_run(SealConfig(input=source, output=out, job=job, keys=self.owner_keys), identity=self.owner)
        return out

    def invited(self, **changes: Any) -> Path:
        """Return an invitation to a job whose client has keys, with all that it needs beside it."""
        self.join(self.invitation(), name="Client", fingerprint=self.owner.public.fingerprint)
        folder = self.mail.parent / "job"
        self.job(self.pin_client(), folder, **changes)
        self.seal(folder, "job.sealed")
        self.seal(self.package.path, "package.sealed", folder)
        return self.invitation()

    def pin_client(self) -> str:
        """The owner has pinned the card that join wrote; return its fingerprint."""
        (card,) = (self.client / "joined").glob("*.card.json")
        raw = card.read_bytes()
        TrustStore(self.owner_keys).add(raw, read_card(raw).fingerprint)
        return read_card(raw).fingerprint

    def settings(self, invitation: Path, **flags: Any) -> InvitedConfig:
        """Return join's settings, as they are typed."""
        given = {"invitation": str(invitation), "data": [str(self.data)], "tune": TUNE, "yes": True, "device": "cpu"}
        given["fields"] = "prompt=question,completion=answer"
        words = {name: value for name, value in {**given, **flags}.items() if value is not None}
        return build(InvitedConfig, flags=words)

    def join(self, invitation: Path, **flags: Any) -> dict[str, Any]:
        """Return what join returned."""
        self.played.clear()
        return run(self.settings(invitation, **flags))


@pytest.fixture
def players(tmp_path, key_ring, dropped_package, monkeypatch) -> Players:
    """An owner and a client, with no keys at the client."""
    return make_players(tmp_path, key_ring, dropped_package, monkeypatch)


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def make_players(folder: Path, key_ring: Any, package: Any, patch: pytest.MonkeyPatch) -> Players:
    keys, owner = key_ring("owner")
    home = folder / "owner"
    shutil.copytree(keys, home / "keys")
    (home / "keys").chmod(0o700)
    patch.setenv("HOME", str(folder))
    return Players(folder, home / "keys", owner, package, patch)


@pytest.fixture(scope="module")
def whole_path(tmp_path_factory, key_ring, dropped_package, module_patch) -> SimpleNamespace:
    """The whole path, once: a card, a job, a bundle whose gates did not pass, and its leave all the same."""
    folder = tmp_path_factory.mktemp("path")
    players = make_players(folder, key_ring, dropped_package, module_patch)
    hello = players.invitation("hello.offsite.json")
    told = [players.join(hello, name="Example Hospital", fingerprint=players.owner.public.fingerprint)]
    client = players.pin_client()
    players.job(client, folder / "owner" / "job", rounds=2)
    players.seal(folder / "owner" / "job", "job.sealed")
    players.seal(dropped_package.path, "package.sealed", folder / "owner" / "job")
    err, stopped = io.StringIO(), []
    with contextlib.redirect_stderr(err):
        for players.stop_before in ("canaries", "tune", "audit"):
            with pytest.raises(KeyboardInterrupt):
                players.join(hello)
            stopped.append(list(players.played))
        players.stop_before = ""
        with pytest.raises(PolicyError) as refused:
            players.join(hello)
        played = list(players.played)
        with pytest.raises(PolicyError) as again:
            players.join(hello)
        replayed = list(players.played)
        told.append(players.join(hello, accept_leakage=True))
    return SimpleNamespace(
        players=players,
        hello=hello,
        told=told,
        client=client,
        stopped=stopped,
        refused=refused.value,
        again=again.value,
        played=played,
        replayed=replayed,
        err=err.getvalue(),
        work=players.client / "joined",
    )
