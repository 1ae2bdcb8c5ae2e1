"""From finished jobs to rows, and from rows to the table that docs show."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from offsite.evaluation.figures import gap, recovery, recovery_nats, withheld

REFERENCES = {"lora_full": "keep-all/lora-all", "ceiling": "keep-all/ends", "full": "keep-all/blocks-all"}


def summarise_jobs(plan: dict[str, Any], jobs: list[dict[str, Any]], arms: list[dict[str, Any]]) -> dict[str, Any]:
    """Return zero-shot, packages, and per arm the figures at its best rate, seed by seed."""
    by_key = {job["key"]: job for job in jobs}
    zero = by_key["zero_shot"]["found"]["perplexity"]
    packages = {job["package"]: job["found"] for job in jobs if job["kind"] == "package"}
    chosen = {arm["name"]: _at_best_rate(arm, jobs, plan["seeds"]) for arm in arms}
    references = {
        name: mean(job["found"]["plugged_in"] for job in chosen[arm]) if chosen.get(arm) else None
        for name, arm in REFERENCES.items()
    }
    rows = []
    for arm in arms:
        found = chosen[arm["name"]]
        if not found or arm["package"] not in packages:
            continue
        package = packages[arm["package"]]
        tuned = [job["found"]["emulator_tuned"] for job in found]
        plugged = [job["found"]["plugged_in"] for job in found]
        row: dict[str, Any] = {
            "arm": arm["name"],
            "package": arm["package"],
            "adapter": arm["adapter_name"],
            "rate": found[0]["rate"],
            "seeds": [job["seed"] for job in found],
            "emulator_parameters": package["emulator_parameters"],
            "share": package["emulator_parameters"] / package["middle_parameters"],
            "distilled_tokens": package["tokens"],
            "package_bytes": package["package_bytes"],
            "adapter_bytes": found[0]["found"]["adapter_bytes"],
            "emulator_zero_shot": package["perplexity"],
            "capability": withheld(package["perplexity"], zero),
            "emulator_tuned": spread(tuned),
            "plugged_in": spread(plugged),
            "gap": spread([gap(a, b) for a, b in zip(tuned, plugged, strict=True)]),
        }
        for name, reference in references.items():
            label = {"lora_full": "recovery_vs_lora", "ceiling": "recovery_vs_ceiling", "full": "recovery_vs_full"}[
                name
            ]
            row[label] = spread([recovery(value, zero, reference) for value in plugged])
        rows.append(row)
    return {"zero_shot": zero, "references": references, "packages": packages, "rows": rows}


def after_tuning(row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any] | None:
    """Return what is withheld after tuning, in nats per token, of a row of finished jobs, seed by seed."""
    return spread([withheld(value, result["zero_shot"]) for value in row["emulator_tuned"]["values"]])


def in_nats(row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any] | None:
    """Return the recovery against LoRA on the full model of a row's log perplexities, seed by seed."""
    reference = result["references"]["lora_full"]
    return spread([recovery_nats(value, result["zero_shot"], reference) for value in row["plugged_in"]["values"]])


def is_reference(package: str) -> bool:
    """Tell whether the package keeps every block, so that its client is the owner itself."""
    return package.startswith("keep-all")


def write_table(result: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    head = (
        "package | of the middle | emulator zero-shot | adapter | rate | seeds | emulator-tuned | plugged in | vs LoRA "
        "| recovery in nats | vs ceiling | vs full | gap | withheld after tuning | withheld zero-shot | adapter MB"
    )
    lines = [f"| {head} |", "|" + " --- |" * head.count("|") + " --- |"]
    for row in result["rows"]:
        reference = is_reference(row["package"])
        cells = [
            row["package"],
            f"{row['share']:.0%}",
            "-" if reference else f"{row['emulator_zero_shot']:.1f}",
            row["adapter"],
            f"{row['rate']:g}",
            str(len(row["seeds"])),
            "-" if reference else shown(row["emulator_tuned"]),
            shown(row["plugged_in"]),
            shown(row["recovery_vs_lora"], 2),
            shown(in_nats(row, result), 2),
            shown(row["recovery_vs_ceiling"], 2),
            shown(row["recovery_vs_full"], 2),
            "-" if reference else shown(row["gap"], 2),
            "-" if reference else shown(after_tuning(row, result), 2),
            "-" if reference else f"{row['capability']:.2f}",
            f"{row['adapter_bytes'] / 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return f"zero-shot {result['zero_shot']:.2f}\n\n" + "\n".join(lines)


def write_shares(result: dict[str, Any]) -> str:
    """Return, for rows whose jobs all tried shares of the update, what each share gives, as a Markdown table."""
    shares = ("1", "0.75", "0.5")
    head = " | ".join(f"{share} of the update, vs LoRA" for share in shares)
    lines = [f"| package | adapter | rate | seeds | {head} |", "| --- " * (4 + len(shares)) + "|"]
    zero, lora = result["zero_shot"], result["references"]["lora_full"]
    for row in result["rows"]:
        jobs = [job for job in result["jobs"] if job.get("arm") == row["arm"] and job["rate"] == row["rate"]]
        tried = [{"1": job["found"]["plugged_in"], **job["found"].get("plugged_in_scaled", {})} for job in jobs]
        if is_reference(row["package"]) or not all(set(shares) <= set(found) for found in tried):
            continue
        cells = []
        for share in shares:
            values = [found[share] for found in tried]
            cells.append(f"{shown(spread(values))}, {shown(spread([recovery(v, zero, lora) for v in values]))}")
        lines.append(f"| {row['package']} | {row['adapter']} | {row['rate']:g} | {len(jobs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _at_best_rate(arm: dict[str, Any], jobs: list[dict[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
    mine = [job for job in jobs if job.get("arm") == arm["name"]]
    first = [job for job in mine if job["seed"] == seeds[0]]
    if not first:
        return []
    rate = min(first, key=lambda job: job["found"]["validation_loss"])["rate"]
    return sorted((job for job in mine if job["rate"] == rate), key=lambda job: job["seed"])


def spread(values: list[Any]) -> dict[str, Any] | None:
    """Return mean, sample deviation and values of those that are known; None when none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": mean(known), "deviation": stdev(known) if len(known) > 1 else None, "values": known}


def shown(found: dict[str, Any] | None, digits: int = 2) -> str:
    """Return what a table says of them."""
    if found is None:
        return "-"
    deviation = f" ± {found['deviation']:.{digits}f}" if found["deviation"] is not None else ""
    return f"{found['mean']:.{digits}f}{deviation}"


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(write_table(measured), write_shares(measured), sep="\n\n")
