"""`offsite tune PACKAGE --data FILE -o BUNDLE`: train an adapter against the emulator, on this machine.

Needs the package and the data and nothing else: no network, no full model, no code of the owner's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.kinds import Attached, attach, declared
from client.config import TuneConfig
from client.data import TrainingText, prepare
from offsite.bundle import Bundle, write_bundle
from offsite.console import say
from offsite.devices import choose_device
from offsite.digests import sha256_file
from offsite.errors import RunFailed
from offsite.loop import Outcome, train
from offsite.loopconfig import LoopConfig
from offsite.measure import perplexity
from offsite.package import Package, open_package
from offsite.processes import is_launched, world
from offsite.records import read_records
from offsite.staging import refuse_existing
from offsite.step import uses_bf16
from offsite.text import IGNORED

if TYPE_CHECKING:
    from offsite.bundle import AdapterSpec


def attach_to_package(package: Package, spec: AdapterSpec, *, device: torch.device, seed: int = 0) -> Attached:
    """Return the package's model with a fresh adapter on it; the same seed gives the same start.

    Raises:
        ConfigError: when the package cannot carry that adapter in that place.
        ArtefactError: when a tensor of the package is not the declared, finite one.
    """
    names = declared(spec, package.layout, package.block_tensors())
    model = package.load_model(dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attached = attach(model, spec, package.layout.blocks, names)
    if not is_launched():  # of several processes, sharding places each block
        attached.model.to(device)
    return attached


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy in nats over labels that count, and their number; both scalars.

    Args:
        batch: ``input_ids``, ``labels`` and ``attention_mask``, each (rows, tokens) int64.
    """
    device = _device(model)
    ids_BT, mask_BT = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    targets_BT = batch["labels"].to(device)[:, 1:]
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(
        logits_BTV.float().reshape(-1, logits_BTV.shape[-1]),
        targets_BT.reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return loss, (targets_BT != IGNORED).sum()


def tune(
    attached: Attached,
    text: TrainingText,
    settings: LoopConfig,
    *,
    work: Path,
    resume: bool = False,
    binding: Mapping[str, str] | None = None,
    label: str = "tune",
) -> Outcome:
    """The adapter holds the weights of the lowest validation loss.

    Args:
        attached: model and adapter, on the device they train on; trained in place.
        work: folder for checkpoints and the log; the caller removes it.

    Raises:
        RunFailed: when a loss is not finite, the disk is full, or no weight moved.
    """
    before = {name: parameter.detach().clone() for name, parameter in attached.trainable.items()}
    model: Any = attached.model
    precision: Literal["bf16", "fp32"] = "bf16" if uses_bf16(settings.precision, _device(model)) else "fp32"
    model.train()

    def evaluate() -> float:
        model.eval()
        found = perplexity(model, text.validation, batch_size=8, pad_id=text.pad_id, precision=precision)
        model.train()
        return found.loss

    outcome = train(
        model,
        attached.trainable,
        text.batches,
        next_token_loss,
        settings,
        work=work,
        resume=resume,
        label=label,
        evaluate=evaluate,
        shard_blocks=attached.blocks,
        binding=binding,
    )
    model.eval()
    if outcome.tensors and all(torch.equal(outcome.tensors[name].cpu(), old.cpu()) for name, old in before.items()):
        raise RunFailed("no weight moved during training", hint="raise --learning-rate, or train for more steps")
    return outcome


def run(config: TuneConfig) -> dict[str, object]:
    """Run the verb: open, read, train, write the bundle.

    Raises:
        ConfigError, DataError, ArtefactError, RunFailed: as the steps it is made of.
    """
    if config.output.exists():
        refuse_existing(config.output)
    package = open_package(config.package)
    spec = config.spec()
    names = declared(spec, package.layout, package.block_tensors())
    tokenizer = package.load_tokenizer()
    records = read_records(
        config.data, fields=config.fields, document_field=config.document_field, separator=config.separator
    )
    text = prepare(
        records,
        tokenizer,
        block_tokens=config.block_tokens,
        batch_size=config.batch_size,
        packed=config.pack,
        on_long=config.on_long,
        validation=config.validation,
        seed=config.seed,
    )
    _say_text(text)
    settings = loop_settings(config, text)
    device = choose_device(config.device)
    attached = attach_to_package(package, spec, device=device, seed=config.seed)
    if config.gradient_checkpointing:
        attached.model.gradient_checkpointing_enable()  # type: ignore[operator]
    work = work_folder(config.output)
    outcome = tune(attached, text, settings, work=work, resume=config.resume, binding=_binding(config, package))
    if not world().is_main:
        return {}
    figures = {
        "num_records": text.num_records,
        "num_tokens": outcome.tokens,
        "steps": outcome.steps,
        "validation_loss": float(outcome.best_loss or 0.0),
    }
    bundle = write_bundle(
        config.output,
        package=package,
        spec=spec,
        tensors=outcome.tensors,
        expected=names,
        figures=figures,
        disclose=config.disclose,
    )
    _finish(config.output, work)
    return _result(bundle, text, outcome)


def loop_settings(config: TuneConfig, text: TrainingText) -> LoopConfig:
    """Return the loop's settings: steps from epochs, warm-up and validations in proportion."""
    steps = config.steps or max(1, round(config.epochs * text.batches.num_steps_per_epoch))
    return LoopConfig(
        steps=steps,
        learning_rate=config.rate(),
        warmup_steps=min(config.warmup_steps, max(1, steps // 10)),
        schedule=config.schedule,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        accumulate=config.accumulate,
        precision=config.precision,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
        evaluate_every=config.evaluate_every or max(1, steps // 10),
        tensorboard=config.tensorboard,
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def work_folder(output: Path) -> Path:
    """Return where checkpoints of a run towards `output` live: ``OUTPUT.work``."""
    return output.parent / f"{output.name}.work"


def _binding(config: TuneConfig, package: Package) -> dict[str, str]:
    settings = config.model_dump(
        mode="json",
        include={
            "fields",
            "document_field",
            "separator",
            "on_long",
            "pack",
            "block_tokens",
            "validation",
            "batch_size",
        },
    )
    spec = config.spec().model_dump_json()
    return {"package": package.digest, "data": sha256_file(config.data), "adapter": spec, "text": str(settings)}


def _say_text(text: TrainingText) -> None:
    if not world().is_main:
        return
    say(
        f"{text.num_records} records, {text.num_tokens:,} tokens to train on; {len(text.validation)} sequences held out"
    )
    if text.num_truncated:
        say(f"{text.num_truncated} rows were longer than the context and were cut")
    if text.num_dropped:
        say(f"{text.num_dropped} rows were dropped: nothing that counts was left of them")


def _finish(output: Path, work: Path) -> None:
    """The log stands beside the bundle, for the client alone; checkpoints are gone."""
    log = work / "log.jsonl"
    if log.is_file():
        log.replace(output.parent / f"{output.name}.log.jsonl")
    shutil.rmtree(work)


def _result(bundle: Bundle, text: TrainingText, outcome: Outcome) -> dict[str, object]:
    return {
        "bundle": bundle.path.name,
        "bundle_digest": bundle.digest,
        "adapter_bytes": bundle.num_bytes,
        "adapter": bundle.manifest.adapter.kind,
        "placement": bundle.manifest.adapter.placement,
        "num_records": text.num_records,
        "num_truncated": text.num_truncated,
        "num_dropped": text.num_dropped,
        **outcome.figures(),
    }
