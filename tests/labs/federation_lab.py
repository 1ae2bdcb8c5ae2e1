"""An owner and clients who know each other, with a job each, and their processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.exchange.verbs import open_run, seal_run
from offsite.keys.trust import TrustStore
from offsite.sealed.config import OpenConfig, SealConfig
from server.registry.config import JobCreateConfig
from server.registry.job import run as create_job

NAMES = ("anna", "bert", "cora")
WORDS = {"anna": "red apple", "bert": "blue berry", "cora": "green grape"}


class Processes:
    """The commands of one test, each with its own log; whatever is left at the end is killed, with its children."""

    def __init__(self, folder: Path, *, wait_seconds: float) -> None:
        self.folder, self.wait_seconds, self.running = folder, wait_seconds, {}
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}

    def start(self, name: str, *words: object) -> subprocess.Popen[bytes]:
        return self.start_program(name, sys.executable, "-m", "offsite", *words)

    def start_program(self, name: str, *words: object, merged: bool = False) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            found = subprocess.Popen(
                [*map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=log if merged else subprocess.PIPE,
                stderr=log,
                cwd=self.folder,
                env=self.env,
            )
        self.running[name] = found
        return found

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].communicate()

    def end(self, name: str) -> dict[str, Any]:
        return json.loads(self.output(name).splitlines()[-1])

    def output(self, name: str) -> str:
        out, _ = self.running[name].communicate(timeout=self.wait_seconds)
        assert self.running[name].returncode == 0, self.log(name)[-3000:]
        return out.decode()

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.is_file() else ""

    def until(self, what, *alive: str) -> None:
        until = time.monotonic() + self.wait_seconds
        while not what():
            for name in alive:
                assert self.running[name].poll() is None, self.log(name)[-3000:]
            assert time.monotonic() < until, {name: self.log(name)[-1500:] for name in self.running}
            time.sleep(0.05)

    def close(self) -> None:
        for number in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
            if process.stdout is None or not process.stdout.closed:  # not killed by the test itself
                process.communicate()

    def left(self) -> list[int]:
        """Return the processes that these started, and whose those started, that still run: detached ones too."""
        found, mark = [], f"TMPDIR={self.folder}\0".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return found


@dataclass(frozen=True)
class Lab:
    """Settings files of either side, and what they were made of."""

    folder: Path
    clients: dict[str, Path]
    owner: Path

    def edit(self, path: Path, *, drop: tuple[str, ...] = (), **changes: object) -> Path:
        """Return a copy of the settings with those changes."""
        found = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
        edited = path.with_name(f"edited-{path.name}")
        edited.write_text(json.dumps({**found, **changes}))
        return edited


def build(folder: Path, make_party, package, model: Path, *, names: tuple[str, ...] = NAMES, rounds: int = 3) -> Lab:
    """Make keys, trust, jobs, texts and settings: those of ``federate serve`` and of ``federate join``."""
    owner = make_party("owner")
    clients = {}
    (folder / "outbox").mkdir()
    for name in names:
        client = make_party(name)
        for one, other in ((owner, client), (client, owner)):
            TrustStore(one.keys).add(other.identity.public.card, other.fingerprint)
        home = client.keys.parent
        create_job(
            JobCreateConfig(
                keys=owner.keys, package=package.path, client=client.fingerprint, registry=folder / "registry",
                output=home / "made", adapter="lora", placement="1+1", rank=2, adapter_dtype="float32", rounds=rounds,
                max_relative_frobenius=10.0, max_relative_spectral=10.0,
            )
        )  # fmt: skip
        keyed = {"keys": owner.keys, "passphrase_file": owner.passphrase}
        seal_run(SealConfig(input=home / "made", output=home / "sealed", **keyed))
        keyed = {"keys": client.keys, "passphrase_file": client.passphrase}
        open_run(OpenConfig(sealed=home / "sealed", output=home / "job", **keyed))
        for part, numbers in (("train", range(60)), ("held", range(100, 110))):
            rows = [{"text": f"{WORDS[name]} {number % 9} {WORDS[name]}"} for number in numbers]
            (home / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        clients[name] = home / "join.json"
        clients[name].write_text(
            json.dumps(
                {
                    "package": str(package.path), "job": str(home / "job"), "data": str(home / "train.jsonl"),
                    "work": str(home / "work"), "keys": str(client.keys), "accept_leakage": True, "poll_seconds": 0.2,
                    "passphrase_file": str(client.passphrase), "patience_seconds": 2.0,
                    "tune": {"batch_size": 8, "block_tokens": 32, "precision": "fp32", "checkpoint_every": 5},
                }
            )
        )  # fmt: skip
    settings = folder / "federation.json"
    settings.write_text(
        json.dumps(
            {
                "registry": str(folder / "registry"), "package": str(package.path), "model": str(model),
                "outbox": str(folder / "outbox"), "output": str(folder / "result"), "keys": str(owner.keys),
                "passphrase_file": str(owner.passphrase), "port": 0, "rounds": rounds, "steps": 40,
                "learning_rate": 2e-3, "min_clients": len(names), "linger_seconds": 6.0, "block_tokens": 32,
                "heldout": {name: str(folder / f"{name}-home" / "held.jsonl") for name in names},
            }
        )
    )  # fmt: skip
    return Lab(folder, clients, settings)
