"""A model four times as large: the default package and the best one on Qwen2.5-Coder-0.5B-Instruct, one seed.

Run as: ``python benchmarks/frontier/bigger.py --config benchmarks/frontier/bigger.yaml --data FOLDER --work FOLDER
--out JSON``. The model is brought to the cache first, once (`benchmarks/data/models.py`, 478 MB). Jobs, journal and
results are those of ``run.py``. ``--check`` only loads the model, measures it on four held-out blocks, in float32 and
with linears in bfloat16, and times one client step on a package.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from run import finished, found, needed, planned, shared, work_off, write

from benchmarks.data.models import SOURCES
from benchmarks.record import arguments, environment
from client.tuning.tune import attach_to_package
from offsite.artefacts.package import open_package
from offsite.modelling.fetch import bring
from offsite.text.batches import pad_id


def main() -> None:
    """Run the jobs that are not done, write the results and print the table."""
    given, plan, only = arguments(
        __doc__, only="arms to work on, by comma; the results keep all that is done", more=_options
    )
    named = plan["model"]
    folder = str(bring(named, SOURCES[named], given.cache)) if named in SOURCES else named
    here = {**plan, "model": folder}
    if given.check:
        check(here, given)
        return
    done = finished(given.work / "jobs.jsonl")
    work_off(needed(list(planned(plan, given.data)), done, only), done, here, given)
    write({**plan, "model": Path(named).name}, done, given)
    print(write_table(plan, done))


def _options(options: argparse.ArgumentParser) -> None:
    shared(options)
    options.add_argument("--cache", type=Path, help="cache folder of models; default: the user's, or OFFSITE_CACHE")
    options.add_argument("--check", action="store_true", help="a few blocks and one step, no more")


def check(plan: dict[str, Any], given: argparse.Namespace) -> None:
    """Perplexity on four held-out blocks, the seconds of a client's step and the peak of memory are in ``--out``."""
    import work as frontier
    from questions import make_package

    client, heldout = (found(plan[key], given.data) for key in ("client", "heldout"))
    frontier.start(plan["model"], given.threads, client, heldout, str(given.work))
    model, blocks = frontier.full_model(), frontier.heldout()
    pad = pad_id(frontier.tokenizer())
    chosen = [blocks[number * len(blocks) // 4] for number in range(4)]
    told: dict[str, Any] = {"parameters": sum(one.numel() for one in model.parameters())}
    print(
        f"loaded {told['parameters']:,} parameters; four blocks in float32, then in bfloat16",
        file=sys.stderr,
        flush=True,
    )
    told["perplexity_float32"] = frontier.measure_examples(model, chosen, pad)
    with frontier.half(model):
        told["perplexity_half"] = frontier.measure_examples(model, chosen, pad)
    print(json.dumps(told), flush=True)
    told["zero_shot_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    frontier.full_model.cache_clear()
    del model
    make_package({"package": "check", "model": plan["model"], "distill": {"method": "keep-all", "steps": 0}})
    spec = frontier.spec_for({})
    opened = open_package(frontier.package_path("check"))
    attached = attach_to_package(opened, spec, device=torch.device("cpu"), seed=0)
    text = frontier.client_text(client, 4, 0)
    losses: list[float] = []
    began, cpu = time.monotonic(), time.process_time()
    with frontier.half(attached.model):
        frontier.train(attached, opened, text, {"steps": 1}, losses, seed=0)
    told |= {"step_seconds": time.monotonic() - began, "step_cpu_seconds": time.process_time() - cpu}
    told |= {"step_loss": losses[0], "tokens": 4 * frontier.BLOCK_TOKENS}
    told["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"benchmark": "frontier/bigger-check", **environment(), "model": Path(plan["model"]).name, **told}
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told))


def write_table(plan: dict[str, Any], done: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table: each arm's package, its perplexities, and recovery against LoRA on the full model."""
    zero = done["zero-shot"]["found"]["perplexity"] if "zero-shot" in done else None
    means = {arm["name"]: done.get(f"mean/{arm['name']}/0+1") for arm in plan["arms"]}
    references = [arm["name"] for arm in plan["arms"] if arm.get("reference")]
    lora = next((means[name]["found"]["plugged_in"]["1"] for name in references if means.get(name)), None)  # type: ignore[index]
    lines = [
        "| package | zero-shot | emulator zero-shot | emulator-tuned | plugged in | share | LoRA on full | recovery |"
    ]
    lines.append("| --- |" + " --- |" * 7)
    for arm in plan["arms"]:
        own = means[arm["name"]]
        if arm.get("reference") or own is None or zero is None:
            continue
        package = done[f"package/{arm['package']}"]["found"]
        tuned = own["found"]["emulator_tuned"][arm["package"]]
        share, best = min(own["found"]["plugged_in"].items(), key=lambda item: item[1])
        recovery = "-" if lora is None else f"{(zero - best) / (zero - lora):.2f}"
        cells = [zero, package["perplexity"], tuned, best]
        line = " | ".join(f"{value:.2f}" for value in cells)
        lines.append(f"| {arm['package']} | {line} | {share} | {'-' if lora is None else f'{lora:.2f}'} | {recovery} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
