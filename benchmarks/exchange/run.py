"""What many clients at once do to one exchange: see README.md.

Run as: ``python benchmarks/exchange/run.py -o benchmarks/exchange/results/NAME.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kills import work
from benchmarks.record import environment
from client.exchange.http import ExchangeClient
from client.exchange.verbs import _awaited, _upload
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import Job
from offsite.errors import ArtefactError
from offsite.keys.identity import Identity, generate
from offsite.keys.trust import TrustStore
from offsite.sealed.encryption import seal_files
from offsite.sealed.folder import read_sealed
from offsite.sealed.manifest import SIGN_PURPOSE, SealedManifest, sealed_size, write_signatures
from offsite.strictjson import parse_strict
from server.registry.registry import Registry

SHARES = {"good": 0.6, "duplicate": 0.2, "tampered": 0.1, "oversized": 0.1}
OVERSIZED_BYTES = 10**10


@dataclass(frozen=True)
class Push:
    """One bundle that one client hands in, and what it is."""

    kind: str
    sealed: Path
    client: Identity


def main() -> None:
    """Push, count, and write what was found."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--bundles", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("-o", "--out", type=Path, required=True)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), given.clients, given.bundles, random.Random(given.seed))
    stated = {"clients": given.clients, "bundles": given.bundles, "seed": given.seed, "shares": SHARES}
    result = {"benchmark": "exchange", **environment(), "config": stated, "seed": given.seed, **found}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(json.dumps({key: found[key] for key in ("outcomes", "num_verified", "num_5xx", "seconds", "peak_bytes")}))


def measure(folder: Path, num_clients: int, num_bundles: int, draw: random.Random) -> dict[str, Any]:
    """Return what became of every push, how long it took, and what the exchange needed and kept."""
    (folder / "world").mkdir()
    world = work.prepare(folder / "world")
    pushes = plan(world, folder, num_clients, num_bundles, draw)
    process, url, rest_bytes = serve(folder)
    try:
        began = time.monotonic()
        quiet = Path(os.devnull).open("w")  # noqa: SIM115 - every client would show its progress
        with quiet, contextlib.redirect_stderr(quiet), ThreadPoolExecutor(num_clients) as pool:
            outcomes = list(pool.map(lambda one: push(url, world.owner.public.fingerprint, one), pushes))
        seconds = time.monotonic() - began
        peak_bytes = memory(process.pid, "VmHWM")
    finally:
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=60)
    counts = json.loads(told.splitlines()[-1])
    with Registry.open(folder / "registry", folder / "world" / "keys") as registry:
        num_verified = sum(entry.state == "verified" for entry in registry.entries())
        num_lines = registry.verify_log().number
    taken = sorted(took for _, outcome, took in outcomes if outcome == "verified")
    uploads = folder / "registry" / "exchange" / "uploads"
    return {
        "outcomes": dict(sorted(Counter(f"{kind}: {outcome}" for kind, outcome, _ in outcomes).items())),
        "num_verified": num_verified,
        "num_good": sum(one.kind == "good" for one in pushes),
        "num_5xx": counts["num_failed"],
        "num_requests": counts["num_requests"],
        "num_log_lines": num_lines,
        "uploads_left": len(list(uploads.iterdir())),
        "rest_bytes": rest_bytes,
        "peak_bytes": peak_bytes,
        "seconds": round(seconds, 1),
        "median_push_seconds": round(taken[len(taken) // 2], 2),
        "longest_push_seconds": round(taken[-1], 2),
    }


def plan(world: work.World, folder: Path, num_clients: int, num_bundles: int, draw: random.Random) -> list[Push]:
    """Return the pushes in the order they begin; each bundle has a job of its own, a duplicate that of its original."""
    keys = folder / "world" / "keys"
    trust, clients = TrustStore(keys), [generate(f"client {number}", days=1) for number in range(num_clients)]
    for client in clients:
        trust.add(client.public.card, client.public.fingerprint)
    numbers = {kind: round(share * num_bundles) for kind, share in SHARES.items()}
    numbers["good"] += num_bundles - sum(numbers.values())
    pushes: list[Push] = []
    with Registry.open(folder / "registry", keys, create=True) as registry:
        for kind in ("good", "tampered", "oversized"):
            for number in range(numbers[kind]):
                client = clients[len(pushes) % num_clients]
                sealed = seal(world, registry, client, folder / f"{kind}-{number}")
                if kind == "tampered":
                    tamper(sealed, signatures=bool(number % 2))
                elif kind == "oversized":
                    declare_more(sealed, client)
                pushes.append(Push(kind, sealed, client))
    sound = pushes[: numbers["good"]]
    pushes += [Push("duplicate", one.sealed, one.client) for one in draw.choices(sound, k=numbers["duplicate"])]
    draw.shuffle(pushes)
    (folder / "outbox").mkdir()
    return pushes


def seal(world: work.World, registry: Registry, client: Identity, out: Path) -> Path:
    """Return the world's bundle as that client sealed it for a new job."""
    now = int(time.time())
    bound = {"package_digest": world.package.digest, "base_digest": world.package.manifest.base_digest}
    job = Job(
        job_id=os.urandom(16).hex(),
        owner=world.owner.public.fingerprint,
        client=client.public.fingerprint,
        adapter=AdapterSpec(kind="lora", placement="1+1", rank=2, dtype="float32"),
        created=now,
        expires=now + 86400,
        **bound,
    )
    registry.add_job(job, package=world.package.path, client_name="client")
    seal_files(
        {path.name: path for path in world.bundle.iterdir()},
        out,
        kind="bundle",
        job_id=job.job_id,
        created=now,
        expires=now + 86400,
        sequence=1,
        round=1,
        previous=None,
        identity=client,
        recipients=[world.owner.public],
        **bound,
    )
    return out


def tamper(sealed: Path, *, signatures: bool) -> None:
    """One byte differs: of a signature, or of the largest encrypted file."""
    path = sealed / "signatures.json"
    if signatures:
        text = path.read_text()
        first = json.loads(text)["ed25519"][:8]
        path.write_text(text.replace(first, ("A" if first[0] != "A" else "B") + first[1:]))
        return
    path = max((sealed / "payload").iterdir(), key=lambda found: found.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def declare_more(sealed: Path, client: Identity) -> None:
    """The manifest, signed again, declares a file that no job asks for."""
    content = json.loads((sealed / "manifest.json").read_text())
    content["files"][0].update(bytes=OVERSIZED_BYTES, sealed_bytes=sealed_size(OVERSIZED_BYTES))
    raw = json.dumps(content).encode()
    (sealed / "manifest.json").write_bytes(raw)
    signatures = client.sign(SIGN_PURPOSE, raw)
    (sealed / "signatures.json").write_bytes(write_signatures(client.public.fingerprint, signatures))


def serve(folder: Path) -> tuple[subprocess.Popen[str], str, int]:
    """Return a process that serves with the settings as they are shipped, its address, and its memory at rest."""
    words = ["--registry", "registry", "--outbox", "outbox", "--keys", "world/keys", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "offsite", "exchange", "serve", *words],
        cwd=folder,
        env={**os.environ, "OFFSITE_PASSPHRASE": "passphrase", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    while line.endswith(": loading\n"):
        line = process.stderr.readline()
    if "http://" not in line:
        raise SystemExit(f"the exchange did not start: {line}")
    time.sleep(1)
    return process, line.split(" at ")[1].split(";")[0], memory(process.pid, "VmRSS")


def push(url: str, owner: str, one: Push) -> tuple[str, str, float]:
    """Hand in one bundle as the verb does, without its local checks; return its kind, its fate and the seconds."""
    began = time.monotonic()
    raw = read_sealed(one.sealed)
    manifest = parse_strict(raw.manifest_raw, SealedManifest, "manifest.json", {})
    with ExchangeClient(url, one.client, owner, patience_seconds=300, timeout_seconds=120) as exchange:
        try:
            status, _ = _upload(exchange, one.sealed, raw, manifest)
            status = _awaited(exchange, status, 600)
            outcome = f"refused, {status.reason}" if status.state == "refused" else status.state
        except ArtefactError as error:
            outcome = f"refused, {type(error).__name__}"
    return one.kind, outcome, time.monotonic() - began


def memory(pid: int, name: str) -> int:
    """Return a figure of a process's memory, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
