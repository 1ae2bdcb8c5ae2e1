"""The frontier's table and picture: recovery against what the client is left with, and how far from the line.

Run as: ``python benchmarks/frontier/table.py RESULTS.json [OUT.svg]``. The line is the prototypes': recovery = 0.82 -
0.36 ln(tuned / full zero-shot), which held six narrowed emulators, one run each, within 0.02.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from offsite.evaluation.figures import recovery, recovery_nats, withheld

LINE = (0.82, 0.36)


@dataclass(frozen=True)
class Point:
    """One row: the mean of some runs in emulator and full model, perplexities on the held-out answers."""

    arm: str
    runs: int
    first: int
    emulator: float
    tuned: float
    plugged: float
    share: str
    reference: float
    like: float | None
    zero_shot: float

    @property
    def recovery(self) -> float:
        """Against LoRA on the full model, one run (the mean of those that were made)."""
        return recovery(self.plugged, self.zero_shot, self.reference) or math.nan

    @property
    def like_for_like(self) -> float | None:
        """Against as many runs of LoRA on the full model, averaged too; None where those were not made."""
        return recovery(self.plugged, self.zero_shot, self.like)

    @property
    def nats(self) -> float:
        """Recovery of log perplexity."""
        return recovery_nats(self.plugged, self.zero_shot, self.reference) or math.nan

    @property
    def withheld(self) -> float:
        """Nats per token after tuning."""
        return withheld(self.tuned, self.zero_shot)

    @property
    def off_line(self) -> float:
        """How far above the prototypes' line, in recovery."""
        return self.recovery - (LINE[0] - LINE[1] * self.withheld)


def best(shares: Mapping[str, float]) -> tuple[str, float]:
    """Return the share with the lowest perplexity, and that."""
    share = min(shares, key=lambda one: shares[one])
    return share, shares[share]


def references(jobs: Iterable[Mapping[str, Any]], arm: str = "full") -> dict[int, float]:
    """Return the whole reference's perplexity by how many runs were averaged; of one run, the mean over seeds."""
    found: dict[int, list[float]] = {}
    for job in jobs:
        if job["kind"] == "mean" and job["arm"] == arm:
            found.setdefault(len(job["runs"]), []).append(job["found"]["plugged_in"]["1"])
    return {num: sum(values) / len(values) for num, values in found.items()}


def points(result: Mapping[str, Any]) -> list[Point]:
    """Return the rows in the order in which they were measured, references apart."""
    jobs = result["jobs"]
    zero_shot = next(job["found"]["perplexity"] for job in jobs if job["kind"] == "zero_shot")
    emulators = {job["package"]: job["found"]["perplexity"] for job in jobs if job["kind"] == "package"}
    short, long = references(jobs), references(jobs, "steps-160-full")
    found = []
    again = {
        arm["name"] for arm in result["config"]["arms"] if "ways" in arm
    }  # other ways of runs that have their rows
    for job in jobs:
        if job["arm"] in again:
            continue
        if job["kind"] != "mean" or "emulator_tuned" not in job["found"] or len(job["found"]["plugged_in"]) < 2:
            continue
        known = long if job["how"].get("steps", 40) == 160 else short
        if 1 not in known:
            continue
        tuned = job["found"]["emulator_tuned"]
        share, plugged = best(job["found"]["plugged_in"])
        packages = list(tuned)
        found.append(
            Point(
                arm=job["arm"],
                runs=len(job["runs"]),
                first=int(job["key"].rsplit("/", 1)[1].split("+")[0]),
                emulator=sum(emulators[name] for name in packages) / len(packages),
                tuned=min(tuned.values()),
                plugged=plugged,
                share=share,
                reference=known[1],
                like=known.get(len(job["runs"])),
                zero_shot=zero_shot,
            )
        )
    return found


def table(rows: Iterable[Point]) -> str:
    """Return one Markdown table."""
    lines = [
        "| arm | runs (first) | emulator zero-shot | emulator tuned | withheld after tuning | plugged in (share) "
        "| tuned / plugged | recovery | in nats | like for like | off the line |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        like = "-" if row.like_for_like is None else f"{row.like_for_like:.2f}"
        lines.append(
            f"| {row.arm} | {row.runs} ({row.first}) | {row.emulator:,.1f} | {row.tuned:.1f} | {row.withheld:.2f} "
            f"| {row.plugged:.2f} ({row.share}) | {row.tuned / row.plugged:.2f} | {row.recovery:.2f} | {row.nats:.2f} "
            f"| {like} | {row.off_line:+.2f} |"
        )
    return "\n".join(lines)


def other_ways(result: Mapping[str, Any]) -> str:
    """Return one Markdown table of the other ways to plug in, and of shares that were fitted."""
    lines = ["| runs | way | plugged in |", "| --- | --- | --- |"]
    for job in result["jobs"]:
        if job["kind"] == "ways":
            lines += [f"| {len(job['runs'])} | {way} | {one:.2f} |" for way, one in job["found"]["plugged_in"].items()]
        if job["kind"] == "fit":
            lines.append(f"| {len(job['runs'])} | fitted: {job['fit']['name']} | {job['found']['plugged_in']:.2f} |")
    return "\n".join(lines)


def draw(rows: Iterable[Point], out: Path) -> None:
    """Write the picture, as SVG: a circle is one run, a filled one a mean; red lies 0.03 or more above the line.

    Rows that plug in worse than the full model was are named below it: their distance would leave no room for others.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "offsite"
    import matplotlib.pyplot as plt

    rows = list(rows)
    below = [row for row in rows if row.recovery < 0]
    rows = [row for row in rows if row.recovery >= 0]
    figure, axes = plt.subplots(figsize=(7.2, 5.0))
    named: set[str] = set()
    for row in rows:
        colour = "#b3261e" if row.off_line >= 0.03 else "#2563a8"
        filled = colour if row.runs > 1 else "white"
        axes.plot(row.withheld, row.recovery, "o", color=colour, markerfacecolor=filled)
        name = row.arm if row.runs == 1 else f"{row.arm}, {row.runs} runs"
        if name not in named:  # seeds of an arm lie side by side
            named.add(name)
            left_below = {"xytext": (-4, -8), "horizontalalignment": "right"}
            beside = {"xytext": (4, 3)} if row.off_line >= 0.02 else left_below
            axes.annotate(name, (row.withheld, row.recovery), textcoords="offset points", fontsize=6, **beside)
    low, high = axes.get_xlim()
    axes.plot([low, high], [LINE[0] - LINE[1] * one for one in (low, high)], color="#555", linewidth=0.8)
    axes.set_xlim(low, high)
    axes.set_xlabel("withheld after tuning: ln(emulator tuned / full zero-shot), nats per token")
    axes.set_ylabel("recovery against one run of LoRA on the full model")
    axes.spines[["top", "right"]].set_visible(False)
    if below:
        told = ", ".join(f"{row.arm} ({row.recovery:.1f})" for row in below)
        axes.text(
            0, -0.15, f"worse than the full model as it was, not shown: {told}", transform=axes.transAxes, fontsize=6
        )
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    measured = points(results)
    print(table(measured), other_ways(results), sep="\n\n")
    if len(sys.argv) > 2:
        draw(measured, Path(sys.argv[2]))
