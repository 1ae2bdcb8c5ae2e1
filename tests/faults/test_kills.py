"""A sample of ``benchmarks/kills``: the owner's side killed and its disk failing, and what is found after a restart."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

import pytest

from offsite.faults import POINTS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "kills" / "results"


@pytest.fixture(scope="module")
def work():
    spec = importlib.util.spec_from_file_location("kills_work", ROOT / "benchmarks" / "kills" / "work.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(work, tmp_path_factory):
    return work.prepare(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def traced(work, world, tmp_path_factory):
    cycle = work.begin(world, tmp_path_factory.mktemp("dry") / "job", 1)
    return cycle, work.trace(world, cycle)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_row_24_killed_at_a_fault_point_and_again_while_completing(point, work, world, traced, tmp_path):
    points = traced[1]["points"]
    draw = random.Random(point)
    position = draw.choice([number for number, found in enumerate(points) if found == point])
    again = work.Break("kill", draw.randrange(12))
    hit = work.play(world, tmp_path / "job", 7, [work.Break("kill", position), again])
    assert hit[0].at == position


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["clock", "enospc", "eio", "short", "limit"])
def test_row_25_other_ways_to_break_off(mode, work, world, traced, tmp_path):
    draw = random.Random(mode)
    for number in range(2):
        work.play(world, tmp_path / f"job-{number}", 7 + number, [work.breaks_of(traced[1], mode, draw)])


@pytest.mark.slow
def test_what_is_half_or_lost_is_seen(work, world, traced, tmp_path):
    """The inspection itself: each kind of loss, made by hand, is found."""
    done, _ = traced
    work.in_fork(lambda: work.inspect(world, done, is_over=True))
    bundle = Path("registry/bundles") / done.id

    def flip(path):
        raw = bytearray(path.read_bytes())
        raw[-2] ^= 1
        path.write_bytes(raw)

    losses = {
        "a registry that is gone": lambda folder: shutil.rmtree(folder / "registry"),
        "a bundle's files are gone": lambda folder: shutil.rmtree(folder / bundle),
        "a bundle's file is another": lambda folder: flip(folder / bundle / "adapter.safetensors"),
        "the published model is gone": lambda folder: shutil.rmtree(folder / "adapted"),
        "the published model is another": lambda folder: flip(folder / "adapted" / "adapter_model.safetensors"),
        "a line of the log is another": lambda folder: flip(folder / "registry" / "registry.log"),
        "the database was turned back": lambda folder: (folder / "registry" / "registry.db").unlink(),
        "an orphan": lambda folder: (folder / ".adapted.0.partial").mkdir(),
        "an upload is left": lambda folder: (folder / "uploads" / "x").mkdir(),
    }
    for name, lose in losses.items():
        copy = shutil.copytree(done.folder, tmp_path / name.replace(" ", "-"))
        lose(copy)
        other = work.Cycle(copy, done.job, done.sealed, done.digest)
        with pytest.raises(AssertionError):
            work.in_fork(lambda other=other: work.inspect(world, other, is_over=True))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_kept_result_is_of_a_clean_commit_and_without_a_loss(path):
    found = json.loads(path.read_text())
    assert found["dirty"] is False
    assert found["num_kills"] >= 200
    assert (found["num_losses"], found["losses"]) == (0, [])
    assert set(found["kills"]) >= set(POINTS)
    assert {"enospc", "eio", "limit"} <= set(found["failures"])
    table = (RESULTS.parent / "README.md").read_text()
    in_turn = sum(count for name, count in found["kills"].items() if name in POINTS)
    for words in (
        f"in turn | {in_turn} | 0",
        f"from a call | {found['failures']['eio']} | 0",
        f"{found['num_jobs']} jobs",
    ):
        assert words in table
