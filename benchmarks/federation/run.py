"""What a federation is worth, and what one bad client does to it.

Run as: ``python benchmarks/federation/run.py --config benchmarks/federation/medquad.yaml --data D --work W --out F``.

Arms: one adapter of all clients over rounds (``shared``), the same with a higher rate at the server (``faster``), one
for each over the same rounds (``personal``), one for each in a single longer run (``local``), and one tuned on all text
in one place (``pooled``); then two rounds with one client that hands in NaN, a scaled update or what it learnt from
shuffled answers, under the mean and under a robust rule. Every arm is a run of the product; killed, an arm goes on.
``--only shared,pooled`` works on some.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


import client.federation.member
import server.federation.federation
import server.federation.simulation
from benchmarks.federation.poison import CLIENT_VARIABLE, SCALE_VARIABLE
from benchmarks.record import arguments, environment, files, write
from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run as distill
from offsite.config import build
from server.federation.simulation import run as simulate
from server.federation.simulationconfig import SimulateConfig

POISONS = ("nan", "scaled", "labels")


def main() -> None:
    """Run the arms that are not done and write the results."""
    given, plan, wanted = arguments(__doc__, only="arms to work on, by comma")
    bench = Bench(plan, given.data, given.work)
    for arm in bench.arms():
        if not wanted or arm in wanted:
            bench.run(arm)
    done = {arm: json.loads(bench.path(arm).read_text()) for arm in bench.arms() if bench.path(arm).is_file()}
    result = {
        "benchmark": "federation", **environment(), "config": plan, "arms": done,
        "data": files(public=given.data / plan["public"], train=given.data / "medquad_train.jsonl.gz",
                      heldout=given.data / "medquad_heldout.jsonl.gz"),
        "num_rows": bench.num_rows,
    }  # fmt: skip
    write(given.out, result)


class Bench:
    """The package, each client's text, and the arms."""

    def __init__(self, plan: dict[str, Any], data: Path, work: Path) -> None:
        self.plan, self.work = plan, work
        self._require_own()
        self.texts = {name: work / f"{name}.jsonl" for name in plan["sources"]}
        self.heldout = {name: work / f"{name}-heldout.jsonl" for name in plan["sources"]}
        self.num_rows = self._write_texts(data)
        self.package = work / "package"
        if not self.package.is_dir():
            pairs = zip(plan["distill"][::2], plan["distill"][1::2], strict=True)
            flags = {word.removeprefix("--").replace("-", "_"): value for word, value in pairs}
            flags |= {"model": plan["model"], "public": str(data / plan["public"]), "output": str(self.package)}
            distill(build(DistillConfig, flags=flags))

    def _require_own(self) -> None:
        """The work folder was begun by these settings and this code, or is begun now: what is done stays as it was."""
        begun, stated = self.work / "begun.json", {"plan": self.plan, "commit": environment()["commit"]}
        if not begun.is_file():
            begun.write_text(json.dumps(stated, indent=1, sort_keys=True) + "\n")
        elif json.loads(begun.read_text()) != json.loads(json.dumps(stated)):
            raise SystemExit(
                f"{self.work.name} was begun with other settings or by another commit: give another --work"
            )

    def arms(self) -> list[str]:
        """Return the arms in the order in which they are worth running."""
        poisoned = [f"{way}-{rule}" for rule in ("mean", "robust") for way in POISONS]
        return ["shared", "pooled", "personal", "local", "faster", "clean-mean", "clean-robust", *poisoned]

    def path(self, arm: str) -> Path:
        """Return where the arm's figures are."""
        return self.work / f"{arm}.json"

    def run(self, arm: str) -> None:
        """The arm has its figures."""
        if self.path(arm).is_file():
            return
        began, timer = time.monotonic(), Timer()
        with timer.on():
            told = simulate(self._settings(arm)) if arm in ("shared", "personal", "faster") else self._other(arm)
        seconds = time.monotonic() - began
        folder = self.work / arm
        found = json.loads((folder / "result" / "results.json").read_text())
        figures = {
            "zero_shot": found["zero_shot"], "plugged_in": found["plugged_in"], "rounds": found["rounds"],
            "bytes": _bytes(folder), "seconds": round(seconds, 1), "seconds_by_part": timer.parts,
            "not_better": told["not_better"],
        }  # fmt: skip
        self.path(arm).write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")

    def _other(self, arm: str) -> dict[str, Any]:
        plan, rounds = self.plan, self.plan["rounds"]
        if arm == "pooled":
            everything = self.work / "pooled.jsonl"
            everything.write_bytes(b"".join(path.read_bytes() for path in self.texts.values()))
            steps = plan["steps"] * rounds * len(self.texts)
            return simulate(self._settings(arm, clients={"all": str(everything)}, rounds=1, steps=steps, min_clients=1))
        if arm == "local":
            return simulate(self._settings(arm, mode="personal", rounds=1, steps=plan["steps"] * rounds))
        way, rule = arm.split("-")
        changes = dict(plan["poison"]["robust"]) if rule == "robust" else {}
        changes |= {"rounds": plan["poison"]["rounds"], "min_clients": 3}
        name = plan["poison"]["client"]
        if way == "labels":
            shuffled = self.work / "shuffled.jsonl"
            rows = [json.loads(line) for line in self.texts[name].read_text().splitlines()]
            answers = [row["completion"] for row in rows]
            random.Random(plan["seed"]).shuffle(answers)
            shuffled.write_text(
                "".join(json.dumps({**row, "completion": a}) + "\n" for row, a in zip(rows, answers, strict=True))
            )
            clients = {one: str(path) for one, path in self.texts.items()} | {name: str(shuffled)}
            return simulate(self._settings(arm, clients=clients, **changes))
        if way == "clean":
            return simulate(self._settings(arm, **changes))
        os.environ[CLIENT_VARIABLE] = name
        os.environ[SCALE_VARIABLE] = "nan" if way == "nan" else str(plan["poison"]["scale"])
        kept, server.federation.simulation.CLIENT_APP = (
            server.federation.simulation.CLIENT_APP,
            "benchmarks.federation.poison:app",
        )
        try:
            return simulate(self._settings(arm, max_relative_frobenius=1e6, max_relative_spectral=1e6, **changes))
        finally:
            server.federation.simulation.CLIENT_APP = kept

    def _settings(self, arm: str, **changes: Any) -> SimulateConfig:
        plan, folder = self.plan, self.work / arm
        rate = plan["rates"].get(arm, plan["rates"]["shared"])
        settings = {
            "name": arm, "package": str(self.package), "model": plan["model"], "work": str(folder / "parties"),
            "output": str(folder / "result"), "clients": {name: str(path) for name, path in self.texts.items()},
            "heldout": {name: str(path) for name, path in self.heldout.items()}, "watch_every": 0, "merge": False,
            "heldout_tokens": plan["heldout_tokens"], "block_tokens": plan["tune"]["block_tokens"],
            "rounds": plan["rounds"], "steps": plan["steps"],
            "learning_rate": rate, "mode": "personal" if arm == "personal" else "shared", "tune": plan["tune"],
            **plan["adapter"],
        }  # fmt: skip
        if arm == "faster":
            settings["server_learning_rate"] = plan["server_learning_rate"]
        return build(SimulateConfig, flags={**settings, **changes})

    def _write_texts(self, data: Path) -> dict[str, int]:
        sources = {source: name for name, source in self.plan["sources"].items()}
        counts = {}
        for part, paths, most in (("train", self.texts, self.plan["rows"]), ("heldout", self.heldout, None)):
            with gzip.open(data / f"medquad_{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            for source, name in sources.items():
                own = sorted((row for row in rows if row["source"] == source), key=_order)[:most]
                paths[name].write_text("".join(json.dumps(row) + "\n" for row in own))
                counts[f"{name} {part}"] = len(own)
        return counts


class Timer:
    """Seconds of tuning, and of everything else that a round costs: opening, sealing, checking, putting together."""

    def __init__(self) -> None:
        self.parts = {"tuning": 0.0, "opening and sealing": 0.0, "checking": 0.0}

    @contextmanager
    def on(self) -> Iterator[None]:
        """The product's functions are timed until the block ends."""
        places = [
            (client.federation.member, "tune", "tuning"),
            (client.federation.member, "open_sealed", "opening and sealing"),
            (client.federation.member, "seal_run", "opening and sealing"),
            (server.federation.federation, "seal_run", "opening and sealing"),
            (server.federation.federation.Federation, "take_in", "checking"),
        ]
        kept = [(place, name, getattr(place, name)) for place, name, _ in places]
        for place, name, part in places:
            setattr(place, name, self._timed(getattr(place, name), part))
        try:
            yield
        finally:
            for place, name, function in kept:
                setattr(place, name, function)
            self.parts = {part: round(seconds, 2) for part, seconds in self.parts.items()}

    def _timed(self, function: Any, part: str) -> Any:
        def timed(*words: Any, **named: Any) -> Any:
            began = time.monotonic()
            try:
                return function(*words, **named)
            finally:
                self.parts[part] += time.monotonic() - began

        return timed


def _order(row: dict[str, Any]) -> str:
    return hashlib.sha256(row["document"].encode()).hexdigest()


def _bytes(folder: Path) -> dict[str, list[int]]:
    """Return the bytes that one client gets, before sealing adds its 1 %, and sealed hands in, by round: means."""
    out: dict[int, list[int]] = {}
    back: dict[int, list[int]] = {}
    for path in (folder / "parties" / "registry" / "rounds").glob("*/offsite.json"):
        stated = json.loads(path.read_text())
        if stated["task"] == "train":
            out.setdefault(stated["round"], []).append(sum(part.stat().st_size for part in path.parent.iterdir()))
    for path in (folder / "parties" / "clients").glob("*/work/round-*/sealed"):
        size = sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
        back.setdefault(int(path.parent.name[-4:]), []).append(size)
    return {
        way: [round(sum(sizes) / len(sizes)) for _, sizes in sorted(found.items())]
        for way, found in (("to_client", out), ("from_client", back))
    }


if __name__ == "__main__":
    main()
