"""`offsite demo`: owner and client as separate processes in separate folders, on a real model and real text.

Each party makes keys and pins the other's. The owner distils a package from public text, sets the terms and seals both;
the client opens them, tunes an adapter on private text it alone has, and seals it; the owner takes it in, accepts it,
plugs it in and measures on text that neither side trained on. Every step is one of the command line's own verbs; a
step that finished with the same words is not run again. The reference row, LoRA on the full model, is what the owner
could do if it were given the data; it is made here only to compare.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from offsite.console import say, table
from offsite.demo.config import DemoConfig
from offsite.demo.described import play_task
from offsite.demo.handover import introduce, receive, send, set_terms, take_in
from offsite.demo.private import ADAPTER, Privacy, audit, conclude, plant, tune_words
from offsite.demo.private import FULL as PRIVATE_FULL
from offsite.demo.private import SHORT as PRIVATE_SHORT
from offsite.demo.scene import AT_REGISTRY, Scene, give, set_scene
from offsite.errors import RunFailed
from offsite.evaluation.results import ROWS, Results
from offsite.stages import Stage, play
from offsite.text.records import bundled, read_records

FULL = {
    "distill": ["--steps", "40", "--evaluation-tokens", "4096", "--calibration-tokens", "8192"],
    "tune": ["--learning-rate", "4e-3", "--steps", "40", "--evaluate-every", "20", "--validation", "0.012"],
    "reference": ["--steps", "40", "--evaluate-every", "20", "--validation", "0.012"],
    "evaluate": ["--limit-tokens", "12288"],
}
SHORT = {
    "distill": ["--steps", "4", "--evaluation-tokens", "1024", "--calibration-tokens", "4096"],
    "tune": ["--learning-rate", "2e-3", "--steps", "14", "--evaluate-every", "14", "--validation", "0.005"],
    "reference": ["--steps", "8", "--evaluate-every", "8", "--validation", "0.005"],
    "evaluate": ["--limit-tokens", "4096"],
}
CHECKS = "signatures, job, round, order; every byte; names, shapes, finite values; the size of each update"
KEYS = ("zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in", "lora_full")


def run(config: DemoConfig) -> dict[str, object]:
    """Play both parties and return the table's figures.

    Raises:
        ConfigError: when the output folder holds what no demo made, or the task's folder lacks a file.
        ArtefactError: when what crossed is not what its manifest says.
        RunFailed: when a verb fails, or plugging in did not better the zero-shot model on held-out text.
    """
    if config.task is not None:
        return play_task(config)
    began = time.monotonic()
    scene = _scene(config)
    say("BOTH   make keys, and pin the other's card by the fingerprint they were told")
    parties = introduce(scene.owner, scene.client, scene.notes)
    say("\nOWNER  distils an emulator of the middle on public text; beside it, for comparison only, the reference")
    made, compared = _make(scene)
    package = made.outcome["package_digest"]
    say("\nOWNER  sets the terms and seals them with the package; the full model and its block numbers stay")
    job_id = set_terms(parties, package, ["--adapter", "lora", "--placement", "all"] if config.dp is None else ADAPTER)
    to_client = {"job": job_id, "package": package}
    for name, digest in to_client.items():
        words = [] if name == "job" else ["--job", "job"]
        to_client[name] = send(parties, scene.owner, name, job_id=job_id, digest=digest, words=words)
    say("\nCLIENT opens both, and tunes an adapter on its private text; it has the package and its data, nothing else")
    for name, sealed in to_client.items():
        receive(parties, name, sealed)
    private = PRIVATE_SHORT if config.short else PRIVATE_FULL
    words, canaries, grounds = scene.steps["tune"], "", ["--accept-leakage"]
    if config.dp is not None:
        canaries = plant(parties, package, job_id, private["canaries"])
        words = tune_words(config.dp, private["tune"])
    tuned = _tune(scene, package, job_id, words, canaries)
    if config.dp is not None:
        audit(parties, tuned.outcome["bundle_digest"], canaries, private["audit"])
        grounds = ["--audit", "audit"]
    words = ["--job", "job", "--round", "1", *grounds]
    send(parties, scene.client, "bundle", job_id=job_id, digest=tuned.outcome["bundle_digest"], words=words)
    say("\nOWNER  takes the sealed bundle in: " + CHECKS)
    arrived = take_in(parties)
    say("\nOWNER  plugs what it accepted into the full model and measures on text neither side trained on")
    results = _measure(scene, {"distill": made, "tune": tuned, "lora_full": compared}, arrived)
    shown = None if config.dp is None else conclude(parties, scene.model, arrived, job_id, canaries)
    return _conclude(results, scene.report, began, shown)


def _scene(config: DemoConfig) -> Scene:
    """Return the scene with each party's text in its folder and the model on this machine."""
    given = {
        "public": (bundled("public"), {"owner": ("public.jsonl.gz",)}),
        "heldout": (bundled("heldout"), {"owner": ("heldout.jsonl.gz",)}),
        "private": (
            bundled("private"),
            {"owner": ("only-for-the-reference.jsonl.gz",), "client": ("private.jsonl.gz",)},
        ),
    }
    return set_scene(config, given, SHORT if config.short else FULL)


def _make(scene: Scene) -> tuple[Stage, Stage]:
    """Return the finished stages that made the package and the reference."""
    owner, model = scene.owner, scene.model
    kept = scene.whole()
    words = ["distill", model, "--public", "public.jsonl.gz", "--width", "0.33", "--learning-rate", "3e-4"]
    words += ["--warmup-steps", "5", "--licence", "Apache-2.0", "-o", "package", *scene.steps["distill"], *scene.seed]
    inputs = {"model": scene.model_digest, "public": scene.text["public"]}
    made = Stage("distill", owner, words, owner / "package", inputs)
    words = ["tune", "keep-all", "--data", "only-for-the-reference.jsonl.gz", "--adapter", "lora", "--placement", "all"]
    words += ["--learning-rate", "4e-3", "-o", "lora-full", *scene.steps["reference"], *scene.seed]
    inputs = {"package": kept.outcome["package_digest"], "private": scene.text["private"]}
    compared = Stage("reference", owner, words, owner / "lora-full", inputs)
    play([made, compared], scene.notes)
    return made, compared


def _tune(scene: Scene, package_digest: str, job_id: str, settings: list[str], canaries: str) -> Stage:
    """Return the finished stage that made the bundle."""
    words = ["tune", "package", "--job", "job", "--data", "private.jsonl.gz", "-o", "bundle"]
    inputs = {"package": package_digest, "job": job_id, "private": scene.text["private"]}
    inputs |= {"canaries": canaries} if canaries else {}
    words += [*settings, *scene.seed]
    tuned = Stage("tune", scene.client, words, scene.client / "bundle", inputs)
    play([tuned], scene.notes)
    return tuned


def _measure(scene: Scene, runs: dict[str, Stage], arrived: dict[str, Any]) -> Results:
    """Return what plugging in was worth; the report stands."""
    owner, package = scene.owner, runs["distill"].outcome
    inputs = scene.plug_in(package["package_digest"], arrived["id"])
    for name, stage in runs.items():
        (owner / f"{name}.outcome.json").write_text(json.dumps(stage.outcome), encoding="utf-8")
    give(scene.client / "bundle.log.jsonl", owner / "tune.log.jsonl")
    words = ["evaluate", scene.model, "--package", "package", "--data", "heldout.jsonl.gz"]
    words += ["--bundle", f"bundle={arrived['id']}", *AT_REGISTRY]
    words += ["--reference", "lora_full=lora-full", "--reference-package", "keep-all", "--precision", "bf16"]
    words += ["--log", "distill=package.log.jsonl", "--log", "tune=tune.log.jsonl", "--prompt", _question()]
    words += [word for name in runs for word in ("--outcome", f"{name}={name}.outcome.json")]
    words += ["-o", "evaluation", *scene.steps["evaluate"]]
    reference = runs["lora_full"].outcome["bundle_digest"]
    inputs = {**inputs, "reference": reference, "heldout": scene.text["heldout"]}
    measured = Stage("evaluate", owner, words, owner / "evaluation", inputs)
    play([measured], scene.notes)
    results = scene.reported()
    if measured.reused:  # otherwise evaluate has shown the table itself
        _show(results)
    return results


def _question() -> str:
    """Return the first question of the held-out text, which nobody trained on, as a line of its own.

    After ``Answer:`` the model as it was ends at once, so there would be nothing to compare.
    """
    record = read_records(bundled("heldout"))[0]
    prompt = "".join(text for text, counts in record.segments if not counts)
    return prompt.removeprefix("Question: ").removesuffix("\nAnswer:") + "\n"


def _show(results: Results) -> None:
    rows = [[name.replace("_", " "), f"{row.perplexity.mean:,.2f}", ROWS[name]] for name, row in results.rows.items()]
    table(f"perplexity on {results.data.name}", ["row", "perplexity", "what it is"], rows)


def _conclude(results: Results, report: Path, began: float, private: Privacy | None = None) -> dict[str, object]:
    rows: dict[str, float] = {name: row.perplexity.mean for name, row in results.rows.items()}
    figures: dict[str, Any] = {name: rows.get(name) for name in KEYS}
    for name in ("recovery_vs_lora", "recovery_nats_vs_lora", "gap", "withheld_after_tuning", "capability"):
        metric = results.metrics.get(name)
        figures[name] = metric.mean if metric else None
    (bundle,) = results.bundles.values()
    figures |= {"adapter_bytes": bundle.num_bytes, "package_bytes": results.package.num_bytes}
    for answer in results.answers:
        say(f"\n{answer.prompt.strip()}\n  before: {answer.before.strip()}\n  after:  {answer.after.strip()}")
    say(f"\nreport: {report}")
    before, after = rows["zero_shot"], rows["plugged_in"]
    worse = f"plugged in ({after:.2f}) is not better than zero-shot ({before:.2f}) on held-out text"
    figures |= {"report": str(report), "seconds": round(time.monotonic() - began, 1)}
    if private is None:
        say("encrypted and signed in transit; NOT differentially private, and no audit of the bundle: see SECURITY.md")
        if after >= before:
            raise RunFailed(worse)
        return figures
    say(f"privacy reports, signed: {private.client_page} by the client, {private.owner_page} by the owner")
    say(f"differentially private per row: epsilon {private.epsilon:.2f} at delta {private.delta:.2g}, verified")
    if after >= before:
        say(f"with this noise {worse}")
    return {**figures, "epsilon": private.epsilon, "delta": private.delta, "privacy_report": str(private.client_page)}
