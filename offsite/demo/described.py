"""What `offsite demo --task FOLDER` plays: a task described in one file, from its description to the plugged-in model.

The owner makes a package without training, puts the task into its job and seals both; the client tunes by the task on
rows it alone has; the owner takes the sealed bundle in, plugs it in and measures by the task's own measure, beside
what both models make of it untuned with samples in the prompt. LoRA on the full model is made here only to compare.
"""

from __future__ import annotations

import json
import time
from typing import Any

from offsite.console import say
from offsite.demo.config import DemoConfig
from offsite.demo.handover import Parties, introduce, receive, send, set_terms, take_in
from offsite.demo.scene import AT_REGISTRY, Scene, set_scene
from offsite.digests import sha256_file
from offsite.errors import ConfigError
from offsite.evaluation.results import Results
from offsite.stages import Stage, play
from offsite.tasks.read import read_task
from offsite.text.records import bundled

FILES = ("task.yaml", "rows.jsonl.gz", "heldout.jsonl.gz")
"""The task, the client's rows, and the rows that the owner measures on, in the folder of ``--task``."""

FULL = {"tune": ["--steps", "32"], "baseline": ["--rows", "32"], "evaluate": ["--task-limit", "32"]}
SHORT = {"tune": ["--steps", "8"], "baseline": ["--rows", "16"], "evaluate": ["--task-limit", "16"]}
DISTILL = "--method width --width 0.5 --steps 0 --calibration-tokens 8192 --licence Apache-2.0".split()
ADAPTER = ["--adapter", "lora", "--placement", "all"]
TUNE = ["--batch-size", "16", "--no-pack", "--learning-rate", "2e-3", "--validation", "0.03"]
"""A row of a task is short, and is asked alone: blocks that are filled across rows would take eight times as long."""
ASKED = ["--method", "in-context"]  # untuned and without samples both models are rows of the evaluation
ROWS = ("zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in", "lora_full")


def play_task(config: DemoConfig) -> dict[str, object]:
    """Play both parties on a task and return the figures of its own measure, a row each.

    Raises:
        ConfigError: when the output folder holds what no demo made, or the task's folder lacks a file.
        ArtefactError: when what crossed is not what its manifest says.
        RunFailed: when a verb fails.
    """
    began = time.monotonic()
    scene = _scene(config)
    say("BOTH   make keys, and pin the other's card by the fingerprint they were told")
    parties = introduce(scene.owner, scene.client, scene.notes)
    say("\nOWNER  reads the task, makes an emulator of the middle on public text, and asks both with samples")
    package, beside = _make(scene)
    say("\nOWNER  puts the task into its job, as data, and seals it with the package")
    job_id = set_terms(parties, package, [*ADAPTER, "--task", "task.yaml"])
    crossing = {"job": (job_id, []), "package": (package, ["--job", "job"])}
    for name, (digest, words) in crossing.items():
        sealed = send(parties, scene.owner, name, job_id=job_id, digest=digest, words=words)
        receive(parties, name, sealed)
    say("\nCLIENT tunes an adapter by the task that came with the job, on rows that it alone has")
    bundle = _tune(scene, package, job_id)
    words = ["--job", "job", "--round", "1", "--accept-leakage"]
    send(parties, scene.client, "bundle", job_id=job_id, digest=bundle, words=words)
    say("\nOWNER  takes the sealed bundle in, plugs it in, and measures by the task, on rows that nobody tuned on")
    results = _measured(scene, parties, package, beside)
    return _concluded(scene, results, began)


def _scene(config: DemoConfig) -> Scene:
    """Return the scene with each party's part of the task in its folder, once the task is found to be sound."""
    folder = config.task
    assert folder is not None  # noqa: S101 - who calls has looked
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        hint = f"a folder with {', '.join(FILES)}: docs/tasks.md"
        raise ConfigError(f"--task {folder.name!r}: no {missing[0]} in it", hint=hint)
    task, rows, heldout = FILES
    read_task(folder / task)  # before a model is fetched
    given = {
        "task": (folder / task, {"owner": (task,)}),
        "rows": (folder / rows, {"owner": ("only-for-the-reference.jsonl.gz",), "client": (rows,)}),
        "heldout": (folder / heldout, {"owner": (heldout,)}),
        "public": (bundled("public"), {"owner": ("public.jsonl.gz",)}),
    }
    scene = set_scene(config, given, SHORT if config.short else FULL)
    play([Stage("task-check", scene.owner, ["task", "check", task])], scene.notes)
    return scene


def _make(scene: Scene) -> tuple[str, dict[str, str]]:
    """Return the package's digest, and those of what is measured beside what comes back, by name."""
    owner = scene.owner
    kept = scene.whole()
    words = ["distill", scene.model, "--public", "public.jsonl.gz", *DISTILL, *scene.seed, "-o", "package"]
    inputs = {"model": scene.model_digest, "public": scene.text["public"]}
    made = Stage("distill", owner, words, owner / "package", inputs)
    play([made], scene.notes)
    package = str(made.outcome["package_digest"])
    words = ["task", "baseline", "task.yaml", "--model", scene.model, "--model", "package", *ASKED]
    words += ["--data", "heldout.jsonl.gz", *scene.steps["baseline"], *scene.seed, "-o", "baselines.json"]
    inputs = {"model": scene.model_digest, "package": package, **scene.text}
    play([Stage("baseline", owner, words, owner / "baselines.json", inputs)], scene.notes)
    words = ["tune", "keep-all", "--task", "task.yaml", "--data", "only-for-the-reference.jsonl.gz", "-o", "lora-full"]
    words += [*ADAPTER, *TUNE, *scene.steps["tune"], *scene.seed]
    inputs = {"package": str(kept.outcome["package_digest"]), **scene.text}
    compared = Stage("reference", owner, words, owner / "lora-full", inputs)
    play([compared], scene.notes)
    beside = {"asked": sha256_file(owner / "baselines.json"), "reference": str(compared.outcome["bundle_digest"])}
    return package, beside


def _tune(scene: Scene, package: str, job_id: str) -> str:
    """Return the digest of the bundle that the client tuned."""
    words = ["tune", "package", "--job", "job", "--data", "rows.jsonl.gz", "-o", "bundle"]
    words += [*TUNE, *scene.steps["tune"], *scene.seed]
    inputs = {"package": package, "job": job_id, "rows": scene.text["rows"]}
    tuned = Stage("tune", scene.client, words, scene.client / "bundle", inputs)
    play([tuned], scene.notes)
    return str(tuned.outcome["bundle_digest"])


def _measured(scene: Scene, parties: Parties, package: str, beside: dict[str, str]) -> Results:
    """Return what plugging in was worth by the task's measure; the report stands."""
    arrived = take_in(parties)
    inputs = {**scene.plug_in(package, arrived["id"]), **beside, **scene.text}
    words = ["evaluate", scene.model, "--package", "package", "--bundle", f"bundle={arrived['id']}", *AT_REGISTRY]
    words += ["--data", "heldout.jsonl.gz", "--task-file", "task.yaml", "--baselines", "baselines.json"]
    words += ["--reference", "lora_full=lora-full", "--reference-package", "keep-all", *scene.steps["evaluate"]]
    words += ["-o", "evaluation"]
    play([Stage("evaluate", scene.owner, words, scene.owner / "evaluation", inputs)], scene.notes)
    return scene.reported()


def _concluded(scene: Scene, results: Results, began: float) -> dict[str, Any]:
    """Return the outcome: every row by the task's own measure, with the number of rows it was measured on."""
    (name,) = {name for row in results.rows.values() for name in row.tasks}
    told = json.loads((scene.owner / "baselines.json").read_text(encoding="utf-8"))
    measure = told["measure"]
    figures: dict[str, Any] = {key: results.rows[key].tasks[name][measure].mean for key in ROWS if key in results.rows}
    say(f"\nreport: {scene.report}")
    say("encrypted and signed in transit; NOT differentially private, and no audit of the bundle: see SECURITY.md")
    if figures["plugged_in"] <= figures["zero_shot"]:
        say("plugged in is not better than zero-shot by this measure: too few steps or rows, or a task it cannot learn")
    seconds = round(time.monotonic() - began, 1)
    return {"task": name, "measure": measure, "num_rows": results.tasks[name], **figures,
            "report": str(scene.report), "seconds": seconds}  # fmt: skip
