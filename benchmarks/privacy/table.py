"""Print the tables of ``benchmarks/privacy``: ``python benchmarks/privacy/table.py RESULTS.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def arms_table(result: dict[str, Any]) -> str:
    """Return quality and audit of every arm of ``run.py``."""
    evaluation = result["evaluation"]
    rows = []
    for name, arm in result["arms"].items():
        audit = arm["audit"]
        best = max(audit["membership"], key=lambda one: one["auc"]["value"])
        canaries = audit["canaries"]
        bound, exposure, claim = canaries["bound"], canaries["exposure"], audit["run"]["claim"]
        cost = arm["cost"]["tune"]
        rows.append(
            [
                "none" if claim is None else f"{claim['epsilon']:.2f}",
                "-" if claim is None else f"{claim['noise_multiplier']:.3f}",
                f"{evaluation['emulator_tuned']['values'][name]:.2f}",
                f"{evaluation['plugged_in']['values'][name]:.2f}",
                f"{_interval(best['auc'])} ({best['signal']})",
                "-" if best["tpr_at_1"] is None else _interval(best["tpr_at_1"], percent=True),
                f"{bound['epsilon']:.2f} of {bound['ceiling']:.2f}" if bound else "-",
                f"{sum(exposure['bits']) / max(1, len(exposure['bits'])):.1f} of {exposure['most_bits']:.0f}",
                f"{exposure['num_extracted_greedy']}/{exposure['num_secrets']}",
                f"{cost['cpu_seconds']:.0f}",
                f"{cost['peak_bytes'] / 1e9:.1f}",
            ]
        )
    zero_shot = evaluation["zero_shot"]["mean"], evaluation["emulator_zero_shot"]["mean"]
    head = ["epsilon", "noise", "emulator-tuned", "plugged in", "best attack's area", "hits at 1%"]
    head += ["epsilon shown, of at most", "exposure, bits", "secrets read out", "CPU s", "peak GB"]
    return f"zero-shot {zero_shot[0]:.2f}, emulator zero-shot {zero_shot[1]:.2f}\n\n" + _markdown(head, rows)


def _interval(found: dict[str, float], *, percent: bool = False) -> str:
    value, low, high = (found[key] * (100 if percent else 1) for key in ("value", "low", "high"))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]" if percent else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    print(arms_table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
