"""How much of a model somebody regains who has a package of it and public text, and nothing else.

Run as: ``python benchmarks/privacy/recovery.py --data FOLDER --work FOLDER --out RESULT.json``. Two training-free
packages of about equal bytes, one that drops blocks and one that narrows MLPs, are made, measured and attacked. Killed,
it goes on with the attack it was at; the result is written anew after each.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.record import environment, files
from emulator.audit.audit import run as audit
from emulator.audit.capability import held_out
from emulator.audit.config import AuditPackageConfig
from emulator.audit.heal import LORA
from emulator.audit.recovery import Attacker, Knowledge, Losses, Setting
from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run as distill
from emulator.distillation.public import prepare
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import open_package
from offsite.audits.record import read_audit
from offsite.errors import RunFailed
from offsite.text.records import read_records

CONFIG: dict[str, Any] = {
    "packages": {"drop": {"method": "drop", "blocks": 13}, "width": {"method": "width", "width": 0.33}},
    "calibration_tokens": 8192,
    "heldout_tokens": 4096,
    "block_tokens": 256,
    "batch_size": 4,
    "lora": {"rank": LORA.rank, "alpha": LORA.alpha},
    "holdout": 0.05,
    "validation_tokens": 4096,
    "seed": 0,
    "precision": "fp32",
    "threads": 1,
    "arms": [
        {"attack": "as_is_all", "marks": [25_000], "rates": [3e-4, 1e-3]},
        {"attack": "as_is_all", "marks": [25_000, 50_000], "rates": [3e-4, 1e-3]},
        {"attack": "refill_all", "marks": [50_000], "rates": [1e-3]},
        {"attack": "as_is_lora", "marks": [50_000], "rates": [8e-3]},
        {"attack": "as_is_all", "marks": [25_000, 50_000, 150_000], "rates": [3e-4, 1e-3], "best_at": 50_000},
    ],
}
"""Arms in the order in which they are worth running: a longer one takes up what the shorter one found.

With `best_at` the attacker takes the one rate that did best on its public text when it spent that many tokens.
"""


def main() -> None:
    """Run what is not done and write the results."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder that benchmarks/data/prepare.py --full wrote")
    options.add_argument("--work", type=Path, required=True, help="folder for packages, audits and finished runs")
    options.add_argument("--out", type=Path, required=True, help="results JSON to write")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--limit-seconds", type=float, default=0, help="begin no arm after this long; 0 for no limit")
    given = options.parse_args()
    torch.set_num_threads(CONFIG["threads"])
    began = time.monotonic()
    paths = {"public": given.data / "public_web.jsonl.gz", "heldout": _root() / "offsite" / "data" / "heldout.jsonl.gz"}
    found = {name: _measured(name, given, paths) for name in CONFIG["packages"]}
    attackers = {name: _attacker(name, given, paths, found[name]) for name in found}
    curves: dict[str, dict[str, Any]] = {name: {} for name in found}
    for arm in CONFIG["arms"]:
        for name, attacker in attackers.items():
            if given.limit_seconds and time.monotonic() - began > given.limit_seconds:
                continue
            heal = arm["attack"].rpartition("_")[2]
            rates = _rates(given.work / f"{name}-attacks", arm)
            attacker.setting = replace(attacker.setting, marks=arm["marks"], rates={heal: rates})
            for one in attacker.attack([arm["attack"]]):
                if len(one.points) >= len(curves[name].get(one.attack, {}).get("points", ())):
                    curves[name][one.attack] = one.model_dump(mode="json")
            _write(given, paths, found, curves, time.monotonic() - began)


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def _measured(name: str, given: argparse.Namespace, paths: dict[str, Path]) -> dict[str, Any]:
    """Return the figures of the package called `name`, which is made and measured unless it was."""
    package, out = given.work / name, given.work / f"{name}-audit"
    if not package.is_dir():
        settings = {"bottom": 2, "top": 2, "steps": 0, "public": paths["public"], **CONFIG["packages"][name]}
        settings["calibration_tokens"] = CONFIG["calibration_tokens"]
        distill(DistillConfig(model=given.model, output=package, **settings))
    if not out.is_dir():
        audit(
            AuditPackageConfig(
                package=package,
                output=out,
                model=given.model,
                heldout=paths["heldout"],
                block_tokens=CONFIG["block_tokens"],
                limit_tokens=CONFIG["heldout_tokens"],
                public=paths["public"],
                recovery_tokens=(0,),
                attack=("as_is_all",),
                device="cpu",
            )
        )
    stated, _ = read_audit(out)
    return {"bytes": open_package(package).num_bytes, **stated.model_dump(mode="json", exclude={"recovery"})}


def _attacker(name: str, given: argparse.Namespace, paths: dict[str, Path], found: dict[str, Any]) -> Attacker:
    package = open_package(given.work / name)
    tokenizer = package.load_tokenizer()
    text = prepare(
        read_records(paths["public"]),
        tokenizer,
        package.load_model(),
        block_tokens=CONFIG["block_tokens"],
        batch_size=CONFIG["batch_size"],
        seed=CONFIG["seed"],
        holdout=CONFIG["holdout"],
        evaluation_tokens=CONFIG["validation_tokens"],
        calibration_tokens=1,
    )
    setting = Setting(
        marks=(),
        rates={},
        step_tokens=CONFIG["batch_size"] * CONFIG["block_tokens"],
        work=given.work / f"{name}-attacks",
        seed=CONFIG["seed"],
        precision=CONFIG["precision"],
    )
    ruler = held_out(
        read_records(paths["heldout"]),
        tokenizer,
        packed=True,
        block_tokens=CONFIG["block_tokens"],
        limit_tokens=CONFIG["heldout_tokens"],
        batch_size=CONFIG["batch_size"],
    )
    text_figures = found["capabilities"][0]
    losses = Losses(full=text_figures["full"], emulator=text_figures["emulator"])
    num_blocks = read_owner_record(owner_record_path(package.path)).num_blocks
    return Attacker(package, Knowledge(num_blocks), text, setting, ruler, losses)


def _write(
    given: argparse.Namespace,
    paths: dict[str, Path],
    found: dict[str, Any],
    curves: dict[str, dict[str, Any]],
    seconds: float,
) -> None:
    result = {
        "benchmark": "privacy/recovery",
        **environment(),
        "config": CONFIG,
        "data": files(**paths),
        "model": given.model,
        "seconds": round(seconds, 1),
        "packages": {
            name: {
                **found[name],
                "recovery": list(curves[name].values()),
                "runs": _runs(given.work / f"{name}-attacks"),
            }
            for name in found
        },
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result), flush=True)


def _rates(folder: Path, arm: dict[str, Any]) -> list[float]:
    """Return the rates that the arm tries: all, or the one that was best in the shorter arm it goes by."""
    if "best_at" not in arm:
        return list(arm["rates"])
    runs = _runs(folder)
    names = {rate: f"{arm['attack']}-{arm['best_at']}-{rate:g}" for rate in arm["rates"]}
    return [min((rate for rate in names if names[rate] in runs), key=lambda rate: runs[names[rate]]["chosen_by"])]


def _runs(folder: Path) -> dict[str, dict[str, float]]:
    """Return every run, the rates that were not kept too: its figures by its name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["found"] for path in sorted(folder.glob("*.json"))}


def table(result: dict[str, Any]) -> str:
    """Return the attacks as a table in Markdown: perplexity, and the share regained of what was lost."""
    lines = ["| package | attack | trained | perplexity (share regained) after tokens |", "| --- | --- | --- | --- |"]
    for name, package in result["packages"].items():
        text = package["capabilities"][0]
        lines.append(f"| {name} | the full model | - | {math.exp(text['full']):.2f} |")
        for curve in package["recovery"]:
            points = [
                f"{point['num_tokens']:,}: {point['perplexity']:.2f} ({point['regained']:.2f})"
                for point in curve["points"]
            ]
            lines.append(f"| {name} | {curve['attack']} | {curve['trained_parameters']:,} | {'; '.join(points)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except RunFailed as error:
        sys.exit(f"{error}; run the same command again to go on")
