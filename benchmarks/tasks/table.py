"""Print the tables of ``results/`` as Markdown: ``python benchmarks/tasks/table.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from offsite.baselines.table import read_baselines, spelled


def lines(path: Path) -> list[str]:
    found = read_baselines(path)
    head = f"**{found.task}**, {found.num_rows} rows, seed {found.seed}:"
    measures = list(found.rows[0].figures)
    table = [f"| model | asked | {' | '.join(measures)} |", f"| --- | --- |{' --- |' * len(measures)}"]
    for row in found.rows:
        figures = " | ".join(spelled(row.figures[measure]) for measure in measures)
        table.append(f"| {row.model} | {row.method} | {figures} |")
    return [head, "", *table, ""]


def shared(path: Path) -> list[str]:
    """Return what `shared.py` found, in a table of one line."""
    found = json.loads(path.read_text(encoding="utf-8"))
    seconds = found["median_seconds"]
    head = (
        f"**labels of {found['config']['task']}**, {found['config']['rows']} rows, {found['num_labels']} labels scored:"
    )
    columns = ["prompt tokens", "plain", "shared", "times faster", "largest difference"]
    mean = sum(found["prompt_tokens"]) / len(found["prompt_tokens"])
    cells = [f"{mean:.0f}", f"{seconds['plain']:.1f} s", f"{seconds['shared']:.1f} s", f"{found['ratio']:.1f}"]
    cells.append(f"{found['largest_difference_nats']:.1g} nats")
    rule = " --- |" * len(columns)
    return [head, "", f"| {' | '.join(columns)} |", f"|{rule}", f"| {' | '.join(cells)} |", ""]


def main() -> int:
    paths = sorted((Path(__file__).parent / "results").glob("*.json"))
    tables = [shared(path) if path.stem == "shared" else lines(path) for path in paths]
    print("\n".join(line for table in tables for line in table).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
