"""Print the table of a results file of ``run.py``: ``python benchmarks/serving/table.py RESULTS.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

LABELS = {
    "one-at-a-time": "one adapter plugged in, one request at a time",
    "one-tenant": "one batch, one adapter",
    "all-tenants": "one batch, an adapter each",
    "no-adapter": "one batch, no adapter",
}
TARGETS = {
    "together_over_one_at_a_time": ("a batch of an adapter each, over one request at a time", "at least 5"),
    "all_tenants_over_one_tenant": ("a batch of an adapter each, over one of one adapter", "at least 0.8"),
    "resident_over_model_and_adapters": ("resident set, over one model's and the adapters' bytes", "at most 1.15"),
}


def main() -> None:
    """Print both tables."""
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(arms(result), ratios(result), sep="\n\n")


def arms(result: Mapping[str, Any]) -> str:
    """Return tokens per second, processor seconds per token and memory of each arm."""
    lines = [
        "| arm | tokens/s | processor s per token | resident MB | adapters MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, label in LABELS.items():
        found = [one[arm] for one in result["rounds"]]
        shown = (
            f"{median(one['tokens_per_second'] for one in found):.1f}",
            f"{median(one['cpu_seconds'] / one['num_tokens'] for one in found):.3f}",
            f"{median(one['resident_bytes'] for one in found) / 1e6:.0f}",
            f"{found[0]['adapter_bytes'] / 1e6:.0f}",
        )
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def ratios(result: Mapping[str, Any]) -> str:
    """Return what the targets are about, by round."""
    lines = ["| ratio | median | rounds | target |", "| --- | --- | --- | --- |"]
    for name, (label, target) in TARGETS.items():
        found = result["ratios"][name]
        rounds = ", ".join(f"{one:.2f}" for one in found["rounds"])
        lines.append(f"| {label} | {found['median']:.2f} | {rounds} | {target} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
