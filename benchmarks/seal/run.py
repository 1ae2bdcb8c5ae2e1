"""What sealing and opening a large file costs, against a plain copy with a SHA-256, in time and memory.

Run as: ``python benchmarks/seal/run.py --rounds 6 -o benchmarks/seal/results/NAME.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.record import environment

ARMS = ("copy", "seal", "open")
ZERO = "sha256:" + "0" * 64
LOGICAL = "chat_template.jinja"  # a file of a package that holds no tensors, so that only the bytes are measured


def main() -> None:
    """Measure every arm in rounds and write the ratios."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--megabytes", type=int, default=1024, help="size of the file, in 2^20 bytes")
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--work", type=Path, default=None, help="folder to work in; default: a temporary one")
    options.add_argument("--arm", choices=ARMS, default=None, help=argparse.SUPPRESS)
    options.add_argument("-o", "--out", type=Path, default=None)
    given = options.parse_args()
    if given.arm:
        print(json.dumps(_measure(given.arm, given.work)))
        return
    record = environment()
    record["versions"]["cryptography"] = version("cryptography")
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        _write_input(Path(work) / "large", given.megabytes)
        for arm in ARMS:  # not counted: there is something to open, and every arm has written once
            _spawn(arm, Path(work))
        rounds = [
            {arm: _spawn(arm, Path(work)) for arm in (*ARMS[turn % 3 :], *ARMS[: turn % 3])}
            for turn in range(given.rounds)
        ]
    size = given.megabytes * 2**20
    result = {
        **record,
        "config": {"megabytes": given.megabytes, "rounds": given.rounds},
        "cpu_count": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "rounds": rounds,
        "median_mb_per_second": {
            arm: round(median(size / 1e6 / one[arm]["seconds"] for one in rounds), 1) for arm in ARMS
        },
        "throughput_over_copy": {
            arm: round(median(one["copy"]["seconds"] / one[arm]["seconds"] for one in rounds), 3) for arm in ARMS
        },
        "cpu_throughput_over_copy": {
            arm: round(median(one["copy"]["cpu_seconds"] / one[arm]["cpu_seconds"] for one in rounds), 3)
            for arm in ARMS
        },
        "peak_growth_bytes": {arm: max(one[arm]["peak_growth_bytes"] for one in rounds) for arm in ARMS},
    }
    text = json.dumps(result, indent=1)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")
    print(text)


def _write_input(path: Path, megabytes: int) -> None:
    with path.open("wb") as handle:
        for _ in range(megabytes):
            handle.write(os.urandom(2**20))
        handle.flush()
        os.fsync(handle.fileno())


def _spawn(arm: str, work: Path) -> dict[str, Any]:
    words = [sys.executable, __file__, "--arm", arm, "--work", str(work)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def _measure(arm: str, work: Path) -> dict[str, Any]:
    from offsite.keys import files as keyfiles
    from offsite.keys.identity import generate, save_identity
    from offsite.keys.identity import load_identity as load

    keyfiles.SCRYPT_COST = 2**4  # unlocking real keys takes 32 MiB, which would hide what sealing takes
    if not (work / "one").exists():
        for name in ("one", "two"):
            save_identity(work / name, generate(name, days=1), b"benchmark")
    one, two = (load(work / name, b"benchmark") for name in ("one", "two"))
    act = {"copy": _copy, "seal": _seal, "open": _open}[arm]
    (work / "small").write_bytes(bytes(100))
    _clear(work, "small", arm)
    if arm == "open":
        _seal(work, "small", one, two)
    act(work, "small", one, two)
    before = _peak()
    _clear(work, "large", arm)
    started, cpu = time.perf_counter(), time.process_time()
    act(work, "large", one, two)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    grown = _peak() - before
    if arm == "open" and _sha256(work / "large.opened" / LOGICAL) != _sha256(work / "large"):
        raise SystemExit("what was opened is not what was sealed")
    return {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3), "peak_growth_bytes": grown}


def _clear(work: Path, name: str, arm: str) -> None:
    for suffix in {"copy": ("copy",), "seal": ("sealed",), "open": ("opened",)}[arm]:
        path = work / f"{name}.{suffix}"
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if arm == "open" and name == "small":
        shutil.rmtree(work / "small.sealed", ignore_errors=True)


def _copy(work: Path, name: str, *_: Any) -> None:
    digest, buffer = hashlib.sha256(), bytearray(2**20)
    with (work / name).open("rb", buffering=0) as source, (work / f"{name}.copy").open("wb", buffering=0) as target:
        while count := source.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            target.write(memoryview(buffer)[:count])
        os.fsync(target.fileno())


def _seal(work: Path, name: str, one: Any, two: Any) -> None:
    from offsite.sealed.encryption import seal_files

    now = int(time.time())
    seal_files(
        {LOGICAL: work / name},
        work / f"{name}.sealed",
        kind="package",
        job_id="0" * 32,
        created=now,
        expires=now + 86_400,
        sequence=1,
        round=0,
        previous=None,
        base_digest=ZERO,
        package_digest=ZERO,
        identity=one,
        recipients=[two.public],
    )


def _open(work: Path, name: str, one: Any, two: Any) -> None:
    from offsite.sealed.encryption import decrypt_files
    from offsite.sealed.folder import read_sealed
    from offsite.sealed.manifest import verify_sealed
    from offsite.staging import staged_folder

    raw = read_sealed(work / f"{name}.sealed")
    manifest = verify_sealed(raw.manifest_raw, raw.signatures_raw, lambda _: one.public, now=int(time.time()))
    with staged_folder(work / f"{name}.opened") as stage:
        decrypt_files(work / f"{name}.sealed", raw, manifest, two, stage)


def _peak() -> int:
    """Peak resident bytes of this program; ``ru_maxrss`` would start at the peak of the process that spawned it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


if __name__ == "__main__":
    main()
