"""``offsite realign``: distil the emulator again, towards the model that a federation's rounds have made.

The full model has what the rounds added, and so has the emulator; its middle learns on public text to follow, from
where it was. What leaves is the difference of the middle's weights, and how far off the emulator was before and after.
Nothing of a client is needed but the sum of updates, which the round has already.

Source: FedBiOT, arXiv:2406.17706: the emulator is aligned with the adapted model anew every few rounds.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from adapters.norms import adapted_names
from adapters.updates import Update, fold, from_tensors, lifted, norm, placed, to_tensors, truncated
from emulator.compression.compress import Compressed
from emulator.distillation.imitation import distill
from emulator.distillation.objective import Fidelity, Pair, Weights, measure
from emulator.distillation.public import PublicText, prepare
from emulator.distillation.realignconfig import RealignConfig
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import Package, open_package
from offsite.artefacts.round import EMULATOR_FILE, Round, open_round
from offsite.console import say
from offsite.digests import model_digest
from offsite.errors import ConfigError, WrongBinding
from offsite.modelling.load import load_model
from offsite.modelling.split import Plan, make_plan
from offsite.staging import refuse_existing, staged_folder
from offsite.tensors import write_tensors
from offsite.text.records import read_files, require_files
from offsite.training.config import LoopConfig
from offsite.training.devices import choose_device
from offsite.training.precision import settled
from offsite.training.processes import Processes, world

FIGURES_FILE = "figures.json"


@dataclass(frozen=True)
class _Both:
    """The full model and the emulator, both with what the rounds added, and how they correspond."""

    full: PreTrainedModel
    compressed: Compressed
    plan: Plan
    package: Package
    round: Round


def run(config: RealignConfig) -> dict[str, object]:
    """Carry out ``offsite realign``: OUTPUT holds ``emulator.safetensors``, if it is any better, and ``figures.json``.

    Raises:
        ConfigError, ArtefactError: when package, record, round and model do not belong together.
        RunFailed: as distilling; checkpoints stay in OUTPUT.work.
    """
    refuse_existing(config.output)
    require_files(config.public)
    began, processes = time.monotonic(), replace(world(), device=choose_device(config.device))
    works = [_work(config)] if config.resume else []
    precision = settled(config.precision, processes.device, works=works)
    torch.manual_seed(config.seed)
    both = _opened(config)
    for model in (both.full, both.compressed.model):
        model.to(processes.device)  # type: ignore[arg-type]
    text = _text(config, both)
    start = _middle_of(both)
    before = _fidelity(both, text, processes)
    distill(
        both.full,
        both.compressed,
        both.plan,
        text,
        LoopConfig(
            steps=config.steps,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            precision=precision,
            seed=config.seed + both.round.manifest.round,
        ),
        weights=Weights(),
        work=_work(config),
        resume=config.resume,
        binding={"round": both.round.digest, "package": both.package.digest},
        processes=processes,
    )
    difference, error = _difference(config, start, _middle_of(both))
    _put_back(both, start)
    fold(both.compressed.model, difference, both.package.layout.blocks)
    after = _fidelity(both, text, processes)  # of what leaves, which may have been cut to a rank
    is_better = after.kl < before.kl
    figures = {
        "kl_before": before.kl,
        "kl_after": after.kl,
        "hidden_before": before.hidden,
        "hidden_after": after.hidden,
        "truncation_error": error,
        "norm": norm(difference),
        "is_better": is_better,
    }
    with staged_folder(config.output) as stage:
        if is_better:
            write_tensors(stage / EMULATOR_FILE, to_tensors(difference))
        (stage / FIGURES_FILE).write_text(json.dumps(figures, sort_keys=True) + "\n", encoding="ascii")
    shutil.rmtree(_work(config), ignore_errors=True)
    kept = "" if is_better else ": no better, so that the emulator stays as it was"
    say(f"realigned: KL on held-out public text {before.kl:.4g} before, {after.kl:.4g} after{kept}")
    return {"output": config.output.name, **figures, "seconds": round(time.monotonic() - began, 1)}


def _work(config: RealignConfig) -> Path:
    return config.output.with_name(config.output.name + ".work")


def _opened(config: RealignConfig) -> _Both:
    package = open_package(config.package)
    package.require_text("realign")
    round_ = open_round(config.round)
    record = read_owner_record(owner_record_path(config.package))
    if round_.manifest.package_digest != package.digest or record.package_digest != package.digest:
        raise WrongBinding("package, its owner's record and the round do not belong together")
    if record.layout.middle_whole:
        raise ConfigError("this package keeps the middle whole: there is nothing to realign")
    full = load_model(config.model)
    if model_digest(full) != record.base_digest:
        raise WrongBinding("--model is not the model that the package was made of")
    update = _update(round_, package)
    full.float()
    fold(full, lifted(full, update, record), record.sites)
    plan = make_plan(full, num_bottom=record.layout.num_bottom, num_top=record.layout.num_top)
    emulator = package.load_model(dtype="float32")
    fold(emulator, update, package.layout.blocks)
    fold(emulator, _earlier(round_, package), package.layout.blocks)
    compressed = Compressed(emulator, record.kept, record.channels, record.layout.adaptable_middle, {})
    return _Both(full, compressed, plan, package, round_)


def _update(round_: Round, package: Package) -> Update:
    tensors = package.block_tensors()
    names = adapted_names(round_.manifest.adapter, package.layout, tensors)
    return from_tensors("the round's update", round_.load_update(), {name: tensors[name] for name in names})


def _earlier(round_: Round, package: Package) -> Update:
    """Return what earlier realignments did to the emulator: this one starts where they ended."""
    return from_tensors("the round's emulator", round_.load_emulator(), package.block_tensors())


def _text(config: RealignConfig, both: _Both) -> PublicText:
    return prepare(
        read_files(config.public),
        both.package.load_tokenizer(),
        both.full,
        block_tokens=config.block_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        holdout=config.holdout,
        evaluation_tokens=config.evaluation_tokens,
        calibration_tokens=1,
        first_step=(both.round.manifest.round - 1) * config.steps,  # other text than the realignments before it
    )


def _fidelity(both: _Both, text: PublicText, processes: Processes) -> Fidelity:
    pair = Pair(both.full, both.compressed.model, both.plan, both.compressed.kept)
    return measure(pair, text.held_out, processes)


def _middle_of(both: _Both) -> dict[str, torch.Tensor]:
    """Return copies of the emulator's middle tensors, by canonical name."""
    own, layout = dict(both.compressed.model.named_parameters()), both.package.layout
    names = [name for name in both.package.block_tensors() if name.startswith("middle.")]
    paths = {name: placed(name, layout.blocks) for name in names}
    return {name: own[path].detach().cpu().clone() for name, path in paths.items() if path in own}


def _put_back(both: _Both, tensors: dict[str, torch.Tensor]) -> None:
    """The emulator's middle holds these tensors again, by canonical name."""
    own = dict(both.compressed.model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[placed(name, both.package.layout.blocks)].copy_(tensor)


def _difference(
    config: RealignConfig, start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]
) -> tuple[Update, float]:
    found: Update = {name: end[name].float() - tensor.float() for name, tensor in start.items()}
    return (found, 0.0) if config.rank is None else truncated(found, config.rank)
