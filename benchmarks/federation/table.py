"""Print the tables of a results file of ``run.py``: ``python benchmarks/federation/table.py RESULTS.json``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LABELS = {
    "pooled": "all text in one place",
    "shared": "one shared adapter",
    "faster": "one shared adapter, server's rate {server_learning_rate:g}",
    "personal": "personal adapters",
    "local": "each alone, one run",
}
POISONS = {
    "clean": "none",
    "nan": "NaN",
    "scaled": "an update times {scale:g}",
    "labels": "learnt from shuffled answers",
}


def main() -> None:
    """Print every table that the file has figures for."""
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for table in (quality(result), bytes_each_way(result), time(result), poisoned(result)):
        if table:
            print(table, end="\n\n")


def quality(result: Mapping[str, Any]) -> str:
    """Return perplexity by client and over all, of every arm without a poisoned client."""
    arms = {name: result["arms"][name] for name in LABELS if name in result["arms"]}
    if not arms:
        return ""
    clients = sorted(result["config"]["sources"])
    zero_shot = next(iter(arms.values()))["zero_shot"]
    rows = [
        ["zero-shot", zero_shot],
        *([label(name, result), own(arm["plugged_in"], clients)] for name, arm in arms.items()),
    ]
    lines = [[name, *(f"{found[one]:.2f}" for one in clients), f"{mean(found, clients):.2f}"] for name, found in rows]
    return markdown(["plugged in", *clients, "geometric mean"], lines)


def label(arm: str, result: Mapping[str, Any]) -> str:
    """Return what the arm is called, with its settings."""
    return LABELS[arm].format(**result["config"])


def own(found: Mapping[str, float], clients: Iterable[str]) -> dict[str, float]:
    """Return each client's figure on its own text: of the one adapter, or of its own where each has one."""
    return {name: found[name] if name in found else found[f"{name} by {name}"] for name in clients}


def bytes_each_way(result: Mapping[str, Any]) -> str:
    """Return megabytes each way by round, for the arms of several rounds."""
    lines = [
        [f"{label(name, result)}: {way}", *(f"{size / 1e6:.2f}" for size in sizes)]
        for name, arm in result["arms"].items()
        if name in ("shared", "faster", "personal")
        for way, sizes in (("to a client", arm["bytes"]["to_client"]), ("from a client", arm["bytes"]["from_client"]))
    ]
    return markdown(["MB", *(f"round {n}" for n in range(1, result["config"]["rounds"] + 1))], lines) if lines else ""


def time(result: Mapping[str, Any]) -> str:
    """Return what share of an arm's time was what; the rest is making rounds, putting together and evaluating."""
    lines = []
    for name in LABELS:
        if name in result["arms"]:
            arm = result["arms"][name]
            shares = [seconds / arm["seconds"] for seconds in arm["seconds_by_part"].values()]
            lines.append([label(name, result), *(f"{share:.1%}" for share in (*shares, 1 - sum(shares)))])
    parts = next(iter(result["arms"].values()))["seconds_by_part"] if lines else {}
    return markdown(["share of the time", *parts, "the rest"], lines) if lines else ""


def poisoned(result: Mapping[str, Any]) -> str:
    """Return what two rounds with one bad client come to for the others, by rule, and whether it was used."""
    plan = result["config"]["poison"]
    others = sorted(set(result["config"]["sources"]) - {plan["client"]})
    lines = []
    for way, label in POISONS.items():
        arms = [result["arms"].get(f"{way}-{rule}") for rule in ("mean", "robust")]
        if any(arms):
            cells = [cell for arm in arms for cell in (_cells(arm, others, plan["client"]) if arm else ["", ""])]
            lines.append([label.format(**plan), *cells])
    rule = plan["robust"]["rule"]
    head = ["the bad client hands in", "mean", "bad client's answers", rule, "bad client's answers"]
    return markdown(head, lines) if lines else ""


def _cells(arm: Mapping[str, Any], others: Iterable[str], bad: str) -> list[str]:
    answers = [
        "used" if bad in one["used"] else f"left out ({one['left_out'].get(bad, 'by the rule').split(':')[0]})"
        for one in arm["rounds"]
    ]
    told = answers[0] if len(set(answers)) == 1 else ", ".join(answers)
    flags = sum(bad in one.get("flags", {}) for one in arm["rounds"])
    return [f"{mean(arm['plugged_in'], others):.2f}", told + (f", flagged in {flags}" if flags else "")]


def mean(found: Mapping[str, float], names: Iterable[str]) -> float:
    """Return the geometric mean of these perplexities; inf when one is not finite."""
    logs = [math.log(found[name]) for name in names]
    return math.exp(min(sum(logs) / len(logs), 700.0))


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
