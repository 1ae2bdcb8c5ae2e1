"""One job of the quality benchmark: make a package, or tune one adapter and measure it both ways.

Each job runs in a worker process that keeps the full model, and is a pure function of its description: what it
returns goes into ``jobs.jsonl``, and a job that stands there is not run again.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from adapters.kinds import attach, declared
from adapters.lift import lift
from client.tuning.config import TuneConfig
from client.tuning.data import TrainingText, prepare
from client.tuning.ready import loop_settings
from client.tuning.tune import attach_to_package, tune
from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run as distill
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import open_package
from offsite.evaluation.measure import perplexity
from offsite.modelling.load import load_model
from offsite.tensors import spec_of, torch_dtype
from offsite.text.batches import encode, pack
from offsite.text.records import read_records
from server.plugging.fit import Fitted, scaled

BLOCK_TOKENS = 256
_VALIDATION = 0.012  # of the documents: about 30 blocks, enough to choose a rate and a checkpoint


def make_package(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Write the package `job` names under `work`, unless it stands there, and return what distill reports."""
    out = work / "packages" / job["package"]
    report = out.parent / f"{out.name}.json"
    if not report.is_file():
        shutil.rmtree(out, ignore_errors=True)
        settings = {"bottom": 2, "top": 2, **job["distill"]}
        for key in ("public",):
            settings[key] = Path(settings[key]) if settings.get(key) else None
        found = distill(DistillConfig(model=job["model"], output=out, **settings))
        report.write_text(json.dumps(found), encoding="utf-8")
    model = open_package(out).load_model(device=_device())
    zero_shot = _measure(model, job["heldout"])
    return {**json.loads(report.read_text(encoding="utf-8")), "perplexity": zero_shot}


def tune_and_measure(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Tune the adapter on the package, then measure it on the emulator and in the full model."""
    package = open_package(work / "packages" / job["package"])
    settings = {key: value for key, value in job["tune"].items() if key not in {"name", "rates"}}
    config = TuneConfig(
        package=package.path,
        data=Path(job["client"]),
        output=work / "unused",
        block_tokens=BLOCK_TOKENS,
        learning_rate=job["rate"],
        seed=job["seed"],
        **settings,
    )
    text = _client_text(job["client"], config.batch_size, job["seed"])
    attached = attach_to_package(package, config.spec(), device=torch.device(_device()), seed=job["seed"])
    scratch = work / "runs" / job["key"]
    shutil.rmtree(scratch, ignore_errors=True)
    outcome = tune(attached, text, loop_settings(config, text), work=scratch, label=job["key"])
    shutil.rmtree(scratch)
    spec = config.spec()
    tensors = {name: tensor.to(torch_dtype(spec.dtype)) for name, tensor in attached.tensors().items()}
    attached.load(tensors)  # measure what a bundle carries, in its dtype
    tuned = _measure(attached.model, job["heldout"])
    del attached
    plugged = tuned if job.get("reference") else _plugged_in(job, package.path, spec, tensors)
    shares = {
        f"{scale:g}": _plugged_in(job, package.path, spec, tensors, scale)
        for scale in job.get("scales", ())
        if not job.get("reference")
    }
    return {
        "validation_loss": outcome.best_loss,
        "emulator_tuned": tuned,
        "plugged_in": plugged,
        "plugged_in_scaled": shares,
        "adapter_bytes": sum(spec_of(tensor).num_bytes for tensor in tensors.values()),
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "best_step": outcome.best_step,
        "evaluations": outcome.evaluations,
    }


def zero_shot(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Measure the full model as it is."""
    return {"perplexity": _measure(_full(job["model"]), job["heldout"])}


def _plugged_in(
    job: dict[str, Any], package: Path, spec: AdapterSpec, tensors: dict[str, torch.Tensor], scale: float = 1.0
) -> float:
    """Return the full model's perplexity with `scale` of the adapter's update on it."""
    record = read_owner_record(owner_record_path(package))
    full = copy.deepcopy(_full(job["model"]))
    names = declared(spec, record.layout, record.block_tensors)
    dims = {}
    for name in record.layout.linears:
        role, number, inner = name.split(".", 2)
        module = full.get_submodule(f"{record.sites[f'{role}.{number}']}.{inner}")
        dims[name] = (module.in_features, module.out_features)
    adapter = scaled(full, Fitted(spec, lift(tensors, record.channels, dims), record.sites), scale)
    attached = attach(full, adapter.spec, adapter.sites, names)
    attached.load(adapter.tensors)
    attached.model.to(_device())
    return _measure(attached.model, job["heldout"])


def _measure(model: Any, heldout: str) -> float:
    examples, pad = _examples(heldout)
    model.eval()
    return perplexity(model, examples, batch_size=4, pad_id=pad, precision=_PRECISION).perplexity


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=1)
def _full(model: str) -> Any:
    return load_model(model, dtype="float32", device=_device())


@lru_cache(maxsize=4)
def _examples(heldout: str) -> tuple[Any, int]:
    from offsite.text.batches import pad_id

    tokenizer = _tokenizer()
    encoded = encode(read_records(Path(heldout)), tokenizer, context=BLOCK_TOKENS, whole_text=True)
    blocks = pack(encoded.examples, block_tokens=BLOCK_TOKENS)
    return spaced(blocks, _HELDOUT_BLOCKS or len(blocks)), pad_id(tokenizer)


def spaced(items: Sequence[Any], num: int) -> list[Any]:
    """Return `num` of the items, evenly spaced: a file that goes source by source is then shown as a whole."""
    num = min(num, len(items))
    return [items[i * len(items) // num] for i in range(num)]


@lru_cache(maxsize=12)
def _client_text(client: str, batch_size: int, seed: int) -> TrainingText:
    records = read_records(Path(client))
    return prepare(
        records,
        _tokenizer(),
        block_tokens=BLOCK_TOKENS,
        batch_size=batch_size,
        validation=_VALIDATION,
        seed=seed,
    )


_MODEL = ""
_HELDOUT_BLOCKS = 0
_PRECISION: Literal["fp32", "bf16"] = "fp32"


def _tokenizer() -> Any:
    from offsite.modelling.load import load_tokenizer

    return load_tokenizer(_MODEL)


def start(model: str, threads: int, heldout_blocks: int, precision: Literal["fp32", "bf16"]) -> None:
    """Prepare a worker process."""
    global _MODEL, _HELDOUT_BLOCKS, _PRECISION
    _MODEL, _HELDOUT_BLOCKS, _PRECISION = model, heldout_blocks, precision
    torch.set_num_threads(threads)


def run_job(job: dict[str, Any], work: str) -> dict[str, Any]:
    """Run one job by its kind and return it with what it found."""
    functions = {"package": make_package, "tune": tune_and_measure, "zero_shot": zero_shot}
    return {**job, "found": functions[job["kind"]](job, Path(work))}
