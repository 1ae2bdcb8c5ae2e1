"""The verb as a process of its own: killed, shared by several, and with nothing but its package and data."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.tuning.verb import run
from offsite.artefacts.bundle import open_bundle

pytestmark = pytest.mark.slow

OFFSITE = [sys.executable, "-P", "-m", "offsite"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TIMED = {"seconds", "tokens_per_second", "peak_bytes", "bundle"}


def words(package, data, output, *more):
    small = ["--block-tokens", "32", "--precision", "fp32", "--device", "cpu"]
    small += [] if "--learning-rate" in more else ["--learning-rate", "0.01"]
    return ["tune", str(package.path), "--data", str(data), "-o", str(output), *small, *more]


def ended(command, **given):
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, **given)


def figures(done):
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {key: value for key, value in found.items() if key not in TIMED}


def killed_after(command, log, num_lines):
    """Run the command and kill it once the log has so many lines. Returns how many it had in the end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while not (log.exists() and log.read_bytes().count(b"\n") >= num_lines):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return log.read_bytes().count(b"\n")


@pytest.mark.parametrize(
    ("adapter", "kills"),
    [(["lora", "--dropout", "0.2"], 3), (["blocks"], 1), (["lora", "--placement", "0+1"], 1)],
    ids=["lora thrice", "blocks once", "top once, its input kept"],
)
def test_killed_and_resumed_it_ends_as_an_unbroken_run(dropped_package, notes_file, tmp_path, adapter, kills):
    given = [
        "--adapter",
        *adapter,
        "--steps",
        "150",
        "--evaluate-every",
        "11",
        "--checkpoint-every",
        "4",
        "--seed",
        "2",
    ]
    given += ["--disclose", "validation_loss,num_tokens"]
    wanted = figures(ended([*OFFSITE, *words(dropped_package, notes_file, tmp_path / "whole", *given)]))

    broken = [*OFFSITE, *words(dropped_package, notes_file, tmp_path / "broken", *given)]
    work, drawn = tmp_path / "broken.work", random.Random().sample(range(2, 120), kills)
    resume: list[str] = []
    for after in sorted(drawn):
        killed_after([*broken, *resume], work / "log.jsonl", after)
        assert work.is_dir(), f"killed after {drawn}"
        assert not (tmp_path / "broken").exists(), f"killed after {drawn}"
        resume = ["--resume"]

    assert figures(ended([*broken, "--resume"])) == wanted, f"killed after {drawn}"
    assert not work.exists()
    logs = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / f"{name}.log.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    assert logs[0] == logs[1], f"killed after {drawn}"
    assert [record["step"] for record in logs[1]] == list(range(1, 151))
    assert open_bundle(tmp_path / "broken").digest == wanted["bundle_digest"]
    assert not list(tmp_path.glob(".*.partial"))


def test_killed_before_the_first_checkpoint(dropped_package, notes_file, tmp_path):
    given = ["--steps", "100", "--evaluate-every", "50", "--checkpoint-every", "90"]
    wanted = figures(ended([*OFFSITE, *words(dropped_package, notes_file, tmp_path / "whole", *given)]))
    broken = [*OFFSITE, *words(dropped_package, notes_file, tmp_path / "broken", *given)]
    killed_after(broken, tmp_path / "broken.work" / "log.jsonl", 3)
    again = ended([*broken, "--resume"])
    assert "tune: starting anew" in again.stderr
    assert figures(again) == wanted


SEVERAL = ["--adapter", "lora", "--runs", "3", "--steps", "80", "--evaluate-every", "20", "--checkpoint-every", "4"]


@pytest.mark.parametrize("parallel", [[], ["--parallel", "2"]], ids=["in turn", "side by side"])
def test_killed_in_the_second_of_three_runs_it_ends_as_an_unbroken_one(dropped_package, notes_file, tmp_path, parallel):
    wanted = figures(ended([*OFFSITE, *words(dropped_package, notes_file, tmp_path / "whole", *SEVERAL)]))
    broken = [*OFFSITE, *words(dropped_package, notes_file, tmp_path / "broken", *SEVERAL, *parallel)]
    work = tmp_path / "broken.work"
    killed_after(broken, work / "run2" / "log.jsonl", 30)
    time.sleep(1.0)  # a run side by side sees that it is alone, and goes
    left = (work / "run2" / "log.jsonl").read_bytes()
    time.sleep(0.5)
    assert (work / "run2" / "log.jsonl").read_bytes() == left
    assert not (tmp_path / "broken").exists()
    assert (work / "run1" / "finished.json").exists() or parallel
    again = ended([*broken, "--resume"])
    found = figures(again)
    assert "run 2 of 3: going on after step" in again.stderr
    assert not work.exists()
    assert without_seconds(found) == without_seconds(wanted)
    assert open_bundle(tmp_path / "broken").digest == wanted["bundle_digest"]
    assert not list(tmp_path.glob(".*.partial"))


def without_seconds(told):
    return {**told, "runs": [{**one, "seconds": 0} for one in told["runs"]]}


def test_ctrl_c_stops_runs_side_by_side_each_with_its_checkpoint(dropped_package, notes_file, tmp_path):
    given = [*SEVERAL, "--steps", "100000", "--checkpoint-every", "50000", "--parallel", "2"]  # neither ends before
    given = [word for number, word in enumerate(given) if number not in (4, 5, 8, 9)]
    command = [*OFFSITE, *words(dropped_package, notes_file, tmp_path / "bundle", *given)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    work = tmp_path / "bundle.work"
    logs = [work / name / "log.jsonl" for name in ("run1", "run2")]
    while not all(log.exists() and log.read_bytes().count(b"\n") >= 2 for log in logs):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert b"Traceback" not in said
    for name in ("run1", "run2"):
        assert list((work / name).glob("checkpoint-*")), name


def test_a_run_side_by_side_that_fails_is_told_with_its_number(dropped_package, notes_file, tmp_path):
    given = ["--runs", "2", "--parallel", "2", "--learning-rate", "1e30"]
    done = ended([*OFFSITE, *words(dropped_package, notes_file, tmp_path / "bundle", *given)])
    assert (done.returncode, done.stdout) == (5, "")
    errors = [line for line in done.stderr.splitlines() if line.startswith("offsite: error:")]
    assert len(errors) == 1
    assert errors[0].startswith("offsite: error: run ")
    assert " of 2: " in errors[0]
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("kind", ["blocks", "lora"])
def test_two_processes_share_the_model_and_end_as_one(settings, dropped_package, notes_file, tmp_path, kind):
    alone = run(settings(dropped_package.path, output=tmp_path / "one", adapter=kind, steps=8, learning_rate=0.01))
    given = words(dropped_package, notes_file, tmp_path / "two", "--adapter", kind, "--steps", "8")
    together = figures(ended([*OFFSITE, *given, "--launch", "2"]))
    assert together["best_loss"] == pytest.approx(alone["best_loss"], abs=1e-4)
    assert [loss for _, loss in together["evaluations"]] == pytest.approx(
        [loss for _, loss in alone["evaluations"]], abs=1e-4
    )
    assert together["tokens"] == alone["tokens"]
    one, two = open_bundle(tmp_path / "one"), open_bundle(tmp_path / "two")
    assert two.manifest.tensors == one.manifest.tensors
    assert not (tmp_path / "two.work").exists()


@pytest.mark.parametrize("kind", ["blocks", "lora"])
def test_of_two_processes_each_holds_half(dropped_package, notes_file, tmp_path, kind):
    given = words(dropped_package, notes_file, tmp_path / "two", "--adapter", kind, "--steps", "2")
    script = str(Path(__file__).parent / "tune_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = ended([*launcher, script, str(tmp_path), *given])
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        facts = json.loads((tmp_path / f"facts-{rank}.json").read_text())
        assert facts["types"] == ["DTensor"]
        assert facts["share"] == pytest.approx(0.5, abs=0.02)
        assert facts["trained_share"] == pytest.approx(0.5, abs=0.05)
        assert facts["rows"] == 2
    assert len(done.stdout.splitlines()) == 1  # the main process alone speaks


def test_an_error_in_several_processes_is_told_once(dropped_package, notes_file, tmp_path):
    given = words(dropped_package, notes_file, tmp_path / "two", "--learning-rate", "1e30", "--launch", "2")
    done = ended([*OFFSITE, *given])
    assert (done.returncode, done.stdout) == (5, "")
    assert sum(line.startswith("offsite: error:") for line in done.stderr.splitlines()) == 1
    assert not (tmp_path / "two").exists()


ALONE = """
import socket, sys

class Owners:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"emulator", "server"}:
            raise AssertionError(f"the client imported {name}")

def refuse(event, arguments):
    if event.startswith("socket.") and event not in {"socket.__new__", "socket.gethostname"}:
        raise AssertionError(f"the client called {event}")
    if event == "subprocess.Popen":
        raise AssertionError("the client started a process")

sys.meta_path.insert(0, Owners())
sys.addaudithook(refuse)
from offsite import cli
sys.exit(cli.run(sys.argv[1:]))
"""


def test_a_client_needs_its_package_and_its_data_and_nothing_else(dropped_package, notes_file, tmp_path):
    """In a folder with nothing else, with an empty home, no network, no other process and none of the owner's code."""
    shutil.copytree(dropped_package.path, tmp_path / "client" / "package")
    (tmp_path / "client" / "notes.txt").write_bytes(notes_file.read_bytes())
    (tmp_path / "home").mkdir()
    environment = {
        "HOME": str(tmp_path / "home"),
        "PATH": "/nowhere",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(tmp_path / "home"),
    }
    given = ["tune", "package", "--data", "notes.txt", "-o", "bundle", "--block-tokens", "32", "--steps", "4"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, *given, "--adapter", "lora"],
        cwd=tmp_path / "client", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    left = sorted(path.name for path in (tmp_path / "client").iterdir())
    assert left == ["bundle", "bundle.log.jsonl", "bundle.run.json", "notes.txt", "package"]
    assert open_bundle(tmp_path / "client" / "bundle").manifest.package_digest == dropped_package.digest
