"""Print the tables of ``results/`` as Markdown: ``python benchmarks/tasks/table.py``."""

from __future__ import annotations

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


def main() -> int:
    paths = sorted((Path(__file__).parent / "results").glob("*.json"))
    print("\n".join(line for path in paths for line in lines(path)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
