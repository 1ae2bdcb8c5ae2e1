"""Draw the frontier: what an owner recovers against what is withheld from the client once it has tuned.

Run as: ``python benchmarks/quality/plot.py RESULTS.json docs/images/frontier.svg``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from table import after_tuning, is_reference

MARKS = {"ends": "o", "lora-ends": "s", "lora-all": "^", "lora-all-low": "<", "lora-attention": "v", "blocks-all": "D"}
COLOURS = {"width": "#2563a8", "drop": "#b3541e"}
LOWEST = -0.1
_LINE, _LETTER, _BESIDE = 0.045, 0.0185, 0.03  # a label's height in recovery, a letter's width in nats


def draw(result: dict[str, Any], out: Path) -> None:
    """Write the picture of all rows that are not references, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "offsite"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.8))
    shown = [row for row in result["rows"] if not is_reference(row["package"]) and row["recovery_vs_lora"] is not None]
    off = [row for row in shown if row["recovery_vs_lora"]["mean"] < LOWEST]
    labels: dict[str, tuple[float, float]] = {}
    marks: list[tuple[float, float]] = []
    for row in shown:
        recovered = row["recovery_vs_lora"]
        if row in off:
            continue
        axes.errorbar(
            _withheld(row, result),
            recovered["mean"],
            yerr=recovered["deviation"] or 0,
            fmt=MARKS[row["adapter"]],
            color=COLOURS[row["package"].split("-")[0]],
            markerfacecolor="white" if row["package"].endswith("free") else None,
            capsize=2,
        )
        marks.append((_withheld(row, result), recovered["mean"]))
        if recovered["mean"] > labels.get(row["package"], (0.0, LOWEST))[1]:
            labels[row["package"]] = marks[-1]
    for package, (right, up) in _apart(labels, marks).items():
        axes.annotate(package, labels[package], (right + _BESIDE, up), fontsize=7, va="center")
    beyond = [
        f"{row['package']} {row['recovery_vs_lora']['mean']:.2f} at {_withheld(row, result):.1f} nats" for row in off
    ]
    axes.text(0.99, 0.02, "\n".join(["not shown:", *beyond]) if beyond else "", transform=axes.transAxes, ha="right",
              fontsize=7, color="#555")  # fmt: skip
    axes.set_ylim(LOWEST, 1.05)
    axes.set_xlim(0, max(right for right, _ in labels.values()) + 0.6)
    for adapter, mark in MARKS.items():
        if any(row["adapter"] == adapter for row in shown if row not in off):
            axes.plot([], [], mark, color="#555", label=adapter)
    axes.axhline(1.0, color="#999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("withheld after tuning: ln(emulator-tuned / full zero-shot), nats per token; 0 gives all away")
    axes.set_ylabel("recovery against LoRA on the full model")
    axes.set_title("blue: width, brown: drop; hollow: training-free, filled: distilled", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def _withheld(row: dict[str, Any], result: dict[str, Any]) -> float:
    found = after_tuning(row, result)
    return 0.0 if found is None else float(found["mean"])


def _apart(points: dict[str, tuple[float, float]], marks: list[tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return where labels go: right of their points, and above or below where they would lie on something."""
    placed: dict[str, tuple[float, float]] = {}
    for package, (right, up) in points.items():
        heights = [up + _LINE * step for step in (0.0, 1.0, -1.0, 2.0, -2.0, 3.0)]
        free = [height for height in heights if not _covers(package, right, height, marks, placed)]
        placed[package] = (right, free[0] if free else up)
    return placed


def _covers(
    label: str, right: float, up: float, marks: list[tuple[float, float]], placed: dict[str, tuple[float, float]]
) -> bool:
    """Tell whether a label there lies on another point or on a label that is placed."""
    end = right + _BESIDE + _LETTER * len(label)
    if any(right < x < end and abs(y - up) < _LINE for x, y in marks):
        return True
    return any(
        x < end and right < x + _BESIDE + _LETTER * len(other) and abs(y - up) < _LINE
        for other, (x, y) in placed.items()
    )


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
