"""The client's own flow, as docs/client.md has it, on 300 rows: every gate is measured and passes without overriding.

The commands are those of the page, played in this process on a tiny random model; `SHORTER` lists what is changed. With
16 retunings instead of 12 the guesses of coins pass 999 times in 1,000 instead of 98 in 100.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offsite import cli
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import Job, write_job
from offsite.audits.record import read_audit
from offsite.exchange.verbs import seal_run
from offsite.keys.trust import TrustStore
from offsite.sealed.config import SealConfig
from offsite.sealed.release import read_release, release_path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "client.md").read_text()
SHORTER = {
    "--count 30": "--count 30 --tokens 16 --candidates 8",
    "--steps 200": "--steps 40 --batch-size 8 --block-tokens 96 --no-pack --precision fp32",
    "-o audit": "--retunings 16 --batch-size 64 --secrets-samples 10 -o audit",
}
COMMANDS = (
    "canaries package --job job",
    "tune package --job job --data private.jsonl.gz",
    "audit bundle",
    "seal bundle",
)


def flow() -> list[list[str]]:
    """The words of the page's commands from canaries to the sealed bundle, in its order."""
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
    found = [line for line in lines if line.startswith(tuple(f"offsite {words}" for words in COMMANDS))]
    for long, short in SHORTER.items():
        found = [line.replace(long, short) for line in found]
    return [shlex.split(line)[1:] for line in found]


def rows_of_the_page() -> str:
    """The script by which the page makes its private data."""
    (script,) = re.findall(r"python - <<'END'\n(import gzip.*?)END\n", PAGE, re.S)
    return script


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pages_flow_passes_every_gate(tmp_path, key_ring, dropped_package, monkeypatch, capsys):
    (keys, client), (owner_keys, owner) = key_ring("client"), key_ring("owner")
    home = tmp_path / "owner"
    for source, copy, other in ((keys, tmp_path / "keys", owner), (owner_keys, home / "keys", client)):
        shutil.copytree(source, copy)
        copy.chmod(0o700)
        TrustStore(copy).add(other.public.card, other.public.fingerprint)
    shutil.copytree(dropped_package.path, tmp_path / "package")
    now = int(time.time())
    job = Job(
        job_id="5" * 32, owner=owner.public.fingerprint, client=client.public.fingerprint,
        package_digest=dropped_package.digest, base_digest=dropped_package.manifest.base_digest,
        adapter=AdapterSpec(kind="lora", placement="1+0", targets="attention", rank=1, dtype="float32"),
        created=now, expires=now + 86400,
    )  # fmt: skip
    write_job(home / "job", job)
    seal_run(SealConfig(input=home / "job", output=tmp_path / "job.sealed", keys=home / "keys"), identity=owner)
    monkeypatch.setenv("OFFSITE_PASSPHRASE", "correct horse")
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", rows_of_the_page()], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert cli.run(["open", "job.sealed", "--keys", "keys", "-o", "job"]) == 0
    capsys.readouterr()
    told = {}
    commands = flow()
    assert [words[0] for words in commands] == ["canaries", "tune", "audit", "seal"]
    assert not any("--accept-leakage" in words for words in commands)
    for words in commands:
        with monkeypatch.context() as patch:
            if words[0] == "canaries":  # so that the run is the same each time
                patch.setattr(os, "urandom", random.Random(5).randbytes)
            assert cli.run(words) == 0
        told[words[0]] = json.loads(capsys.readouterr().out.splitlines()[-1])
    audit, _ = read_audit(tmp_path / "audit")
    assert told["audit"]["gates"] == dict.fromkeys(
        ("scan", "auc", "tpr_at_1", "secrets", "verbatim", "inversion"), "passed"
    )
    assert 250 < told["tune"]["num_records"] < 290
    assert len(audit.retuned.num_in) == 16
    assert told["audit"]["num_nonmembers"] < 40  # what the bundle itself could be measured on
    release = read_release(release_path(tmp_path / "bundle.sealed"))
    assert not release.accepted_leakage
    assert all(gate.verdict == "passed" for gate in release.gates)
