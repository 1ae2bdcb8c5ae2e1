"""A federation of real processes over a loopback exchange: the owner and a client are killed, and the run ends well."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offsite.sealconfig import OpenConfig, SealConfig
from offsite.sealing import open_run, seal_run
from offsite.trust import TrustStore
from server.job import run as create_job
from server.registryconfig import JobCreateConfig

NAMES = ("anna", "bert", "cora")
WORDS = {"anna": "red apple", "bert": "blue berry", "cora": "green grape"}
WAIT_SECONDS = 240.0


class Processes:
    """The commands of one test, each with its own log; whatever is left at the end is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, {}

    def start(self, name, *words):
        with (self.folder / f"{name}.log").open("ab") as log:
            found = subprocess.Popen(
                [sys.executable, "-m", "offsite", *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.running[name] = found
        return found

    def kill(self, name):
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].communicate()

    def end(self, name):
        out, _ = self.running[name].communicate(timeout=WAIT_SECONDS)
        assert self.running[name].returncode == 0, self.log(name)[-3000:]
        return json.loads(out.decode().splitlines()[-1])

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def until(self, what, *alive):
        until = time.monotonic() + WAIT_SECONDS
        while not what():
            for name in alive:
                assert self.running[name].poll() is None, self.log(name)[-3000:]
            assert time.monotonic() < until, {name: self.log(name)[-1500:] for name in self.running}
            time.sleep(0.05)

    def close(self):
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.fixture
def processes(tmp_path):
    made = Processes(tmp_path)
    yield made
    made.close()


@pytest.fixture
def federation(tmp_path, make_party, whole_package, llama_folder):
    """An owner and three clients who know each other, with a job each; returns the settings of either side."""
    owner = make_party("owner")
    settings = {}
    (tmp_path / "outbox").mkdir()
    for name in NAMES:
        client = make_party(name)
        for one, other in ((owner, client), (client, owner)):
            TrustStore(one.keys).add(other.identity.public.card, other.fingerprint)
        home = client.keys.parent
        create_job(
            JobCreateConfig(
                keys=owner.keys, package=whole_package.path, client=client.fingerprint, registry=tmp_path / "registry",
                output=home / "made", adapter="lora", placement="1+1", rank=2, adapter_dtype="float32", rounds=3,
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
        settings[name] = home / "join.json"
        settings[name].write_text(
            json.dumps(
                {
                    "package": str(whole_package.path), "job": str(home / "job"), "data": str(home / "train.jsonl"),
                    "work": str(home / "work"), "keys": str(client.keys), "accept_leakage": True, "poll_seconds": 0.2,
                    "passphrase_file": str(client.passphrase), "patience_seconds": 2.0,
                    "tune": {"batch_size": 8, "block_tokens": 32, "precision": "fp32", "checkpoint_every": 5},
                }
            )
        )  # fmt: skip
    settings["owner"] = tmp_path / "federation.json"
    settings["owner"].write_text(
        json.dumps(
            {
                "registry": str(tmp_path / "registry"), "package": str(whole_package.path), "model": str(llama_folder),
                "outbox": str(tmp_path / "outbox"), "output": str(tmp_path / "result"), "keys": str(owner.keys),
                "passphrase_file": str(owner.passphrase), "port": 0, "rounds": 3, "steps": 40,
                "learning_rate": 2e-3, "min_clients": 3, "linger_seconds": 6.0, "block_tokens": 32,
                "heldout": {name: str(tmp_path / f"{name}-home" / "held.jsonl") for name in NAMES},
            }
        )
    )  # fmt: skip
    return settings


def url_of(processes):
    return re.findall(r"serving the exchange at (\S+);", processes.log("owner"))[-1]


@pytest.mark.slow
def test_three_clients_three_rounds_and_two_kills(processes, federation, tmp_path):
    processes.start("owner", "federate", "serve", "--config", federation["owner"])
    processes.until(lambda: (tmp_path / "owner.log").is_file() and "Ctrl-C ends it" in processes.log("owner"), "owner")
    url = url_of(processes)
    port = url.rpartition(":")[2]

    def join(name):
        processes.start(name, "federate", "join", url, "--config", federation[name])

    for name in NAMES:
        join(name)
    anna = tmp_path / "anna-home" / "work" / "round-0001"
    processes.until(lambda: any(anna.glob("bundle.work/step-*")) or (anna / "sealed").is_dir(), "owner", *NAMES)
    processes.kill("anna")
    join("anna")
    processes.until(lambda: "round 2 of 3: asked" in processes.log("owner"), "owner", *NAMES)
    processes.kill("owner")
    processes.start("owner", "federate", "serve", "--config", federation["owner"], "--port", port)
    told = processes.end("owner")
    assert [processes.end(name)["num_rounds"] >= 1 for name in NAMES] == [True] * 3

    assert told["rounds"] == 3 or len(told["rounds"]) == 3
    for name in NAMES:
        assert told["plugged_in"][name] < told["zero_shot"][name]
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert [sorted(one["used"]) for one in found["rounds"]] == [list(NAMES)] * 3
    everything = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert not any(word in everything for word in WORDS.values())
