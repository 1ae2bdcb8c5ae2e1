"""`offsite demo`: owner and client as separate processes in separate folders, on a real model and real text.

The owner distils a package from public text, the client tunes an adapter on private text it alone has, the owner plugs
the bundle in and measures on text that neither side trained on. Every step is one of the command line's own verbs; a
step that finished with the same words is not run again. The reference row, LoRA on the full model, is what the owner
could do if it were given the data; it is made here only to compare.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offsite.console import say
from offsite.errors import RunFailed
from offsite.fetch import known
from offsite.records import bundled, read_records
from offsite.results import Results, read_results
from offsite.settings import DemoConfig

FULL = {
    "distill": ["--steps", "60", "--evaluation-tokens", "4096", "--calibration-tokens", "8192"],
    "tune": ["--steps", "40", "--evaluate-every", "20", "--validation", "0.012"],
    "reference": ["--steps", "40", "--evaluate-every", "20", "--validation", "0.012"],
    "evaluate": ["--limit-tokens", "12288"],
}
SHORT = {
    "distill": ["--steps", "10", "--evaluation-tokens", "1024", "--calibration-tokens", "2048"],
    "tune": ["--steps", "10", "--evaluate-every", "10", "--validation", "0.005"],
    "reference": ["--steps", "8", "--evaluate-every", "8", "--validation", "0.005"],
    "evaluate": ["--limit-tokens", "4096"],
}
KEYS = ("zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in", "lora_full")


@dataclass
class Stage:
    """One verb run by one party in its own folder, and what it must leave there."""

    name: str
    party: Path
    words: list[str]
    leaves: Path
    outcome: dict[str, Any] = field(default_factory=dict)


def run(config: DemoConfig) -> dict[str, object]:
    """Play both parties and return the table's figures.

    Raises:
        RunFailed: when a verb fails, or plugging in did not better the zero-shot model on held-out text.
    """
    began = time.monotonic()
    owner, client = config.output / "owner", config.output / "client"
    for folder in (owner, client):
        folder.mkdir(parents=True, exist_ok=True)
    steps = SHORT if config.short else FULL
    seed = ["--seed", str(config.seed)]
    _give(bundled("public"), owner / "public.jsonl.gz")
    _give(bundled("heldout"), owner / "heldout.jsonl.gz")
    _give(bundled("private"), client / "private.jsonl.gz")
    _give(bundled("private"), owner / "only-for-the-reference.jsonl.gz")
    if config.model in known():
        _play([_stage("fetch", owner, ["fetch", config.model], owner)], config)

    say("\nOWNER  distils an emulator of the middle on public text; beside it, for comparison only, the reference")
    distill = ["distill", config.model, "--public", "public.jsonl.gz", "--width", "0.33", "-o", "package"]
    distill += ["--learning-rate", "1e-3", "--warmup-steps", "5", "--licence", "Apache-2.0"]
    keep = ["distill", config.model, "--method", "keep-all", "--steps", "0", "-o", "keep-all"]
    _play([_stage("keep-all", owner, keep, owner / "keep-all")], config)
    reference = ["tune", "keep-all", "--data", "only-for-the-reference.jsonl.gz", "--adapter", "lora", "--placement"]
    reference += ["all", "--learning-rate", "3e-3", "-o", "lora-full"]
    made, compared = _play(
        [
            _stage("distill", owner, [*distill, *steps["distill"], *seed], owner / "package"),
            _stage("reference", owner, [*reference, *steps["reference"], *seed], owner / "lora-full"),
        ],
        config,
    )

    say("\nthe package crosses to the client; the full model, the owner's record and its block numbers do not")
    _hand_over(owner / "package", client / "package", made.outcome["package_digest"])
    say("CLIENT tunes an adapter on its private text; it has the package and its data, nothing else")
    tune = ["tune", "package", "--data", "private.jsonl.gz", "--learning-rate", "1e-3", "-o", "bundle"]
    (tuned,) = _play([_stage("tune", client, [*tune, *steps["tune"], *seed], client / "bundle")], config)

    say("\nthe bundle crosses to the owner; the private text does not")
    _hand_over(client / "bundle", owner / "bundle", tuned.outcome["bundle_digest"])
    say("OWNER  plugs the adapter into the full model and measures on text neither side trained on")
    plug = ["plug-in", config.model, "bundle", "--package", "package", "-o", "adapted"]
    _play([_stage("plug-in", owner, plug, owner / "adapted")], config)
    for name, stage in {"distill": made, "tune": tuned, "lora_full": compared}.items():
        (owner / f"{name}.outcome.json").write_text(json.dumps(stage.outcome), encoding="utf-8")
    _give(client / "bundle.log.jsonl", owner / "tune.log.jsonl")
    evaluate = ["evaluate", config.model, "--package", "package", "--bundle", "bundle", "--data", "heldout.jsonl.gz"]
    evaluate += ["--reference", "lora_full=lora-full", "--reference-package", "keep-all", "--precision", "bf16"]
    evaluate += ["--log", "distill=package.log.jsonl", "--log", "tune=tune.log.jsonl", "--prompt", _question()]
    for name in ("distill", "tune", "lora_full"):
        evaluate += ["--outcome", f"{name}={name}.outcome.json"]
    evaluate += ["-o", "evaluation", *steps["evaluate"]]
    _play([_stage("evaluate", owner, evaluate, owner / "evaluation")], config)
    report = config.output / "report.html"
    words = ["report", "run", "evaluation", "-o", str(report.resolve())]
    _play([_stage("report", owner, words, report)], config)
    return _conclude(read_results(owner / "evaluation"), report, time.monotonic() - began)


def _stage(name: str, party: Path, words: list[str], leaves: Path) -> Stage:
    return Stage(name, party, words, leaves)


def _play(stages: list[Stage], config: DemoConfig) -> list[Stage]:
    """Run the stages side by side, each as a process of its own; finished ones are read back."""
    notes = config.output / "stages"
    notes.mkdir(exist_ok=True)
    running = []
    for stage in stages:
        note = notes / f"{stage.name}.json"
        if note.is_file() and stage.leaves.exists():
            found = json.loads(note.read_text(encoding="utf-8"))
            if found["words"] == stage.words:
                say(f"  {stage.name}: done before")
                stage.outcome = found["outcome"]
                continue
        _clear(stage)
        say(f"  $ offsite {' '.join(word if ' ' not in word else repr(word) for word in stage.words)}")
        command = [sys.executable, "-P", "-m", "offsite", *stage.words]
        running.append((stage, note, subprocess.Popen(command, cwd=stage.party, stdout=subprocess.PIPE, env=_env())))
    for stage, note, process in running:
        printed, _ = process.communicate()
        if process.returncode:
            for _, _, other in running:
                other.terminate()
            raise RunFailed(f"the demo's step {stage.name!r} ended with exit code {process.returncode}")
        stage.outcome = json.loads(printed.decode().splitlines()[-1])
        note.write_text(json.dumps({"words": stage.words, "outcome": stage.outcome}), encoding="utf-8")
    return stages


def _clear(stage: Stage) -> None:
    """Remove what an earlier run of this stage with other words left, so that the verb may write it."""
    if stage.leaves == stage.party:
        return
    if stage.leaves.is_dir():
        shutil.rmtree(stage.leaves)
    else:
        stage.leaves.unlink(missing_ok=True)
    shutil.rmtree(stage.leaves.parent / f"{stage.leaves.name}.work", ignore_errors=True)


def _env() -> dict[str, str]:
    """One thread per process: two processes side by side use two cores better than one process with two threads."""
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def _give(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _hand_over(source: Path, target: Path, digest: str) -> None:
    """Copy an artefact to the other party's folder and check that it is the one that was sent."""
    from offsite.inspect import inspect_artefact

    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    arrived = inspect_artefact(target)
    if arrived.digest != digest:
        raise RunFailed(f"{target.name!r} arrived with another digest than it was sent with")
    size = f"{arrived.num_bytes / 1e6:,.1f} MB"
    say(f"  {target.name}: {size}, {arrived.digest[:19]}, every file agrees with its manifest")


def _question() -> str:
    """Return the first prompt of the held-out text: a question that nobody trained on."""
    record = read_records(bundled("heldout"))[0]
    return "".join(text for text, counts in record.segments if not counts)


def _conclude(results: Results, report: Path, seconds: float) -> dict[str, object]:
    rows: dict[str, float] = {name: row.perplexity.mean for name, row in results.rows.items()}
    figures: dict[str, Any] = {name: rows.get(name) for name in KEYS}
    for name in ("recovery_vs_lora", "gap", "capability"):
        metric = results.metrics.get(name)
        figures[name] = metric.mean if metric else None
    (bundle,) = results.bundles.values()
    figures |= {"adapter_bytes": bundle.num_bytes, "package_bytes": results.package.num_bytes}
    for answer in results.answers:
        say(f"\n{answer.prompt.strip()}\n  before: {answer.before.strip()}\n  after:  {answer.after.strip()}")
    say(f"\nreport: {report}")
    say("not differentially private, and neither encrypted nor signed in transit: see SECURITY.md")
    before, after = rows["zero_shot"], rows["plugged_in"]
    if after >= before:
        raise RunFailed(f"plugged in ({after:.2f}) is not better than zero-shot ({before:.2f}) on held-out text")
    return {**figures, "report": str(report), "seconds": round(seconds, 1)}
