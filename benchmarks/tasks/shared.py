"""How much faster labels are scored when their prompt is read once, and whether the scores stay.

Run as: ``python benchmarks/tasks/shared.py --model MODEL --rows 8 --shots 4 -o JSON``. The held-out rows of
``examples/tasks/intents`` are asked in-context; every label of every row is scored in the plain way and behind a shared
prompt, one after the other in one process, on the same rows, as often as ``--times`` says.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.record import environment, files, write
from offsite.baselines import answering
from offsite.baselines.answering import Answerer
from offsite.baselines.asking import Asker
from offsite.evaluation.preferences import log_probabilities
from offsite.modelling.load import load_model, load_tokenizer
from offsite.tasks.read import read_task
from offsite.tasks.rows import read_task_rows, without

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tasks" / "intents"


def main() -> None:
    """Score both ways and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    made_by = environment()  # before anything else in the tree changes
    task = read_task(FOLDER / "task.yaml")
    data = FOLDER / "heldout.jsonl.gz"
    rows = without(read_task_rows([data], task), (sample.vars for sample in task.samples))[: given.rows]
    model, tokenizer = load_model(given.model, dtype="float32"), load_tokenizer(given.model)
    asker = Asker(Answerer(model, tokenizer, task), "in-context", shots=given.shots)
    calls: list[tuple[list, dict]] = []
    logs: dict[str, list[list[float]]] = {}
    took: dict[str, list[float]] = {"plain": [], "shared": []}
    said: dict[str, list[str]] = {}
    ways = {"plain": _plainly, "shared": answering.log_probabilities_behind}

    def kept(name: str):
        def call(model, groups, **how):
            calls.append((groups, how))
            logs[name] = ways[name](model, groups, **how)
            return logs[name]

        return call

    shared = answering.log_probabilities_behind
    for _ in range(given.times):
        for name in ways:
            answering.log_probabilities_behind = kept(name)
            began = time.monotonic()
            said[name] = [one.text for one in asker.ask(rows)]
            took[name].append(round(time.monotonic() - began, 3))
    answering.log_probabilities_behind = shared
    pairs = [
        (a, b) for one, two in zip(logs["plain"], logs["shared"], strict=True) for a, b in zip(one, two, strict=True)
    ]
    groups = calls[-1][0]
    middle = {name: statistics.median(several) for name, several in took.items()}
    result = {
        "benchmark": "tasks-shared", **made_by,
        "config": {"model": Path(given.model).name, "task": task.name, "method": "in-context", "rows": len(rows),
                   "shots": given.shots, "times": given.times, "precision": "fp32", "batch_size": 8},
        "data": files(heldout=data), "threads": torch.get_num_threads(), "num_labels": sum(map(len, groups)),
        "prompt_tokens": [min(len(row.labels) - row.num_loss_tokens for row in group) for group in groups],
        "seconds": took, "median_seconds": middle, "ratio": round(middle["plain"] / middle["shared"], 2),
        "largest_difference_nats": max(abs(a - b) for a, b in pairs), "same_answers": said["plain"] == said["shared"],
    }  # fmt: skip
    write(given.out, result)
    print(result["median_seconds"], result["ratio"], result["largest_difference_nats"], result["same_answers"])


def _plainly(model, groups, **how):
    """Every answer behind the whole prompt, as a model is asked that keeps another cache."""
    logs = iter(log_probabilities(model, [row for group in groups for row in group], **how))
    return [[next(logs) for _ in group] for group in groups]


if __name__ == "__main__":
    main()
