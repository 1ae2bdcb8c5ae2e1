"""How often the owner's side is left half done when it is killed, or its disk fails: see README.md.

Run as: ``python benchmarks/kills/run.py -o benchmarks/kills/results/NAME.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kills import work
from benchmarks.record import environment
from offsite.faults import POINTS


def main() -> None:
    """Break jobs until there were enough kills and failures, and write what was found."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=240, help="SIGKILLs that hit, at fault points and at random")
    options.add_argument("--failures", type=int, default=80, help="runs whose disk failed or wrote short, at least")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("-o", "--out", type=Path, required=True)
    given = options.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), given.kills, given.failures, random.Random(given.seed))
    stated = {"kills": given.kills, "failures": given.failures, "seed": given.seed, "part_bytes": work.PART_BYTES}
    result = {**environment(), "config": stated, **found, "seconds": round(time.monotonic() - began, 1)}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(json.dumps({key: result[key] for key in ("num_kills", "num_failures", "num_jobs", "losses")}))


def measure(folder: Path, num_kills: int, num_failures: int, draw: random.Random) -> dict[str, Any]:
    """Return how many breaks hit, where, and every loss; the same seed draws the same breaks."""
    (folder / "world").mkdir()
    world = work.prepare(folder / "world")
    dry = work.begin(world, folder / "dry", 1)
    traced = work.trace(world, dry)
    work.in_fork(lambda: work.inspect(world, dry, is_over=True))
    points = traced["points"]
    if missing := sorted(set(POINTS) - set(points)):
        raise SystemExit(f"the work reaches no {', '.join(missing)}")
    kills: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    losses: list[str] = []
    positions = itertools.cycle(range(len(points)))
    num_jobs = 0
    while sum(kills.values()) < num_kills or sum(failures.values()) < num_failures:
        num_jobs += 1
        breaks = _plan(traced, next(positions), draw, is_kill=sum(kills.values()) < num_kills)
        job = folder / f"job-{num_jobs}"
        try:
            hit = work.play(world, job, num_jobs + 1, breaks)
        except AssertionError as error:
            losses.append(f"job {num_jobs}, {breaks}: {error}")
            shutil.rmtree(job, ignore_errors=True)
            continue
        for number, how in enumerate(hit):
            if how.mode == "kill" and number == 0 and how == breaks[0]:
                kills[points[int(how.at)]] += 1
            elif how.mode in ("kill", "clock"):
                kills["while completing, at a fault point" if how.mode == "kill" else "at a random moment"] += 1
            else:
                failures[how.mode] += 1
        print(f"{num_jobs} jobs, {sum(kills.values())} kills, {sum(failures.values())} failures", file=sys.stderr)
    return {
        "num_jobs": num_jobs,
        "num_kills": sum(kills.values()),
        "num_failures": sum(failures.values()),
        "num_losses": len(losses),
        "losses": losses,
        "kills": dict(kills),
        "failures": dict(failures),
        "fault_points": points,
        "num_disk_calls": traced["calls"],
    }


def _plan(traced: dict[str, Any], position: int, draw: random.Random, *, is_kill: bool) -> list[work.Break]:
    """Return the breaks of one job: first in the order of the work, the next ones while it is completed."""
    if not is_kill:
        modes = draw.sample(("enospc", "eio", "enospc", "eio", "limit", "short"), 2)
        return [work.breaks_of(traced, mode, draw) for mode in modes]
    more = draw.sample(("kill", "clock", "enospc", "eio", "limit"), 2)
    early = {**traced, "points": traced["points"][: max(1, len(traced["points"]) // 2)]}
    return [work.Break("kill", position), *(work.breaks_of(early, mode, draw) for mode in more)]


if __name__ == "__main__":
    main()
