"""Draw the frontier: what an owner recovers against the capability given away.

Run as: ``python benchmarks/quality/plot.py RESULTS.json docs/images/frontier.svg``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MARKS = {"ends": "o", "lora-ends": "s", "lora-all": "^", "lora-all-low": "<", "lora-attention": "v", "blocks-all": "D"}
COLOURS = {"width": "#2563a8", "drop": "#b3541e"}


def draw(result: dict[str, Any], out: Path) -> None:
    """Write the picture of all rows that are not references, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "offsite"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.4))
    for row in result["rows"]:
        if row["package"] == "keep-all" or row["recovery_vs_lora"] is None:
            continue
        recovered = row["recovery_vs_lora"]
        axes.errorbar(
            row["capability"],
            recovered["mean"],
            yerr=recovered["deviation"] or 0,
            fmt=MARKS[row["adapter"]],
            color=COLOURS[row["package"].split("-")[0]],
            markerfacecolor="white" if row["package"].endswith("free") else None,
            capsize=2,
        )
        beside = (6, -8) if row["adapter"] in {"ends", "lora-all-low"} else (6, 4)
        axes.annotate(
            row["package"], (row["capability"], recovered["mean"]), beside, textcoords="offset points", fontsize=7
        )
    for adapter, mark in MARKS.items():
        if any(row["adapter"] == adapter and row["package"] != "keep-all" for row in result["rows"]):
            axes.plot([], [], mark, color="#555", label=adapter)
    axes.axhline(1.0, color="#999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("capability withheld: ln(emulator zero-shot / full zero-shot), nats per token; 0 gives all away")
    axes.set_ylabel("recovery against LoRA on the full model")
    axes.set_title("blue: width, brown: drop; hollow: training-free, filled: distilled", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
