"""How far a rehearsal's advice carries: its learning rate and share against those that a client ends up with alone.

Run as: ``python benchmarks/quality/rehearsed.py --jobs medquad.json --rehearsals FOLDER --out rehearsed.json``, where
FOLDER holds ``PACKAGE.TEXT.json`` files that ``offsite rehearse`` wrote for packages of the quality benchmark. Nothing
is run here: what plugging in at the advised pair gives stands in the benchmark's jobs, which know of no rehearsal.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from table import shown, spread

from benchmarks.record import environment
from offsite.evaluation.figures import recovery

ADAPTER = "lora-all"
SEED = 0


def main() -> None:
    """Write the comparison and print its table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--jobs", type=Path, required=True, help="results of benchmarks/quality/run.py")
    options.add_argument("--rehearsals", type=Path, required=True, help="folder of rehearsals, as PACKAGE.TEXT.json")
    options.add_argument("--out", type=Path, required=True, help="JSON to write")
    given = options.parse_args()
    results = json.loads(given.jobs.read_text(encoding="utf-8"))
    rows = []
    for path in sorted(given.rehearsals.glob("*.json")):
        package, text = path.stem.split(".")
        rows.append(compare(results, package, text, json.loads(path.read_text(encoding="utf-8"))))
    result = {"benchmark": "quality/rehearsed", **environment(), "adapter": ADAPTER, "seed": SEED, "rows": rows}
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(write_table(rows))


def compare(results: dict[str, Any], package: str, text: str, rehearsal: dict[str, Any]) -> dict[str, Any]:
    """Return the full model's perplexities at three pairs, over seeds: the client's, the advised, the best tried.

    The client's rate is the one with the lowest validation loss with the first seed; it is plugged in whole.
    """
    tried: dict[tuple[float, float], list[float]] = {}
    losses = {}
    for job in results["jobs"]:
        if job.get("arm") not in (f"{package}/{ADAPTER}", f"{package}/{ADAPTER}-low"):
            continue
        if job["seed"] == SEED:
            losses[job["rate"]] = job["found"]["validation_loss"]
        scaled = {float(scale): found for scale, found in job["found"].get("plugged_in_scaled", {}).items()}
        for scale, found in {1.0: job["found"]["plugged_in"], **scaled}.items():
            tried.setdefault((job["rate"], scale), []).append(found)
    advised = min(rehearsal["trials"], key=lambda trial: trial["plugged_in"])
    pairs = {
        "client_alone": (min(losses, key=lambda rate: losses[rate]), 1.0),
        "advised": (advised["learning_rate"], advised["scale"]),
        "best_tried": min(tried, key=lambda pair: mean(tried[pair])),
    }
    missing = [name for name, pair in pairs.items() if pair not in tried]
    if missing:
        raise SystemExit(f"{package}: {missing[0]} is rate and share {pairs[missing[0]]}, which no job has measured")
    if rehearsal["package_digest"] != results["packages"][package]["package_digest"]:
        raise SystemExit(f"{package}: the rehearsal is of another package than the jobs'")
    zero_shot, lora = results["zero_shot"], results["references"]["lora_full"]
    return {
        "package": package,
        "text": text,
        **{
            name: {
                "rate": rate,
                "scale": scale,
                "plugged_in": spread(tried[rate, scale]),
                "recovery_vs_lora": spread([recovery(found, zero_shot, lora) for found in tried[rate, scale]]),
            }
            for name, (rate, scale) in pairs.items()
        },
        "rehearsal": {key: rehearsal[key] for key in ("zero_shot", "emulator_zero_shot", "trials", "command")},
    }


def write_table(rows: list[dict[str, Any]]) -> str:
    """Return one Markdown table."""
    lines = [
        "| package | rehearsed on | the client alone | advised | best of all tried |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            f"{row[name]['scale']:g} of rate {row[name]['rate']:g}: {shown(row[name]['plugged_in'])}, "
            f"{shown(row[name]['recovery_vs_lora'])} ({len(row[name]['plugged_in']['values'])} seeds)"
            for name in ("client_alone", "advised", "best_tried")
        ]
        lines.append(f"| {row['package']} | {row['text']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
