"""Whether the gate on epsilon catches runs that do not keep their claim, and lets those pass that do.

Of each kind - correct; without noise; without clipping and with a hundredth of the noise; each canary fifty times in
the text - so many seeds are trained and audited by `lab`, and held against the epsilon that a correct run would state.
Where the ceiling is not above the claim, no audit with so many canaries could fail the run.

Run as: ``OMP_NUM_THREADS=1 python benchmarks/privacy/power.py -o benchmarks/privacy/results/power.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.privacy.lab import Measured, Setting, Way, measure, planned
from benchmarks.record import environment

TRAINED: tuple[tuple[Way, float], ...] = (
    ("correct", 2.0),
    ("correct", 8.0),
    ("no noise", 2.0),
    ("no clip", 2.0),
    ("repeated", 2.0),
    ("repeated", 8.0),
)
CLAIMS = (2.0, 8.0)


def main() -> None:
    """Train and audit every kind of run, and write how many of each the gate failed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=20, help="runs of each kind")
    options.add_argument("-o", "--out", type=Path, required=True)
    given = options.parse_args()
    torch.set_num_threads(1)
    began, setting = time.monotonic(), Setting()
    rows = []
    for way, epsilon in TRAINED:
        guarantee = planned(setting, way, epsilon)
        found = []
        for seed in range(given.seeds):
            found.append(measure(way, guarantee, seed, setting))
            print(f"{way}, epsilon {epsilon:g}: {seed + 1}/{given.seeds}", file=sys.stderr, flush=True)
        depends = way in ("correct", "repeated")  # their noise is the claim's
        rows += [_row(found, setting, claim, guarantee) for claim in ((epsilon,) if depends else CLAIMS)]
    result = {
        **environment(),
        "config": {"seeds": given.seeds, "setting": asdict(setting)},
        "rows": rows,
        "seconds": round(time.monotonic() - began, 1),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(json.dumps({f"{row['way']}, claims {row['claimed']:g}": row["share_failed"] for row in rows}))


def _row(found: Sequence[Measured], setting: Setting, claim: float, made: Any) -> dict[str, Any]:
    way = found[0].way
    verdicts = [one.gate(planned(setting, way, claim)).verdict for one in found]
    bounds = [one.canaries.bound for one in found]
    shown = [bound.epsilon for bound in bounds if bound is not None]
    areas = {
        signal: statistics.median(
            attack.auc.value for one in found for attack in one.canaries.membership if attack.signal == signal
        )
        for signal in ("loss", "reference")
    }
    ceiling = min(bound.ceiling for bound in bounds if bound is not None)
    return {
        "way": way,
        "claimed": claim,
        "runs": len(found),
        "failed": verdicts.count("failed"),
        "share_failed": verdicts.count("failed") / len(found),
        "could_fail": ceiling > claim,
        "ceiling": ceiling,
        "bound": {"least": min(shown), "median": statistics.median(shown), "most": max(shown)},
        "bounds": shown,
        "median_auc": areas,
        "noise_multiplier_claimed": made.mechanism.sigma,
        "sample_rate": made.mechanism.rate,
        "num_units": found[0].num_units,
    }


if __name__ == "__main__":
    main()
