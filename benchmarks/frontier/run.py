"""The frontier benchmark: what plugging in recovers, against what the client is left with after tuning.

Run as: ``python benchmarks/frontier/run.py --config benchmarks/frontier/medquad.yaml --data FOLDER --work FOLDER --out
JSON``. What was measured, in the results or in the work folder, is not measured again, and no package or run is made
that nothing left to measure needs. Each job is bound to a digest of the code that made it. Killed, it goes on where it
was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmarks.record import arguments, environment, files
from offsite.digests import sha256_bytes, sha256_file

ROOT = Path(__file__).resolve().parents[2]
MADE = ("package", "run")
"""Kinds of jobs that leave files in the work folder, and are there for the others."""

CODE = (
    "benchmarks/frontier/work.py",
    "emulator/compression",
    "offsite/training/step.py",
    "offsite/modelling/head.py",
    "offsite/text/batches.py",
    "client/objectives",
    "client/tuning/data.py",
    "adapters/lift.py",
)


def main() -> None:
    """Run the jobs that are not done and write the results."""
    given, plan, only = arguments(
        __doc__, only="arms to work on, by comma; the results keep all that is done", more=shared
    )
    jobs = list(planned(plan, given.data))
    earlier = json.loads(given.out.read_text(encoding="utf-8"))["jobs"] if given.out.is_file() else []
    kept = {job["key"]: job for job in earlier}
    done = {key: job for key, job in kept.items() if job["kind"] not in MADE} | finished(given.work / "jobs.jsonl")
    work_off(needed(jobs, done, only), done, plan, given)
    write({**plan, "model": Path(plan["model"]).name}, kept | done, given)


def shared(options: argparse.ArgumentParser) -> None:
    """The options of the benchmarks whose jobs run in worker processes are there."""
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--threads", type=int, default=1, help="threads of each worker")
    options.add_argument("--limit-seconds", type=float, default=0, help="start no job after this long; 0 for no limit")


def needed(jobs: list[dict[str, Any]], done: dict[str, dict[str, Any]], only: Collection[str]) -> list[dict[str, Any]]:
    """Return the jobs of `only` (all where empty) that are not done, and what is made for them, be it in other arms."""
    left = [job for job in jobs if job["key"] not in done]
    measuring = [job for job in left if job["kind"] not in MADE and (not only or job["arm"] in only)]
    wanted = {need for job in measuring for need in job["needs"]}
    wanted |= {need for job in left if job["key"] in wanted for need in job["needs"]}
    keys = wanted | {job["key"] for job in measuring}
    return [job for job in left if job["key"] in keys]


def planned(plan: dict[str, Any], data: Path) -> Iterator[dict[str, Any]]:
    """Yield every job, those that others need first."""
    yield {"kind": "zero_shot", "key": "zero-shot", "arm": "", "needs": []}
    packages: dict[str, str] = {}
    for arm in plan["arms"]:
        settings = {**plan.get("how", {}), **arm.get("how", {})}
        held = arm.get("packages", [arm["package"]] if "package" in arm else [])
        for name in held:
            if name not in packages:
                packages[name] = f"package/{name}"
                distill = dict(plan["packages"][name])
                if "public" in distill:
                    distill["public"] = [found(one, data) for one in distill["public"]]
                yield {"kind": "package", "key": packages[name], "arm": arm["name"], "needs": [], "package": name,
                       "distill": distill}  # fmt: skip
        runs = [{"key": f"run/{one}", "package": package_of(plan, one)} for one in arm.get("with", [])]
        for seed in arm.get("seeds", []):
            name = held[seed % len(held)]
            how = {**settings, **{key: seed for key in ("data_seed", "start_seed") if settings.get(key) == "seed"}}
            if "anchor_text" in how:
                how["anchor_text"] = found(how["anchor_text"], data)
            key = f"run/{arm['name']}/{seed}"
            runs.append({"key": key, "package": name})
            yield {"kind": "run", "key": key, "arm": arm["name"], "needs": [packages[name]], "package": name,
                   "seed": seed, "how": how}  # fmt: skip
        for first, num in arm.get("means", [[0, 1]]):
            chosen = runs[first : first + num]
            if "tail" in arm:
                chosen = [{**one, "key": f"{one['key']}~tail"} for one in chosen]
            needs = [one["key"].split("~")[0] for one in chosen]
            rank = arm.get("rank", 0)
            yield {"kind": "mean", "key": f"mean/{arm['name']}/{first}+{num}", "arm": arm["name"], "needs": needs,
                   "runs": chosen, "how": settings, "rank": rank, "reference": arm.get("reference", False),
                   **({"correct": True} if arm.get("correct") else {}),
                   "shares": arm.get("shares", plan["shares"])}  # fmt: skip
            if "ways" in arm:
                listed = [{**way, "text": found(way["text"], data)} if "text" in way else way for way in arm["ways"]]
                yield {"kind": "ways", "key": f"ways/{arm['name']}/{first}+{num}", "arm": arm["name"], "needs": needs,
                       "runs": chosen, "how": settings, "ways": listed}  # fmt: skip
            for fit in arm.get("fits", []):
                how = {**fit, "text": found(fit["text"], data)}
                yield {"kind": "fit", "key": f"fit/{arm['name']}/{first}+{num}/{fit['name']}", "arm": arm["name"],
                       "needs": needs, "runs": chosen, "how": settings, "fit": how}  # fmt: skip


def package_of(plan: dict[str, Any], run: str) -> str:
    """Return the package that a run ``ARM/SEED`` tunes on."""
    name, seed = run.split("/")
    (arm,) = [one for one in plan["arms"] if one["name"] == name]
    held = arm.get("packages") or [arm["package"]]
    return str(held[int(seed) % len(held)])


def found(name: str, data: Path) -> str:
    """Return the path of a text: in the data folder, in the repository, or in the work of this benchmark."""
    places = [folder / name for folder in (data, ROOT, Path(__file__).resolve().parent)]
    return str(next(path for path in places if path.exists()))


def finished(journal: Path) -> dict[str, dict[str, Any]]:
    """Return the jobs that are done, by key."""
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []
    return {job["key"]: job for job in map(json.loads, lines)}


def work_off(
    jobs: list[dict[str, Any]], done: dict[str, dict[str, Any]], plan: dict[str, Any], given: argparse.Namespace
) -> None:
    """The jobs are done, or as many as the time allows; a job starts once those that it needs are."""
    from work import run_job, shown, start

    began, code = time.monotonic(), digest()
    waiting = [job for job in jobs if job["key"] not in done]
    if not waiting:
        return
    client, heldout = (found(plan[key], given.data) for key in ("client", "heldout"))
    running: dict[Future[dict[str, Any]], str] = {}
    settings = (plan["model"], given.threads, client, heldout, str(given.work))
    with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn"), start, settings) as pool:
        while waiting or running:
            late = given.limit_seconds and time.monotonic() - began > given.limit_seconds
            for job in [] if late else list(waiting):
                if len(running) < given.workers and all(need in done for need in job["needs"]):
                    waiting.remove(job)
                    running[pool.submit(run_job, job)] = job["key"]
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                job = {**future.result(), "code": code}
                done[key] = job
                with (given.work / "jobs.jsonl").open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(job) + "\n")
                print(f"{time.monotonic() - began:6.0f}s {key} {job['seconds']}s {shown(job['found'])}", flush=True)


def digest() -> str:
    """Return one digest of the code that jobs are made by."""
    paths = [ROOT / name for name in CODE]
    listed = [path for one in paths for path in ([one] if one.is_file() else sorted(one.glob("*.py")))]
    return sha256_bytes("".join(f"{path.relative_to(ROOT)} {sha256_file(path)}\n" for path in listed).encode())


def write(plan: dict[str, Any], done: dict[str, dict[str, Any]], given: argparse.Namespace) -> None:
    """The results stand: every job that is done, without paths."""
    hidden = {"needs", "distill"}
    jobs = [{key: value for key, value in job.items() if key not in hidden} for job in done.values()]
    jobs = [_without_paths(job) for job in jobs]
    roles = {key: Path(found(plan[key], given.data)) for key in ("client", "heldout")}
    texts = {Path(one).stem.split(".")[0]: Path(found(one, given.data)) for one in plan["texts"]}
    result = {
        "benchmark": "frontier",
        **environment(),
        "config": plan,
        "data": files(**roles, **texts),
        "code_now": digest(),
        "jobs": jobs,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _without_paths(found: Any) -> Any:
    """Return what a job says with every text's name in place of its path."""
    if isinstance(found, dict):
        texts = {"text", "anchor_text"}
        return {
            key: Path(value).name if key in texts and isinstance(value, str) else _without_paths(value)
            for key, value in found.items()
        }
    return [_without_paths(one) for one in found] if isinstance(found, list) else found


if __name__ == "__main__":
    main()
