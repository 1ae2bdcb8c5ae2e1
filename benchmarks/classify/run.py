"""What a classifier is worth in an encoder when it was tuned on the encoder's emulator.

Run as: ``python benchmarks/classify/run.py --config benchmarks/classify/banking77.yaml --data FOLDER --work FOLDER
--out JSON --model FOLDER``. Each package is made without training; on each, and on a package of the whole encoder, the
same adapter with a head is tuned once a seed, and ``offsite evaluate`` measures accuracy and macro-F1 on rows that
nobody trained on. ``--only width`` works on some packages. What is done is not done again unless its settings or its
data changed.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.once import Once
from benchmarks.record import arguments, environment, files, write
from client.tuning.config import TuneConfig
from client.tuning.verb import run as tune
from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run as distill
from server.evaluation.config import EvaluateConfig
from server.evaluation.evaluate import run as evaluate

ROWS = ("zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in", "lora_full")
METRICS = ("accuracy", "macro_f1")


def main() -> None:
    """Do what is not done, write the results and print the table."""
    given, plan, only = arguments(__doc__, only="packages to work on, by comma")
    wanted = [name for name in plan["packages"] if name != "whole" and (not only or name in only)]
    if unknown := only - set(plan["packages"]):
        raise SystemExit(f"no package {min(unknown)!r}, known: {', '.join(plan['packages'])}")
    bench = Bench(plan, given.data, given.work)
    found = {name: bench.package(name) for name in wanted}
    result = {
        "benchmark": "classify", **environment(), "config": {**plan, "model": Path(plan["model"]).name},
        "data": files(**{role: given.data / plan[role] for role in ("public", "train", "heldout")}),
        "labels": list(bench.labels), "packages": found, "seconds": bench.seconds(),
    }  # fmt: skip
    write(given.out, result)
    print(table(found))


class Bench:
    """Packages, runs and measurements under one folder, each done once."""

    def __init__(self, plan: Mapping[str, Any], data: Path, work: Path) -> None:
        """Write the rows that are tuned and measured on: those of the first labels, the first of each file."""
        self._plan, self._data, self._once = plan, data, Once(work)
        train, heldout = (_rows(data / plan[role]) for role in ("train", "heldout"))
        self.labels = tuple(sorted({row["label"] for row in train})[: plan["num_labels"]])
        self._train = self._written("train", train, plan["num_train"])
        self._heldout = self._written("heldout", heldout, plan["num_heldout"])

    def package(self, name: str) -> dict[str, Any]:
        """Return what adapters tuned on the package score, beside those tuned on the whole encoder."""
        seeds = self._plan["seeds"]
        bundles, references = ({seed: self._tuned(on, seed) for seed in seeds} for on in (name, "whole"))
        settings = {
            "model": self._plan["model"], "block_tokens": self._plan["tuning"]["block_tokens"], "precision": "fp32",
            "package": self._package(name), "reference_package": (self._package("whole"),), "data": self._heldout,
            "bundle": tuple(f"seed{seed}={self._once.work / run['folder']}" for seed, run in bundles.items()),
            "reference": tuple(f"lora_full={self._once.work / run['folder']}" for run in references.values()),
        }  # fmt: skip
        told = self._once.do("evaluate", settings, lambda out, s: evaluate(EvaluateConfig(output=out, **s)))
        made = self._once.told(self._package(name))
        kept = ("before_loss", "best_loss", "accuracy", "macro_f1", "seconds", "folder")
        return {
            "middle_parameters": made["middle_parameters"],
            "emulator_parameters": made["emulator_parameters"],
            "tuned": {str(seed): {key: run[key] for key in kept if key in run} for seed, run in bundles.items()},
            **told["classify"],
        }

    def seconds(self) -> dict[str, float]:
        """Return the seconds that each piece of work took."""
        return self._once.took

    def _tuned(self, name: str, seed: int) -> dict[str, Any]:
        settings = {
            "package": self._package(name), "data": self._train, "labels": self.labels, "seed": seed,
            **self._plan["tuning"],
        }  # fmt: skip
        return self._once.do(f"tune-{name}", settings, lambda out, s: tune(TuneConfig(output=out, **s)))

    def _package(self, name: str) -> Path:
        settings = {"model": self._plan["model"], **self._plan["distillation"], **self._plan["packages"][name]}
        if settings["method"] != "keep-all":
            settings["public"] = (self._data / self._plan["public"],)
        told = self._once.do(name, settings, lambda out, s: distill(DistillConfig(output=out, **s)))
        return self._once.work / str(told["folder"])

    def _written(self, name: str, rows: list[dict[str, Any]], num: int) -> Path:
        chosen = [row for row in rows if row["label"] in self.labels][:num]
        return self._once.rows(f"{name}-{len(self.labels)}", chosen)


def table(found: Mapping[str, Any]) -> str:
    """Return the table in Markdown: a row for each model, two measures for each package, then what was recovered."""
    titles = [f"{name}: {metric.replace('_', '-')}" for name in found for metric in METRICS]
    lines = ["| model | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for row in ROWS:
        cells = [f"{own['rows'][row][metric]:.3f}" for own in found.values() for metric in METRICS]
        lines.append(f"| {row.replace('_', ' ')} | " + " | ".join(cells) + " |")
    shares = [own["recovered"][metric]["recovery_vs_lora"] for own in found.values() for metric in METRICS]
    lines.append("| recovery | " + " | ".join("-" if one is None else f"{one:.2f}" for one in shares) + " |")
    return "\n".join(lines)


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
