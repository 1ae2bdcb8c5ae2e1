"""Owner and client over HTTP on loopback, each in its folder; the client's one command is killed and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from two_parties import ARCHIVE, PASSPHRASE

from offsite.keys.identity import read_card

TUNE = "steps=24,block_tokens=48,batch_size=4,precision=fp32,checkpoint_every=2"


class Sides:
    """The two folders, and a way to run verbs in one of them, in processes of their own."""

    def __init__(self, folder: Path) -> None:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(folder, filter="data")
        self.owner, self.client = folder / "owner", folder / "hospital"
        (self.owner / "keys").chmod(0o700)
        for name in ("registry", "job", "bundle.sealed", "adapted", "results"):
            shutil.rmtree(self.owner / name)
        self.client.mkdir()
        (folder / "client" / "private.jsonl").rename(self.client / "private.jsonl")
        shutil.rmtree(folder / "client")
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
        self.env["OFFSITE_PASSPHRASE"] = PASSPHRASE

    def start(self, party: Path, *words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "offsite", *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=party, env=self.env, text=True, start_new_session=True, **pipes)

    def run(self, party: Path, *words: object, code: int = 0) -> tuple[dict, str]:
        process = self.start(party, *words)
        out, err = process.communicate(timeout=600)
        assert process.returncode == code, err
        return (json.loads(out.splitlines()[-1]) if code == 0 else {}), err


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def killed_once(process: subprocess.Popen[str], is_due) -> None:
    """The process and all that it started are killed as soon as it is due."""
    until = time.monotonic() + 300
    while not is_due():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_client_joins_over_http_and_is_killed_in_the_middle(tmp_path: Path) -> None:
    sides = Sides(tmp_path)
    owner, client = sides.owner, sides.client
    url = f"https://127.0.0.1:{(port := free_port())}"
    own = ("--keys", "keys")
    at = (*own, "--registry", "registry")
    (owner / "outbox").mkdir()
    sides.run(owner, "exchange", "certificate", "-o", "tls", "--host", "127.0.0.1")
    pin = ("--url", url, "--certificate", "tls/certificate.pem")
    sides.run(owner, "invite", "package", *own, *pin, "--title", "a trial", "-o", "hello.offsite.json")
    fingerprint = read_card((owner / "keys" / "card.json").read_bytes()).fingerprint
    shutil.copy(owner / "hello.offsite.json", client)
    join = ("join", "hello.offsite.json", "--data", "private.jsonl", "--tune", TUNE, "--yes", "--canaries", "8")
    to_serve = ("--outbox", "outbox", "--port", port, "--certificate", "tls/certificate.pem")
    to_serve = (*to_serve, "--certificate-key", "tls/certificate-key.pem")

    # the exchange is there already, for other clients; it answers this one as it answers anybody
    sides.run(owner, "job", "create", "package", "--client", "client", *at, "-o", "another-job")
    serving = sides.start(owner, "exchange", "serve", *at, *to_serve)
    try:
        told, err = sides.run(client, *join, "--name", "Example Hospital", "--fingerprint", fingerprint)
        assert told["state"] == "card"
        assert "has not pinned this card" in err
        card = client / told["card"]
        sides.run(owner, "trust", "add", card, *own, "--fingerprint", told["fingerprint"])
        terms = ("--adapter", "lora", "--placement", "all", "--rank", "2")
        sides.run(owner, "job", "create", "package", "--client", "Example Hospital", *at, *terms, "-o", "job")
        sealed = ("--package", "package", "--outbox", "outbox")
        sides.run(owner, "invite", "job", *own, *pin, *sealed, "-o", "to-hospital.offsite.json")

        work = client / "joined"
        killed_once(sides.start(client, *join), lambda: list(work.glob("bundle.work/checkpoint-*")))
        _, err = sides.run(client, *join, code=4)
        assert "canaries: done before" in err
        assert "tune: going on after step" in err
        assert "sealed off: " in err
        assert "nothing is sent: " in err
        assert not (work / "bundle.sealed").exists()

        told, err = sides.run(client, *join, "--accept-leakage")
        assert (told["state"], told["accepted_leakage"]) == ("verified", True), err
        assert err.count("done before") == 3
        again, _ = sides.run(client, *join, "--accept-leakage")
        assert (again["id"], again["sealed_digest"]) == (told["id"], told["sealed_digest"])
    finally:
        serving.send_signal(signal.SIGINT)
        serving.communicate(timeout=60)

    sides.run(owner, "registry", "accept", "latest", *at)
    sides.run(owner, "plug-in", "model", "latest", *at, "-o", "adapted")
    rows = ("--data", "heldout.jsonl", "--block-tokens", "48")
    found, _ = sides.run(
        owner, "evaluate", "model", "--package", "package", "--bundle", "latest", *at, *rows, "-o", "r"
    )
    assert found["plugged_in"] != found["zero_shot"]
    left = {path.name for path in owner.rglob("*")}
    assert not {"private.jsonl", "canaries.json"} & left
