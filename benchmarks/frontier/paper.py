"""Beside the paper at the paper's own leak: its method and ours on its sets of questions, a client for each.

Run as: ``python benchmarks/frontier/paper.py --config benchmarks/frontier/paper.yaml --data FOLDER --work FOLDER --out
JSON``. The paper's method (arXiv:2302.04870) leaves blocks out, distils, and tunes the two ends; of the emulators
listed the one is taken whose zero-shot accuracy is nearest the paper's share of the full model's. Ours narrows the
middle and tunes LoRA on every linear; of the widths listed the one is taken whose *tuned* accuracy is nearest to that
of the paper's method, and not above it by more than a standard error: what the client is left with is then the same.

Jobs that are done are not run again unless their code, settings or data changed. ``--only piqa`` works on some sets;
the results keep all that is done. ``--check`` compares the scorer with lm-evaluation-harness on 20 questions of each.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from benchmarks.record import ROOT, arguments, environment, files, write
from offsite.digests import sha256_bytes, sha256_file

CODE = (
    "benchmarks/frontier/questions.py",
    "benchmarks/frontier/work.py",
    "emulator/compression",
    "emulator/distillation",
    "offsite/training",
    "offsite/modelling/head.py",
    "offsite/text/batches.py",
    "client/objectives",
    "client/tuning/data.py",
    "adapters",
)
REFERENCE = "full"


def main() -> None:
    """Run the jobs that are not done, write the results and print the table."""
    given, plan, only = arguments(
        __doc__, only="sets to work on, by comma; the results keep all that is done", more=_options
    )
    if unknown := only - set(plan["sets"]):
        raise SystemExit(f"no set {min(unknown)!r}, known: {', '.join(plan['sets'])}")
    bench = Bench(plan, given)
    if given.check:
        check(bench)
        return
    sets = [name for name in plan["sets"] if not only or name in only]
    finished = bench.run(sets)
    found = bench.found(sets)
    roles = {f"{name}_{role}": given.data / own[role] for name, own in plan["sets"].items() for role in own}
    named = {**plan, "model": Path(plan["model"]).name}
    result = {
        "benchmark": "frontier/paper", **environment(), "config": named, "finished": finished, "code_now": bench.code,
        "data": files(public=given.data / plan["public"], **roles), **found, "jobs": bench.told(),
    }  # fmt: skip
    write(given.out, result)
    print(write_table(result))


def _options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--limit-seconds", type=float, default=0, help="start no job after this long; 0 for no limit")
    options.add_argument("--any-code", action="store_true", help="keep jobs that other code did")
    options.add_argument("--check", action="store_true", help="compare the scorer with lm-evaluation-harness, no more")


class Bench:
    """The jobs, those that are done, and what is chosen from them."""

    def __init__(self, plan: dict[str, Any], given: argparse.Namespace) -> None:
        """Read the journal of finished jobs; one of other code, settings or data counts as not done."""
        import work as frontier

        self.plan, self.data, self.work, self.limit = plan, given.data, given.work.resolve(), given.limit_seconds
        self.work.mkdir(parents=True, exist_ok=True)
        self.began, self.code = time.monotonic(), digest()
        self._journal, self._digests = self.work / "jobs.jsonl", {}
        lines = self._journal.read_text(encoding="utf-8").splitlines() if self._journal.is_file() else []
        self._done = {job["bound"]: job for job in map(json.loads, lines) if given.any_code or job["code"] == self.code}
        self._used: dict[str, dict[str, Any]] = {}
        self._may_run = True
        torch.set_num_threads(given.threads)
        frontier.start(plan["model"], given.threads, "", "", str(self.work))

    def run(self, sets: Sequence[str]) -> bool:
        """The sets' jobs are done, or as many as the time allows. Returns whether all are."""
        try:
            self._all_of(sets)
        except OutOfTimeError:
            return False
        return True

    def found(self, sets: Sequence[str]) -> dict[str, Any]:
        """Return what finished jobs give, without running any: of all sets, else of these, else of the first few."""
        self._may_run = False
        every = list(self.plan["sets"])
        for chosen in (every, sets, *(every[:num] for num in range(len(every) - 1, 0, -1))):
            self._used.clear()
            try:
                return self._all_of(chosen)
            except OutOfTimeError:
                continue
        return {"sets": {}, "chosen": {}, "average": {}}

    def told(self) -> list[dict[str, Any]]:
        """Return the jobs that the figures come from, without paths."""
        hidden = {"client", "questions", "adapter_key", "model", "bound"}
        kept = [{key: value for key, value in job.items() if key not in hidden} for job in self._used.values()]
        for job in kept:
            if "distill" in job:
                job["distill"] = {key: value for key, value in job["distill"].items() if key != "public"}
        return kept

    def asked(self, name: str) -> dict[str, Any]:
        """Return what says which questions of a set are asked, for a job."""
        return {
            "set": name,
            "questions": str(self.data / self.plan["sets"][name]["questions"]),
            "num_questions": self.plan["num_questions"],
        }

    def _all_of(self, sets: Sequence[str]) -> dict[str, Any]:
        zero = {name: self._do({"kind": "zero_shot", **self.asked(name)}) for name in sets}
        dropped = self._dropped(sets, zero)
        paper = {name: self._tuned(dropped["package"], "paper", name) for name in sets}
        narrowed = self._narrowed(sets, paper)
        ours = {name: self._tuned(narrowed["package"], "ours", name) for name in sets}
        reference = {name: self._tuned(REFERENCE, "ours", name) for name in sets}
        full = {name: self._figures(one) for name, one in zero.items()}
        found: dict[str, Any] = {name: {"zero_shot": full[name]} for name in sets}
        for method, chosen, tuned in (("paper", dropped, paper), ("ours", narrowed, ours)):
            plugged = {name: self._plugged(tuned[name]) for name in sets}
            for name in sets:
                share = rehearsed_share(plugged, name)
                found[name][method] = {
                    "emulator_zero_shot": self._figures(self._emulator(chosen["package"], name)),
                    "emulator_tuned": self._figures(self._score(tuned[name])),
                    "rate": tuned[name]["how"]["rate"],
                    "plugged_in": {share: self._figures(one) for share, one in plugged[name].items()},
                    "rehearsed_share": share,
                }
        for name in sets:
            found[name]["lora_full"] = self._figures(self._score(reference[name]))
            found[name]["ours_less_paper"] = differences(found[name])
        return {"sets": found, "chosen": {"paper": dropped, "ours": narrowed}, "average": averaged(found)}

    def _dropped(self, sets: Sequence[str], zero: Mapping[str, Any]) -> dict[str, Any]:
        """Return the emulator with blocks left out that keeps the paper's share of the zero-shot accuracy."""
        aim, full = self.plan["kept_accuracy"], mean(one["accuracy"] for one in zero.values())
        kept = {}
        for package in self.plan["methods"]["paper"]["packages"]:
            kept[package] = mean(self._emulator(package, name)["accuracy"] for name in sets) / (full or 1)
        return {"package": min(kept, key=lambda one: abs(kept[one] - aim)), "kept_accuracy": kept}

    def _narrowed(self, sets: Sequence[str], paper: Mapping[str, Any]) -> dict[str, Any]:
        """Return the width of equal tuned accuracy: nearest, and not above by more than a standard error."""
        above = {}
        for package in self.plan["methods"]["ours"]["packages"]:
            pairs = [(self._score(self._tuned(package, "ours", name)), self._score(paper[name])) for name in sets]
            above[package] = mean_difference([paired(ours["right"], other["right"]) for ours, other in pairs])
        allowed = {one: value for one, value in above.items() if value["mean"] <= value["error"]}
        nearest = min(allowed or above, key=lambda one: abs(above[one]["mean"]))
        return {"package": nearest, "tuned_above_paper": above, "within_a_standard_error": bool(allowed)}

    def _emulator(self, package: str, name: str) -> dict[str, Any]:
        return self._do({"kind": "emulator", "package": self._package(package), **self.asked(name)})

    def _tuned(self, package: str, method: str, name: str) -> dict[str, Any]:
        """Return the finished run at the rate of the lowest validation loss."""
        own, jobs = self.plan["methods"][method], []
        for rate in own["rates"]:
            job = {
                "kind": "tune", "package": self._package(package), "seed": self.plan["seed"],
                "client": str(self.data / self.plan["sets"][name]["client"]), "set": name,
                "how": {"adapter": own["adapter"], "rate": rate, **self.plan["how"]},
            }  # fmt: skip
            job["adapter_key"] = f"{job['package']}-{name}-{self._bound(job)}"
            self._do(job)
            jobs.append(self._done[self._bound(job)])
        return min(jobs, key=lambda job: job["found"]["validation_loss"])

    def _score(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a run's adapter gives on its emulator."""
        return self._do({"kind": "tuned", "seed": run["seed"], **self._of(run)})

    def _plugged(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return what shares of a run's adapter give in the full model."""
        return self._do({"kind": "plugged", "shares": self.plan["shares"], **self._of(run)})

    def _of(self, run: Mapping[str, Any]) -> dict[str, Any]:
        return {key: run[key] for key in ("package", "how", "adapter_key")} | self.asked(run["set"])

    def _package(self, name: str) -> str:
        """Return the name of the package's folder, which stands."""
        distill = dict(self.plan["packages"][name])
        if "steps" not in distill:
            distill["steps"] = 0
        if distill["method"] != "keep-all":
            distill["public"] = [str(self.data / self.plan["public"])]
        job = {"kind": "package", "model": self.plan["model"], "distill": distill}
        folder = f"{name}-{self._bound(job)}"
        self._do({**job, "package": folder}, bound=self._bound(job))
        return folder

    def _do(self, job: dict[str, Any], bound: str = "") -> dict[str, Any]:
        """Return what the job found, now or before.

        Raises:
            OutOfTimeError: when it is not done and none is to be started any more.
        """
        from questions import run_job

        bound = bound or self._bound(job)
        if bound not in self._done:
            elapsed = time.monotonic() - self.began
            if not self._may_run or (self.limit and elapsed > self.limit):
                raise OutOfTimeError
            done = {**run_job(job), "bound": bound, "code": self.code}
            with self._journal.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(done) + "\n")
            self._done[bound] = done
            words = [
                job["kind"],
                job.get("package", ""),
                job.get("set", ""),
                f"{done['seconds']}s",
                shown(done["found"]),
            ]
            print(f"{time.monotonic() - self.began:6.0f}s", *filter(None, words), file=sys.stderr, flush=True)
        self._used[bound] = self._done[bound]
        found: dict[str, Any] = self._done[bound]["found"]
        return found

    def _bound(self, job: Mapping[str, Any]) -> str:
        """Return a digest of a job's settings and of the data that it reads; its paths do not matter."""
        told = {key: value for key, value in job.items() if key not in ("client", "questions")}
        told |= {key: self._digest(job[key]) for key in ("client", "questions") if key in job}
        if "distill" in job:
            told["distill"] = {
                **job["distill"],
                "public": [self._digest(one) for one in job["distill"].get("public", ())],
            }
        told["model"] = self.plan["model"]
        return sha256_bytes(json.dumps(told, sort_keys=True).encode()).removeprefix("sha256:")[:12]

    def _digest(self, path: str) -> str:
        if path not in self._digests:
            self._digests[path] = sha256_file(Path(path))
        return str(self._digests[path])

    def _figures(self, found: Mapping[str, Any]) -> dict[str, Any]:
        accuracy, num = found["accuracy"], len(found["right"])
        error = math.sqrt(accuracy * (1 - accuracy) / max(1, num - 1))
        return {"accuracy": accuracy, "error": error, "loss": found["loss"], "right": found["right"]}


class OutOfTimeError(Exception):
    """A job is not done, and none is to be started."""


# --- figures


def mean(values: Iterable[float]) -> float:
    """Return the mean."""
    listed = list(values)
    return sum(listed) / len(listed)


def paired(left: str, right: str) -> dict[str, float]:
    """Return how much more often `left` is right than `right` on the same questions, with its standard error."""
    ahead = [int(one) - int(other) for one, other in zip(left, right, strict=True)]
    middle = mean(ahead)
    variance = sum((value - middle) ** 2 for value in ahead) / max(1, len(ahead) - 1)
    return {"mean": middle, "error": math.sqrt(variance / len(ahead))}


def mean_difference(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of independent differences, each weighing the same, with its standard error."""
    error = math.sqrt(sum(one["error"] ** 2 for one in found)) / len(found)
    return {"mean": mean(one["mean"] for one in found), "error": error}


def rehearsed_share(plugged: Mapping[str, Mapping[str, Any]], name: str) -> str | None:
    """Return the share that is best on the mean over the other sets, where the owner plays the client; the larger of
    equals. None where there is no other set.
    """
    others = [found for other, found in plugged.items() if other != name]
    if not others:
        return None
    shares = sorted(others[0], key=float, reverse=True)
    return max(shares, key=lambda share: mean(found[share]["accuracy"] for found in others))


def row_of(own: Mapping[str, Any], method: str, row: str) -> Mapping[str, Any] | None:
    """Return a row's figures: ``whole`` and ``rehearsed`` are of what is plugged in."""
    if row == "whole":
        return dict(own[method]["plugged_in"])["1"]  # type: ignore[no-any-return]
    if row == "rehearsed":
        share = own[method]["rehearsed_share"]
        return None if share is None else own[method]["plugged_in"][share]
    return own[row] if row in own else own[method][row]


ROWS = ("zero_shot", "emulator_zero_shot", "emulator_tuned", "whole", "rehearsed", "lora_full")
COMPARED = ("emulator_zero_shot", "emulator_tuned", "whole", "rehearsed")


def differences(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return by how much our method is ahead of the paper's, row by row, in pairs of questions."""
    found = {}
    for row in COMPARED:
        ours, paper = row_of(own, "ours", row), row_of(own, "paper", row)
        found[row] = None if ours is None or paper is None else paired(ours["right"], paper["right"])
    return found


def averaged(sets: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean over the sets of every row, of both methods and of their differences."""
    found: dict[str, Any] = {}
    for method in ("paper", "ours"):
        rows = {row: [row_of(own, method, row) for own in sets.values()] for row in ROWS}
        found[method] = {
            row: None
            if None in own
            else mean_difference([{"mean": one["accuracy"], "error": one["error"]} for one in own])  # type: ignore[index]
            for row, own in rows.items()
        }
    for row in COMPARED:
        own = [one["ours_less_paper"][row] for one in sets.values()]
        found.setdefault("ours_less_paper", {})[row] = None if None in own else mean_difference(own)
    return found


def write_table(result: Mapping[str, Any]) -> str:
    """Return a Markdown table: per set and on the average, both methods and the difference, in points of accuracy."""
    if not result["sets"]:
        return "no set is done"
    chosen, lines = result["chosen"], []
    for method in ("paper", "ours"):
        lines.append(f"{method}: {chosen[method]['package']}")
    lines += ["", f"| set | method | {' | '.join(row.replace('_', ' ') for row in ROWS)} | share |"]
    lines.append("| --- | --- |" + " --- |" * (len(ROWS) + 1))
    for name, own in result["sets"].items():
        for method in ("paper", "ours"):
            cells = [points(row_of(own, method, row), "accuracy") for row in ROWS]
            lines.append(f"| {name} | {method} | {' | '.join(cells)} | {own[method]['rehearsed_share'] or '-'} |")
        lines.append(_difference_line(name, own["ours_less_paper"]))
    for method in ("paper", "ours"):
        cells = [points(result["average"][method][row], "mean") for row in ROWS]
        lines.append(f"| average | {method} | {' | '.join(cells)} | |")
    lines.append(_difference_line("average", result["average"]["ours_less_paper"]))
    return "\n".join(lines)


def _difference_line(name: str, found: Mapping[str, Any]) -> str:
    cells = [points(found[row], "mean", sign="+") if row in found else "" for row in ROWS]
    return f"| {name} | ours - paper | {' | '.join(cells)} | |"


def points(found: Mapping[str, Any] | None, key: str, sign: str = "") -> str:
    """Return accuracy and standard error in points."""
    return "-" if found is None else f"{100 * found[key]:{sign}.1f} ± {100 * found['error']:.1f}"


def shown(found: Mapping[str, Any]) -> str:
    """Return what a job found, short."""
    kept = {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}
    kept |= {
        key: round(value["accuracy"], 3)
        for key, value in found.items()
        if isinstance(value, dict) and "accuracy" in value
    }
    return json.dumps(kept)


# --- the rest


def check(bench: Bench) -> None:
    """Return only if the scorer and lm-evaluation-harness agree on 20 questions of every set.

    Raises:
        SystemExit: where they do not.
    """
    import work as frontier
    from questions import harness_says, read_questions, scored, some_right

    differ = False
    for name in bench.plan["sets"]:
        asked = some_right(read_questions(bench.asked(name)["questions"], 20))
        own = scored(frontier.full_model(), asked)
        with tempfile.TemporaryDirectory() as folder:
            said = harness_says(asked, Path(folder))
        ours = {key: own[key].count("1") / len(asked) for key in said}
        agree = all(abs(ours[key] - said[key]) < 1e-9 for key in said)
        differ |= not agree
        print(f"{name}: ours {ours}, harness {said}: {'the same' if agree else 'differ'}", flush=True)
    if differ:
        raise SystemExit("the scorer and the harness differ")


def digest() -> str:
    """Return one digest of the code that jobs are made by."""
    paths = [ROOT / name for name in CODE]
    listed = [path for one in paths for path in ([one] if one.is_file() else sorted(one.glob("*.py")))]
    return sha256_bytes("".join(f"{path.relative_to(ROOT)} {sha256_file(path)}\n" for path in listed).encode())


if __name__ == "__main__":
    main()
