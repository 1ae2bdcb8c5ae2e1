"""One emulator on other text than the one it was chosen by: WikiText-2, and three sets of multiple-choice questions.

Run as: ``python benchmarks/quality/elsewhere.py --config benchmarks/quality/elsewhere.yaml --data D --work W --out F``.
The package and a reference that keeps every block are made once; for each set a client tunes on its training rows, on
either, and the owner evaluates: `offsite distill`, `tune` and `evaluate` as processes of their own. Steps that are done
are not run again; ``--only piqa,arc_easy`` works on some sets.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from benchmarks.record import arguments, environment, files, write
from offsite.digests import sha256_file
from offsite.evaluation.results import read_results
from offsite.stages import Stage, play


def main() -> None:
    """Run what is not done and write the results of all sets that are."""
    given, plan, wanted = arguments(__doc__, only="sets to work on, by comma")
    bench = Bench(plan, given.data.resolve(), given.work)
    for name in plan["sets"]:
        if not wanted or name in wanted:
            bench.run(name)
    done = {name: bench.found(name) for name in plan["sets"] if (bench.work / name / "results").is_dir()}
    read = {
        f"{name}_{role}": given.data / own[role] for name, own in plan["sets"].items() for role in own if role != "rate"
    }
    result = {
        "benchmark": "quality/elsewhere", **environment(), "config": plan, "sets": done,
        "data": files(public=given.data / plan["public"], **read),
    }  # fmt: skip
    write(given.out, result)
    print(write_table(done))


class Bench:
    """The package, the reference that keeps every block, and the sets."""

    def __init__(self, plan: dict[str, Any], data: Path, work: Path) -> None:
        self.plan, self.data, self.work = plan, data, work
        self._seed = ["--seed", str(plan["seed"])]

    def run(self, name: str) -> None:
        """The set's results stand in its folder."""
        plan, own, folder = self.plan, self.plan["sets"][name], self.work / name
        folder.mkdir(exist_ok=True)
        made, kept = self._packages()
        client, heldout = self.data / own["client"], self._heldout(name)
        tuned = []
        for package, bundle in ((made, "bundle"), (kept, "reference")):
            words = ["tune", str(package.leaves), "--data", str(client), "-o", bundle, *plan["tune"], *self._seed]
            words += ["--learning-rate", str(own["rate"])]
            inputs = {"package": package.outcome["package_digest"], "client": sha256_file(client)}
            tuned.append(Stage(bundle, folder, words, folder / bundle, inputs))
            play([tuned[-1]], folder / "notes")
        words = ["evaluate", plan["model"], "--package", str(made.leaves), "--bundle", f"{plan['seed']}=bundle"]
        words += ["--reference", "lora_full=reference", "--reference-package", str(kept.leaves), "--data", str(heldout)]
        words += [*plan["evaluate"], "-o", "results"]
        inputs = {stage.name: stage.outcome["bundle_digest"] for stage in tuned} | {"heldout": sha256_file(heldout)}
        if "questions" in own:
            task = folder / f"{name}.jsonl"
            task.write_text("".join(json.dumps(row) + "\n" for row in self._questions(name)))
            words += ["--task", task.name, "--task-limit", str(plan["task_rows"])]
            inputs["questions"] = sha256_file(task)
        play([Stage("evaluate", folder, words, folder / "results", inputs)], folder / "notes")

    def found(self, name: str) -> dict[str, Any]:
        """Return what was measured of the set: figures by row, and the metrics over them."""
        results = read_results(self.work / name / "results")
        return {
            "rows": {row: own.model_dump() for row, own in results.rows.items()},
            "metrics": _means(results.metrics),
            "task_metrics": {
                task: {metric: _means(compared) for metric, compared in by_metric.items()}
                for task, by_metric in results.task_metrics.items()
            },
            "task_rows": results.tasks,
            "num_tokens": results.data.num_tokens,
        }

    def _packages(self) -> tuple[Stage, Stage]:
        plan, public = self.plan, self.data / self.plan["public"]
        words = ["distill", plan["model"], "--public", str(public), *plan["distill"], "-o", "package", *self._seed]
        made = Stage("package", self.work, words, self.work / "package", {"public": sha256_file(public)})
        words = ["distill", plan["model"], "--method", "keep-all", "--steps", "0", "-o", "keep-all"]
        kept = Stage("keep-all", self.work, words, self.work / "keep-all")
        for stage in (made, kept):
            play([stage], self.work / "notes")
        return made, kept

    def _questions(self, name: str) -> list[dict[str, Any]]:
        with gzip.open(self.data / self.plan["sets"][name]["questions"], "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def _heldout(self, name: str) -> Path:
        """Return the text that perplexity is taken of: for questions, the right answers, written as in training."""
        own = self.plan["sets"][name]
        if "heldout" in own:
            return self.data / str(own["heldout"])
        path = self.work / name / "heldout.jsonl"
        rows = (
            {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['choices'][row['answer']]}"}
            for row in self._questions(name)
        )
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path


def write_table(sets: dict[str, Any]) -> str:
    """Return one Markdown table: for each set perplexity, and accuracy where it is questions."""
    shown = ("zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in", "lora_full")
    lines = [
        f"| set | figure | {' | '.join(name.replace('_', ' ') for name in shown)} | recovery vs LoRA |",
        f"| --- | --- |{' --- |' * (len(shown) + 1)}",
    ]
    for name, found in sets.items():
        rows = found["rows"]
        cells = [f"{rows[row]['perplexity']['mean']:.2f}" for row in shown]
        lines.append(f"| {name} | perplexity | {' | '.join(cells)} | {_two(found['metrics']['recovery_vs_lora'])} |")
        for task, by_metric in found["task_metrics"].items():
            for metric, compared in by_metric.items():
                cells = [f"{rows[row]['tasks'][task][metric]['mean']:.3f}" for row in shown]
                lines.append(f"| {name} | {metric} | {' | '.join(cells)} | {_two(compared['recovery_vs_lora'])} |")
    return "\n".join(lines)


def _means(compared: dict[str, Any]) -> dict[str, float | None]:
    return {name: summary.mean if summary else None for name, summary in compared.items()}


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
