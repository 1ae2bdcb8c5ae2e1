"""One run: an untrained adapter on the package's model, trained on the client's text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from adapters.held import hold_frozen
from adapters.kinds import Attached, attach, declared
from adapters.shared import share_products
from client.objectives import tokens
from client.objectives.tokens import next_token_loss
from client.privacy.run import PrivateRun, Series, private_run
from client.tuning import averages
from client.tuning.config import TuneConfig
from client.tuning.data import TrainingText, require_fit
from client.tuning.hidden import FOLDER, kept_states
from client.tuning.learning import learning_for, require_objective
from client.tuning.ready import Ready, loop_settings
from client.tuning.rounds import begin, grow, start_seed, with_proximal
from offsite.artefacts.bundle import open_bundle
from offsite.artefacts.package import Package, open_package
from offsite.artefacts.round import Round
from offsite.audits.runs import AveragedRun
from offsite.console import say
from offsite.digests import joined_digest
from offsite.encoders.outputs import outputs_of
from offsite.encoders.trunk import is_encoder
from offsite.errors import ConfigError, RunFailed, UnsupportedModel
from offsite.evaluation.measure import perplexity
from offsite.modelling.head import causal_lm
from offsite.tensors import torch_dtype
from offsite.text.batches import Example, collate
from offsite.training.config import LoopConfig
from offsite.training.devices import free_bytes
from offsite.training.loop import Batches, Outcome, require_resumable, train
from offsite.training.memory import bytes_of_step, fits
from offsite.training.precision import uses_bf16
from offsite.training.processes import is_launched, world
from offsite.training.step import StepLoss, Stepper

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offsite.artefacts.bundle import AdapterSpec


def attach_to_package(
    package: Package, spec: AdapterSpec, *, device: torch.device, seed: int = 0, round_: Round | None = None
) -> Attached:
    """Return the package's model with a fresh adapter on it; the same seed, in the same round, gives the same start.

    Args:
        round_: of a federation, whose earlier rounds' update is in the model's weights.

    Raises:
        ConfigError: when the package cannot carry that adapter in that place.
        ArtefactError: when a tensor of the package is not the declared, finite one.
    """
    names = declared(spec, package.layout, package.block_tensors())
    model = package.load_model(dtype="float32", seq2seq=True)
    grow(model, package, spec, round_)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start_seed(seed, round_))
        attached = attach(model, spec, package.layout.blocks, names)
    if not is_launched():  # of several processes, sharding places each block
        attached.model.to(device)
    return attached


def load_writer(
    folder: Path, bundle: Path | None, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Return a package's model that writes text, with a bundle's adapter if one is given, its tokenizer, and a digest.

    Raises:
        UnsupportedModel: when the package holds no model that writes text, or the bundle a head.
        WrongBinding: when the bundle is for another package.
        ConfigError: when the bundle answers a federation's round, whose weights it needs.
        ArtefactError: when package or bundle is not as it has to be.
    """
    package = open_package(folder)
    package.require_text("generate", seq2seq=True)
    tokenizer = package.load_tokenizer()
    if bundle is None:
        return package.load_model(device=str(device), seq2seq=True), tokenizer, package.digest
    found = open_bundle(bundle)
    found.bind(package_digest=package.digest, base_digest=package.manifest.base_digest)
    spec = found.manifest.adapter
    if spec.head is not None:
        raise UnsupportedModel(
            f"bundle {bundle.name!r} is a head for {spec.head.task}: it writes no text",
            hint="its owner's offsite serve answers with it; offsite audit bundle measures it here",
        )
    if found.manifest.round_digest is not None:
        raise ConfigError(
            f"bundle {bundle.name!r} answers a federation's round, whose weights this package does not have",
            hint="the owner's adapted folder of that round can be asked",
        )
    attached = attach_to_package(package, spec, device=device)
    attached.load(found.load_tensors(declared(spec, package.layout, package.block_tensors())))
    model: Any = causal_lm(attached.model)
    return model.eval(), tokenizer, joined_digest([package.digest, found.digest])


def tune(
    attached: Attached,
    text: TrainingText,
    settings: LoopConfig,
    *,
    work: Path,
    resume: bool = False,
    binding: Mapping[str, str] | None = None,
    label: str = "tune",
    sent_as: str = "float32",
    private: PrivateRun | None = None,
    loss: StepLoss = next_token_loss,
    batches: Batches | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    figures: Callable[[], Mapping[str, float]] | None = None,
) -> Outcome:
    """The adapter holds the weights of the lowest validation loss; of a private run, those after the last step.

    Args:
        attached: model and adapter, on the device they train on; trained in place.
        work: folder for checkpoints and the log; the caller removes it.
        sent_as: dtype of the bundle, in which something must have changed.
        loss: what is minimised.
        batches: read in place of the text's own, where the loss takes more than those hold.
        validate: gives the validation loss of the model; without it, that is the held-out text's, per token.
        figures: gives what else is told of a step.
        private: draws the batches and takes the steps; private text then has no say in which weights are kept, and is
            validated on once, at the end.

    Raises:
        ConfigError: when `work` holds a run that is not to be resumed, or one of other settings.
        RunFailed: when a loss is not finite, the disk is full, or no weight moved.
    """
    before = attached.tensors()
    model: Any = attached.model
    precision: Literal["bf16", "fp32"] = "bf16" if uses_bf16(settings.precision, _device(model)) else "fp32"
    model.train()

    def evaluate() -> float:
        try:
            if validate is not None:
                return validate(model)
            return perplexity(model, text.validation, batch_size=8, pad_id=text.pad_id, precision=precision).loss
        except RunFailed:
            return math.inf  # the loop says at which step, and what is kept

    first = evaluate() if private is not None else None  # of others the loop takes it, and keeps it for a resumed run
    model.train()
    outcome = train(
        model,
        attached.trainable,
        (batches or text.batches) if private is None else private.batches(),
        loss,
        settings,
        work=work,
        resume=resume,
        label=label,
        evaluate=evaluate if private is None else None,
        evaluate_before=True,
        keep_best=private is None,
        shard_blocks=attached.blocks,
        binding=binding,
        make_stepper=Stepper if private is None else private.make_stepper,
        figures=figures,
    )
    model.eval()
    if outcome.tensors:
        _require_moved(before, outcome.tensors, sent_as, _UNLIKE if figures is not None else "")
    if private is not None:
        private.require_moved(before, outcome.tensors)
        found = evaluate()
        best = (found, [(outcome.steps, found)]) if math.isfinite(found) else (None, [])
        outcome = replace(outcome, best_loss=best[0], evaluations=best[1], before_loss=first)
    return outcome


_UNLIKE = "reward some of the answers to a prompt more than others (--rules, --reward), or "


def _require_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], sent_as: str, first: str = "") -> None:
    if all(torch.equal(after[name].cpu(), old) for name, old in before.items()):
        hint = f"{first}raise --learning-rate, or train for more steps"
        raise RunFailed("no weight moved during training", hint=hint)
    dtype = torch_dtype(sent_as)
    if all(torch.equal(after[name].cpu().to(dtype), old.to(dtype)) for name, old in before.items()):
        raise RunFailed(
            f"no weight moved far enough to show in {sent_as}", hint="raise --learning-rate, or --adapter-dtype float32"
        )


@dataclass(frozen=True)
class Done:
    """What goes into the bundle, and what is told of it; `config` has the steps that were taken."""

    config: TuneConfig
    spec: AdapterSpec
    tensors: Mapping[str, Tensor]
    outcome: Outcome
    losses: list[float]
    guarantee: dict[str, object] | None
    averaged: tuple[AveragedRun, ...] = ()
    told: Mapping[str, object] = field(default_factory=dict)


def train_run(ready: Ready, number: int = 1, *, label: str = "tune") -> Done | None:
    """Return what a run did, None in processes that are not the main one; one of several is kept in its folder.

    Args:
        number: of the run among several, from 1; each has a start and batches of its own, and the same text.
        label: what the progress of a single run is shown as.
    """
    config, text, several = ready.config, ready.text, ready.config.runs > 1
    seed = config.seed + number - 1
    work = averages.folder_of(ready.work, number) if several else ready.work
    if several:
        text = replace(text, batches=text.batches.reseeded(seed))
    attached = attach_to_package(ready.package, ready.spec, device=ready.device, seed=seed, round_=ready.round)
    begun = begin(attached, ready.spec, ready.round)
    require_fit(text, attached.model)  # type: ignore[arg-type]
    if config.dp is None and not is_launched():  # clipping looks into each layer, sharding into each block
        share_products(attached)
    binding = ready.bound
    require_objective(config, text, steps=loop_settings(config, text).steps, rules=ready.rules)
    board = config.tensorboard
    more: dict[str, object] = {"seed": start_seed(seed, ready.round)}
    more |= {} if board is None or not several else {"tensorboard": board / work.name}
    report = config.report(config.output, is_sealed=config.sealed_off)
    if report is not None and several:
        more["report"] = report.model_copy(update={"folder": report.folder / work.name})
    if config.resume and config.dp is None:  # before anything of this run is written
        require_resumable(work, loop_settings(config, text).model_copy(update=more), binding)
    if _may_hold(config) and uses_bf16(config.precision, ready.device):
        hold_frozen(attached)
    _save_memory(config, attached, text)
    make_room(work)
    series = Series(number, config.runs, averages.folder_of(ready.work, 1)) if several else None
    spending = _charged(config, text, work, binding, series) if config.dp else nullcontext()
    with spending as private, _kept(ready, config, text, attached) as kept:
        if kept is not None:
            binding["hidden_states"] = kept
        if private is not None:
            binding["run"] = private.account.run
            config = config.model_copy(update={"steps": private.steps})
            more |= _spending_told(loop_settings(config, text).model_copy(update=more), private)
        learning = learning_for(
            config.model_copy(update={"seed": seed}),
            attached,
            ready.package,
            text,
            ready.package.load_reader(),
            next_token_loss,
            steps=loop_settings(config, text).steps,
            work=work,
            binding=binding,
            rules=ready.rules,
            reward=ready.reward,
        )
        validation = learning.validation
        world().wait()  # every process has found the canaries unused
        if world().is_main:
            ready.planted.mark(config)
        outcome = tune(
            attached,
            text,
            loop_settings(config, text).model_copy(update=more),
            work=work,
            # pairs and hidden states lie there before the first step
            resume=config.resume or config.compares_answers or kept is not None,
            binding=binding,
            label=f"run {number} of {config.runs}" if several else label,
            sent_as=config.adapter_dtype,
            private=private,
            loss=with_proximal(learning.loss, attached, begun, ready.spec),
            batches=learning.batches,
            validate=None if validation is None else validation.told,
            figures=learning.figures,
        )
        told = {} if validation is None else validation.figures(attached.model)
        outcome = replace(outcome, tensors=learning.units.folded(outcome.tensors))
        if not world().is_main:
            return None
        guarantee = None
        if several:
            whole = replace(outcome, tensors={**outcome.tensors, **begun.frozen})
            run_id, engine = (None, None) if private is None else (private.account.run, private.engine)
            averages.keep(work, whole, settings=ready.binding(number), charged=run_id, engine=engine)
        elif private is not None:
            guarantee = private.release(outcome.tensors)
    losses = [outcome.first_loss, outcome.final_loss, *(loss for _, loss in outcome.evaluations)]
    losses += [] if outcome.before_loss is None else [outcome.before_loss]
    return Done(config, ready.spec, {**outcome.tensors, **begun.frozen}, outcome, losses, guarantee, told=told)


def _spending_told(settings: LoopConfig, private: PrivateRun) -> dict[str, object]:
    """Return what a private run's curves are told beside the rest: the epsilon that it was charged."""
    if settings.report is None:
        return {}
    return {"report": settings.report.model_copy(update={"epsilon": private.guarantee.spent.epsilon})}


def _may_hold(config: TuneConfig) -> bool:
    """Tell whether the model is called under autocast alone; whether its cache is right is tried in float32."""
    return config.dp is None and not is_launched() and not config.samples_answers


def _kept(
    ready: Ready, config: TuneConfig, text: TrainingText, attached: Attached
) -> AbstractContextManager[str | None]:
    """Return the context in which nothing below the adapter is computed twice; it yields None where all is computed."""
    if config.dp is not None or is_launched() or config.channel_dropout or config.samples_answers:
        return nullcontext()
    if ready.package.is_seq2seq or ready.package.pixels is not None:  # what enters a block hangs on more than tokens
        return nullcontext()
    steps = loop_settings(config, text).steps
    drawn = {id(row): row for step in range(steps) for row in text.batches.chosen(step)}
    precision = "bf16" if uses_bf16(config.precision, ready.device) else "fp32"
    return kept_states(
        attached,
        [side for row in (*drawn.values(), *text.validation) for side in row.sides],
        pad_id=text.pad_id,
        folder=ready.work / FOLDER,
        limit_bytes=config.cache_bytes,
        binding={
            "package": ready.package.digest,
            "round": "" if ready.round is None else ready.round.digest,
            "precision": precision,
        },
        autocast=lambda: torch.autocast(
            ready.device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
        ),
    )


def _save_memory(config: TuneConfig, attached: Attached, text: TrainingText) -> None:
    """Activations are computed anew in the backward pass instead of kept: as asked for, or where they would not fit.

    Raises:
        ConfigError: when it is asked for and the architecture cannot.
    """
    model: Any = attached.model
    is_asked = "gradient_checkpointing" in config.model_fields_set
    if is_asked and not config.gradient_checkpointing:
        return
    if not is_asked:
        if config.dp is not None or is_launched() or not model.supports_gradient_checkpointing:
            return
        device = _device(model)
        rows = math.ceil(config.batch_size * config.rows_each / config.accumulate)
        one = collate([_longest(config, text)], text.pad_id)
        loss = _loss_of_states if is_encoder(causal_lm(model)) else tokens.next_token_loss
        needed, free = rows * bytes_of_step(model, one, loss, config.precision), free_bytes(device)
        if fits(needed, free):
            return
        say(
            f"activations of a step would take {needed / 1e9:.1f} GB, {(free or 0) / 1e9:.1f} GB are free: they are "
            "computed twice instead of kept (--no-gradient-checkpointing keeps them)"
        )
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        raise ConfigError("--gradient-checkpointing: the package's architecture does not support it") from None


def _longest(config: TuneConfig, text: TrainingText) -> Example:
    """Return the longest row of a step, or what is as long: of answers to come, as long as they may get."""
    if config.samples_answers:
        ids = [*max((row.prompt for row in text.examples), key=len), *[text.pad_id] * config.max_new_tokens]
        return Example(ids, ids)
    return max((side for row in text.examples for side in row.sides), key=_length)


def _length(row: Example) -> int:
    return len(row.input_ids) + len(row.source)


def _loss_of_states(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a loss that keeps what an encoder's step keeps: the sum of its last hidden states, and their number."""
    states_BTD = outputs_of(causal_lm(model), batch)
    return states_BTD.float().sum(), torch.tensor(states_BTD.numel())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def make_room(work: Path) -> None:
    """The work folder stands. Raises RunFailed when it cannot be made."""
    if not world().is_main:
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFailed(f"cannot write {work.name!r}: {(error.strerror or 'i/o error').lower()}") from None


def _charged(
    config: TuneConfig, text: TrainingText, work: Path, binding: Mapping[str, str], series: Series | None
) -> AbstractContextManager[PrivateRun]:
    """Return the private run that these settings and this text make."""
    return private_run(
        config.dp,  # type: ignore[arg-type]
        examples=text.examples,
        num_validation_documents=len({example.document for example in text.validation}),
        records=text.read,
        pad_id=text.pad_id,
        batch_size=config.batch_size,
        steps=config.steps,
        epochs=config.epochs,
        resume=config.resume,
        work=work,
        binding=binding,
        weighs_tokens=config.objective == "dft",
        series=series,
    )
