"""What preferences are worth in the full model when they were tuned on its emulator, beside supervised tuning.

Run as: ``python benchmarks/preference/run.py --config benchmarks/preference/piqa.yaml --data FOLDER --work FOLDER
--out JSON``. One emulator, and the whole model as a package for the reference. Each method (DPO on pairs; the next
token's loss on the chosen answers alone) tunes LoRA on both, at the rate of its own lowest validation loss at the first
seed, and ``offsite evaluate`` measures held-out pairs: how often the right solution is the likelier one, and how often
it has gained on the wrong one. ``--only dpo`` works on some methods. What is done is not done again unless its settings
or its data changed.
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
METRICS = ("accuracy", "reward_accuracy")


def main() -> None:
    """Do what is not done, write the results and print the table."""
    given, plan, only = arguments(__doc__, only="methods to work on, by comma")
    if unknown := only - set(plan["methods"]):
        raise SystemExit(f"no method {min(unknown)!r}, known: {', '.join(plan['methods'])}")
    bench = Bench(plan, given.data, given.work)
    found = {name: bench.method(name) for name in plan["methods"] if not only or name in only}
    result = {
        "benchmark": "preference", **environment(), "config": {**plan, "model": Path(plan["model"]).name},
        "data": files(**{role: given.data / plan[role] for role in ("public", "pairs", "heldout")}), "methods": found,
        "seconds": bench.seconds(),
    }  # fmt: skip
    write(given.out, result)
    print(table(found))


class Bench:
    """Packages, runs and measurements under one folder, each done once."""

    def __init__(self, plan: Mapping[str, Any], data: Path, work: Path) -> None:
        """Write the rows that are tuned and measured on, from the first of each file."""
        self._plan, self._data, self._once = plan, data, Once(work)
        pairs = _first(data / plan["pairs"], plan["num_pairs"])
        chosen = [{"prompt": row["prompt"], "completion": row["chosen"], "document": row["document"]} for row in pairs]
        self._text = {"dpo": self._once.rows("pairs", pairs), "supervised": self._once.rows("chosen", chosen)}
        self._heldout = self._once.rows("heldout", _first(data / plan["heldout"], plan["num_heldout"]))

    def method(self, name: str) -> dict[str, Any]:
        """Return what a method's adapters score, by share plugged in, and which rates they were tuned at."""
        bundles, references = self._tuned(name, "emulator"), self._tuned(name, "whole")
        package, whole = (self._package(which) for which in ("emulator", "whole"))
        found: dict[str, Any] = {"tuned": {"emulator": bundles, "whole": references}, "scales": {}}
        for scale in self._plan["scales"]:
            settings = {
                "model": self._plan["model"], "scale": scale, "block_tokens": self._plan["tuning"]["block_tokens"],
                "package": package, "data": self._heldout, "reference_package": (whole,),
                "bundle": tuple(f"seed{seed}={self._once.work / run['folder']}" for seed, run in bundles.items()),
                "reference": tuple(f"lora_full={self._once.work / run['folder']}" for run in references.values()),
            }  # fmt: skip
            told = self._once.do("evaluate", settings, lambda out, s: evaluate(EvaluateConfig(output=out, **s)))
            found["scales"][f"{scale:g}"] = {
                "perplexity": {row: told[row] for row in ROWS},
                "recovery_nats_vs_lora": told["recovery_nats_vs_lora"],
                **told["preferences"],
            }
        return found

    def seconds(self) -> dict[str, float]:
        """Return the seconds that each piece of work took."""
        return self._once.took

    def _tuned(self, name: str, package: str) -> dict[str, dict[str, Any]]:
        """Return each seed's run, at the rate that was best at the first seed."""
        seeds = self._plan["seeds"]
        tried = {rate: self._run(name, package, rate, seeds[0]) for rate in self._plan["methods"][name]["rates"]}
        best = min(tried, key=lambda rate: tried[rate]["best_loss"])
        runs = {str(seed): self._run(name, package, best, seed) for seed in seeds}
        return {seed: {**run, "rate": best} for seed, run in runs.items()}

    def _run(self, name: str, package: str, rate: float, seed: int) -> dict[str, Any]:
        own = self._plan["methods"][name]["settings"]
        settings = {
            "package": self._package(package), "data": self._text[name], "seed": seed, "learning_rate": rate,
            **self._plan["tuning"], **own,
        }  # fmt: skip
        told = self._once.do(
            f"tune-{name}-{package}",
            settings,
            lambda out, s: tune(TuneConfig(output=out, resume=out.with_name(f"{out.name}.work").is_dir(), **s)),
            resumes=True,
        )
        kept = ("before_loss", "best_loss", "best_step", "reward_accuracy", "seconds", "folder")
        return {key: told[key] for key in kept if key in told}

    def _package(self, name: str) -> Path:
        settings = {"model": self._plan["model"], **self._plan["distillation"], **self._plan["packages"][name]}
        if settings["method"] != "keep-all":
            settings["public"] = (self._data / self._plan["public"],)
        told = self._once.do(name, settings, lambda out, s: distill(DistillConfig(output=out, **s)))
        return self._once.work / str(told["folder"])


def table(found: Mapping[str, Any]) -> str:
    """Return the table in Markdown: a row for each model, two shares for each method, then what was recovered."""
    lines = ["| model | " + " | ".join(f"{name}: {metric.replace('_', ' ')}" for name in found for metric in METRICS)]
    lines[0] += " |"
    lines.append("| --- |" + " --- |" * (len(found) * len(METRICS)))
    scales = list(next(iter(found.values()))["scales"])
    for row in ROWS:
        for scale in scales if row == "plugged_in" else scales[:1]:
            told = [own["scales"][scale]["rows"][row] for own in found.values()]
            label = f"{row.replace('_', ' ')} ({scale})" if row == "plugged_in" else row.replace("_", " ")
            lines.append(f"| {label} | " + " | ".join(_share(one, metric) for one in told for metric in METRICS) + " |")
    for scale in scales:
        cells = [own["scales"][scale]["recovered"][m]["recovery_vs_lora"] for own in found.values() for m in METRICS]
        lines.append(
            f"| recovery ({scale}) | " + " | ".join("-" if one is None else f"{one:.2f}" for one in cells) + " |"
        )
    return "\n".join(lines)


def _share(row: Mapping[str, Any], metric: str) -> str:
    low, high = row[f"{metric}_interval"]
    return f"{row[metric]:.3f} ({low:.3f}-{high:.3f})"


def _first(path: Path, num: int) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(num), strict=False)]


if __name__ == "__main__":
    main()
