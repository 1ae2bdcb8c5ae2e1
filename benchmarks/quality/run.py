"""The quality benchmark: which emulator, which adapter, at what loss of capability.

Run as: ``python benchmarks/quality/run.py --config benchmarks/quality/medquad.yaml --data FOLDER --work FOLDER``.
Stages: every package once; every arm at every learning rate with the first seed; every arm's best rate, by the
client's own validation loss, with the other seeds; then the table. Killed, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import yaml
from table import is_reference, summarise_jobs, write_table

from benchmarks.record import environment, files


def main() -> None:
    """Run the stages that are not done and write the results."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--config", type=Path, required=True)
    options.add_argument("--data", type=Path, required=True, help="folder that benchmarks/data/prepare.py --full wrote")
    options.add_argument("--work", type=Path, required=True, help="folder for packages and finished jobs")
    options.add_argument("--out", type=Path, required=True, help="results JSON to write")
    options.add_argument("--model", default=None, help="instead of the configuration's")
    options.add_argument(
        "--only",
        default="",
        help="what to work on, by comma, as PACKAGE or PACKAGE/ADAPTER; the table shows all that is done",
    )
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--threads", type=int, default=1, help="threads of each worker")
    options.add_argument("--limit-seconds", type=float, default=0, help="start no job after this long; 0 for no limit")
    given = options.parse_args()
    plan = _plan(yaml.safe_load(given.config.read_text(encoding="utf-8")), given)
    began = time.monotonic()
    given.work.mkdir(parents=True, exist_ok=True)
    runner = _Runner(given, plan, began)
    only = set(filter(None, given.only.split(",")))
    arms = [arm for arm in _arms(plan) if not only or {arm["name"], arm["package"]} & only]
    wanted = {arm["package"] for arm in arms}
    packages = [_package_job(plan, package) for package in plan["packages"] if package["name"] in wanted]
    runner.run(
        [{"kind": "zero_shot", "key": "zero_shot", "model": plan["model"], "heldout": plan["heldout"]}, *packages]
    )
    runner.run([job for arm in arms for job in _jobs(plan, arm, arm["rates"], plan["seeds"][:1])])
    best = {arm["name"]: _best_rate(runner.done, arm, plan["seeds"][0]) for arm in arms}
    runner.run(
        [job for arm in arms if best[arm["name"]] for job in _jobs(plan, arm, [best[arm["name"]]], arm["seeds"])]
    )
    _write(given, plan, runner, time.monotonic() - began)


class _Runner:
    """Runs jobs in worker processes and keeps what they found in ``jobs.jsonl``."""

    def __init__(self, given: argparse.Namespace, plan: dict[str, Any], began: float) -> None:
        self._given, self._model, self._began, self._measuring = given, plan["model"], began, plan["measuring"]
        self._file = given.work / "jobs.jsonl"
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        self.done = {job["key"]: job for job in map(json.loads, lines)}

    def _start(self) -> tuple[str, int, int, str]:
        measuring = self._measuring
        return self._model, self._given.threads, measuring["heldout_blocks"], measuring["precision"]

    def run(self, jobs: list[dict[str, Any]]) -> None:
        """Run the jobs that are not done, in order of their keys' appearance."""
        from work import run_job, start

        open_jobs = [job for job in jobs if job["key"] not in self.done]
        context = multiprocessing.get_context("spawn")
        workers = min(self._given.workers, len(open_jobs))
        if not open_jobs:
            return
        with ProcessPoolExecutor(workers, context, start, self._start()) as pool:
            futures = []
            for job in open_jobs:
                futures.append(pool.submit(run_job, job, str(self._given.work)))
            for number, future in enumerate(as_completed(futures), 1):
                if future.cancelled():
                    continue
                job = future.result()
                self.done[job["key"]] = job
                with self._file.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(job) + "\n")
                seconds = time.monotonic() - self._began
                shown = {k: v for k, v in job["found"].items() if isinstance(v, int | float)}
                print(f"{seconds:6.0f}s {number}/{len(futures)} {job['key']} {json.dumps(shown)}", flush=True)
                if self._given.limit_seconds and seconds > self._given.limit_seconds:
                    for other in futures:
                        other.cancel()


def _plan(config: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    config["model"] = given.model or config["model"]
    for key in ("public", "client", "heldout"):
        config[key] = _found(config[key], given)
    for package in config["packages"]:
        for key in {"public", "client"} & set(package):
            package[key] = _found(package[key], given)
    return config


def _found(name: str, given: argparse.Namespace) -> str:
    path = given.data / name
    return str(path if path.exists() else Path(__file__).resolve().parents[2] / name)


def _package_job(plan: dict[str, Any], package: dict[str, Any]) -> dict[str, Any]:
    settings = dict(package["distill"])
    if settings.pop("needs_public", True):
        settings["public"] = package.get("public", plan["public"])
    if settings.get("steps", plan["distillation"]["steps"]):
        settings = {**plan["distillation"], **settings}
    key = f"package-{package['name']}"
    base = {"kind": "package", "key": key, "package": package["name"], "model": plan["model"]}
    return {**base, "heldout": plan["heldout"], "distill": settings}


def _arms(plan: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for package in plan["packages"]:
        for adapter in package["adapters"]:
            recipe = {**plan["tuning"], **plan["adapters"][adapter]}
            found.append(
                {
                    **recipe,
                    "name": f"{package['name']}/{adapter}",
                    "package": package["name"],
                    "client": package.get("client", plan["client"]),
                    "adapter_name": adapter,
                    "seeds": package.get("seeds", {}).get(adapter, plan["seeds"]),
                }
            )
    return found


def _jobs(plan: dict[str, Any], arm: dict[str, Any], rates: list[float], seeds: list[int]) -> list[dict[str, Any]]:
    own = {"name", "package", "client", "rates", "seeds", "adapter_name"}
    settings = {key: value for key, value in arm.items() if key not in own}
    return [
        {
            "kind": "tune",
            "key": f"{arm['name'].replace('/', '-')}-{rate:g}-{seed}",
            "arm": arm["name"],
            "package": arm["package"],
            "model": plan["model"],
            "client": arm["client"],
            "heldout": plan["heldout"],
            "tune": settings,
            "rate": rate,
            "seed": seed,
            "reference": is_reference(arm["package"]),
            "scales": plan.get("scales", []),
        }
        for rate in rates
        for seed in seeds
    ]


def _best_rate(done: dict[str, Any], arm: dict[str, Any], seed: int) -> float | None:
    tried = [done.get(f"{arm['name'].replace('/', '-')}-{rate:g}-{seed}") for rate in arm["rates"]]
    found = [job for job in tried if job]
    return min(found, key=lambda job: job["found"]["validation_loss"])["rate"] if found else None


def _write(given: argparse.Namespace, plan: dict[str, Any], runner: _Runner, seconds: float) -> None:
    shown = {key: value for key, value in plan.items() if key not in {"public", "client", "heldout", "model"}}
    shown["packages"] = [
        {key: Path(value).name if key in ("public", "client") else value for key, value in package.items()}
        for package in plan["packages"]
    ]
    hidden = {"model", "client", "heldout", "tune", "distill"}
    result = {
        "benchmark": "quality",
        **environment(),
        "config": shown,
        "data": files(
            **{key: Path(plan[key]) for key in ("public", "client", "heldout")},
            **{
                f"{key}_of_{own['name']}": Path(own[key])
                for own in plan["packages"]
                for key in ("public", "client")
                if key in own
            },
        ),
        "model": Path(plan["model"]).name,
        "seconds": round(seconds, 1),
        **summarise_jobs(plan, list(runner.done.values()), _arms(plan)),
        "jobs": [{key: value for key, value in job.items() if key not in hidden} for job in runner.done.values()],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(write_table(result))


if __name__ == "__main__":
    main()
