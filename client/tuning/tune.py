"""`offsite tune PACKAGE --data FILE -o BUNDLE`: train an adapter against the emulator, on this machine.

Needs the package and the data and nothing else: no network, no full model, no code of the owner's.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.average import LOW_RANK, mean_of, mean_spec
from adapters.kinds import Attached, attach, declared
from adapters.norms import adapted_names, base_tensors
from adapters.rates import LEARNING_RATES
from adapters.rounds import grown
from client.privacy.dpsgd import free_bytes, units_of
from client.privacy.run import PrivateRun, Series, private_binding, private_run, release_mean
from client.tuning import averages
from client.tuning.averages import Kept
from client.tuning.config import TuneConfig
from client.tuning.data import TrainingText, prepare, require_fit, say_text
from client.tuning.learning import anchor_digest, bound_objective, learning_for
from client.tuning.rounds import answered, begin, first_step, grow, round_for, start_seed, with_proximal
from client.tuning.runrecord import Planted, planted_for, read_as, record_of, text_settings
from client.tuning.sandbox import require_quiet, sealing
from client.tuning.scan import Scan, losses_in, require_clean, scan_bundle, texts_of
from client.tuning.sidebyside import num_at_once, train_side_by_side
from offsite.artefacts.bundle import Bundle, write_bundle
from offsite.artefacts.job import Job, read_job
from offsite.artefacts.package import Package, open_package
from offsite.artefacts.round import Round
from offsite.audits.accounting import require_extra
from offsite.audits.record import AveragedRun, run_path, write_run
from offsite.console import muted, say, say_next, utc
from offsite.digests import joined_digest, sha256_file
from offsite.errors import ConfigError, Expired, OffsiteError, RunFailed, WrongBinding
from offsite.evaluation.measure import perplexity
from offsite.staging import refuse_existing, staged_file
from offsite.tensors import TensorSpec, torch_dtype
from offsite.text.batches import IGNORED
from offsite.text.records import require_files
from offsite.training.checkpoints import require_work
from offsite.training.config import LoopConfig
from offsite.training.devices import choose_device
from offsite.training.loop import Batches, Outcome, train
from offsite.training.processes import is_launched, world
from offsite.training.step import StepLoss, Stepper, uses_bf16

_NEAR_SECONDS = 3 * 86400
"""A job that ends sooner is said to."""

_MODEL_COPIES = 3  # in float32: as it is loaded, as it stands, and its activations, about
_TRAINED_COPIES = 5  # of what is trained: gradients, two moments, the best ones, room

if TYPE_CHECKING:
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
    model = package.load_model(dtype="float32")
    grow(model, package, spec, round_)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start_seed(seed, round_))
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
    sent_as: str = "float32",
    private: PrivateRun | None = None,
    loss: StepLoss = next_token_loss,
    batches: Batches | None = None,
) -> Outcome:
    """The adapter holds the weights of the lowest validation loss; of a private run, those after the last step.

    Args:
        attached: model and adapter, on the device they train on; trained in place.
        work: folder for checkpoints and the log; the caller removes it.
        sent_as: dtype of the bundle, in which something must have changed.
        loss: what is minimised.
        batches: read in place of the text's own, where the loss takes more than those hold.
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
    )
    model.eval()
    if outcome.tensors:
        _require_moved(before, outcome.tensors, sent_as)
    if private is not None:
        private.require_moved(before, outcome.tensors)
        found = evaluate()
        best = (found, [(outcome.steps, found)]) if math.isfinite(found) else (None, [])
        outcome = replace(outcome, best_loss=best[0], evaluations=best[1], before_loss=first)
    return outcome


def _require_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], sent_as: str) -> None:
    if all(torch.equal(after[name].cpu(), old) for name, old in before.items()):
        raise RunFailed("no weight moved during training", hint="raise --learning-rate, or train for more steps")
    dtype = torch_dtype(sent_as)
    if all(torch.equal(after[name].cpu().to(dtype), old.to(dtype)) for name, old in before.items()):
        raise RunFailed(
            f"no weight moved far enough to show in {sent_as}", hint="raise --learning-rate, or --adapter-dtype float32"
        )


@sealing
def run(config: TuneConfig) -> dict[str, object]:
    """Run the verb: open, read, train, write the bundle.

    Raises:
        ConfigError, DataError, ArtefactError, PolicyError, RunFailed: as the steps it is made of.
    """
    ready = _ready(config)
    done = _one(ready) if ready.config.runs == 1 else _mean(ready)
    return {} if done is None else _written(ready, done)


def train_one(config: TuneConfig, number: int) -> None:
    """One of the several runs of these settings is done, and kept in its folder; nothing else is written.

    Args:
        number: of the run, from 1.

    Raises:
        ConfigError, DataError, ArtefactError, PolicyError, RunFailed: as `run`.
    """
    with muted():
        ready = _ready(config)
    _train(ready, number)


@dataclass(frozen=True)
class _Ready:
    """What the verb was given, opened, read, and found to belong together; `config` has what job and round say."""

    config: TuneConfig
    package: Package
    job: Job | None
    round: Round | None
    planted: Planted
    device: torch.device
    text: TrainingText
    digests: tuple[str, ...]
    anchor: str | None
    work: Path

    @property
    def names(self) -> dict[str, TensorSpec]:
        """The adapter's tensors, as a run trains them."""
        return declared(self.config.spec(), self.package.layout, self.package.block_tensors())

    @property
    def mean_rank(self) -> int | None:
        """The rank that the mean of several runs is cut to; None where it is not."""
        return self.config.rank if self.config.is_cut and self.config.adapter in LOW_RANK else None

    def binding(self, number: int) -> dict[str, str | int | float | bool]:
        """Return what a run that is done must share with this one to be taken for it."""
        seed = start_seed(self.config.seed + number - 1, self.round)
        loop = loop_settings(self.config, self.text).model_copy(update={"seed": seed})
        return {**loop.binding(), **self.bound}

    @property
    def bound(self) -> dict[str, str]:
        """What every run must share beside the loop's settings to be resumed."""
        binding = _binding(self.config, self.package, self.planted, self.round, self.data)
        return binding | bound_objective(self.config, self.anchor)

    @property
    def data(self) -> str:
        """Digest of all files."""
        return joined_digest(self.digests)


@dataclass(frozen=True)
class _Done:
    """What goes into the bundle, and what is told of it; `config` has the steps that were taken."""

    config: TuneConfig
    spec: AdapterSpec
    tensors: Mapping[str, Tensor]
    outcome: Outcome
    losses: list[float]
    guarantee: dict[str, object] | None
    averaged: tuple[AveragedRun, ...] = ()
    told: Mapping[str, object] = field(default_factory=dict)


def _ready(config: TuneConfig) -> _Ready:
    """Return what these settings name, once all of it is found to belong together; nothing is trained or written."""
    refuse_existing(config.output)
    require_files(config.data)
    if config.dp is not None:
        require_extra()
    if config.launch > 1 and not is_launched():
        raise ConfigError("--launch starts processes from the command line only", hint="offsite tune ... --launch N")
    work = work_folder(config.output)
    require_work(work, resume=config.resume)
    averages.require_kind(work, num_runs=config.runs)
    package = open_package(config.package)
    job = job_for(config.job, package) if config.job is not None else None
    if job is not None:
        require_in_time(job, now=time.time())
        config = config.under(job.adapter)
    round_ = round_for(config, package, job)
    if round_ is not None:
        config = config.within(round_.manifest)
    if job is not None and job.learning_rate is not None:
        config = _advised(config, job)
    if config.runs > 1:
        mean_spec(config.spec(), config.runs, rank=config.rank if config.is_cut else None)
    if world().is_main and config.is_far_beyond_usual():
        usual = LEARNING_RATES[config.adapter]
        say(
            f"warning: learning rate {config.rate():g} is {config.rate() / usual:.0f} times the usual {usual:g} of "
            f"{config.adapter}: it can make things worse, or learn rows by heart"
        )
    planted = planted_for(config, package, job)
    declared(config.spec(), package.layout, package.block_tensors())
    device = choose_device(config.device)
    tokenizer = package.load_tokenizer()
    digests = [sha256_file(path) for path in config.data]
    anchor = anchor_digest(config, digests)
    text = prepare(
        read_as(config.data, text_settings(config), share_documents=config.by_user),
        tokenizer,
        block_tokens=config.block_tokens,
        batch_size=config.batch_size,
        packed=config.packed,
        on_long=config.on_long,
        validation=config.validation,
        seed=config.seed,
        audit_share=config.audit_share,
        canaries=planted.records,
        first_step=first_step(round_),
    )
    if world().is_main:
        say_text(text)
    return _Ready(config, package, job, round_, planted, device, text, tuple(digests), anchor, work)


def _train(ready: _Ready, number: int = 1) -> _Done | None:
    """Return what a run did, None in processes that are not the main one; one of several is kept in its folder.

    Args:
        number: of the run among several, from 1; each has a start and batches of its own, and the same text.
    """
    config, text, several = ready.config, ready.text, ready.config.runs > 1
    seed = config.seed + number - 1
    work = averages.folder_of(ready.work, number) if several else ready.work
    if several:
        text = replace(text, batches=text.batches.reseeded(seed))
    attached = attach_to_package(ready.package, config.spec(), device=ready.device, seed=seed, round_=ready.round)
    begun = begin(attached, config.spec(), ready.round)
    require_fit(text, attached.model)  # type: ignore[arg-type]
    if config.gradient_checkpointing:
        _checkpoint_activations(attached.model)
    binding = ready.bound
    learning = learning_for(
        config.model_copy(update={"seed": seed}),
        attached,
        ready.package,
        text,
        ready.package.load_tokenizer(),
        next_token_loss,
        steps=loop_settings(config, text).steps,
        work=work,
        binding=binding,
    )
    _make_room(work)
    board = config.tensorboard
    more = {} if board is None or not several else {"tensorboard": board / work.name}
    series = Series(number, config.runs, averages.folder_of(ready.work, 1)) if several else None
    spending = _charged(config, text, work, binding, series) if config.dp else nullcontext()
    with spending as private:
        if private is not None:
            binding["run"] = private.account.run
            config = config.model_copy(update={"steps": private.steps})
        world().wait()  # every process has found the canaries unused
        if world().is_main:
            ready.planted.mark(config)
        outcome = tune(
            attached,
            text,
            loop_settings(config, text).model_copy(update={"seed": start_seed(seed, ready.round), **more}),
            work=work,
            resume=config.resume or config.objective == "spin",  # whose answers lie there before the first step
            binding=binding,
            label=f"run {number} of {config.runs}" if several else "tune",
            sent_as=config.adapter_dtype,
            private=private,
            loss=with_proximal(learning.loss, attached, begun, config.spec()),
            batches=learning.batches,
        )
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
    return _Done(config, config.spec(), {**outcome.tensors, **begun.frozen}, outcome, losses, guarantee)


def _one(ready: _Ready) -> _Done | None:
    """Return what the only run did; None in processes that are not the main one."""
    return _train(ready)


def _mean(ready: _Ready) -> _Done:
    """Return the mean of several runs, once all of them are done; those that are, are not run again."""
    config, numbers = ready.config, range(1, ready.config.runs + 1)
    missing = [number for number in numbers if _kept(ready, number) is None]
    for number in sorted(set(numbers) - set(missing)):
        say(f"run {number} of {config.runs}: done before")
    _make_room(ready.work)
    at_once = 1 if config.parallel == 1 else _num_at_once(ready, len(missing))
    if at_once > 1:
        ready.planted.mark(config)
        child = config.model_copy(update={"resume": True})
        given = child.model_fields_set | {"resume"}
        settings = child.model_dump_json(include=given, exclude={"parallel"})
        train_side_by_side(settings, missing, num_runs=config.runs, at_once=at_once)
    else:
        for number in missing:
            try:
                _train(ready, number)
            except OffsiteError as error:
                raise type(error)(f"run {number} of {config.runs}: {error}", hint=error.hint) from error
    runs = [run for run in (_kept(ready, number) for number in numbers) if run is not None]
    if len(runs) < config.runs:
        raise RunFailed(f"{config.runs - len(runs)} of {config.runs} runs are not done", hint="--resume goes on")
    spec, tensors, lost = mean_of(config.spec(), [run.tensors for run in runs], _base(ready), rank=ready.mean_rank)
    loss = _loss_of(ready, spec, tensors)
    outcome = averages.together(runs, tensors, loss=loss)
    averages.say_runs(runs, loss=loss, lost=lost, rank=ready.mean_rank)
    guarantee = _released(ready, runs, tensors)
    how = "exact" if ready.mean_rank is None else "cut"
    return _Done(
        config,
        spec,
        tensors,
        outcome,
        [*averages.losses_of(runs), *([] if loss is None else [loss])],
        guarantee,
        averages.averaged(runs),
        {"mean": how, "mean_lost": lost, "rank": spec.rank, "runs": averages.told(runs)},
    )


def _kept(ready: _Ready, number: int) -> Kept | None:
    """Return a run that is done, or None."""
    folder, seed = averages.folder_of(ready.work, number), ready.config.seed + number - 1
    return averages.kept(folder, ready.names, seed=seed, settings=ready.binding(number))


def _num_at_once(ready: _Ready, num_missing: int) -> int:
    """Return how many runs may go on at once; each holds the model, its gradients' share and its activations."""
    package = sum(math.prod(spec.shape) for spec in ready.package.manifest.tensors.values())
    adapter = sum(math.prod(spec.shape) for spec in ready.names.values())
    return num_at_once(
        ready.config.parallel,
        num_missing,
        need_bytes=_MODEL_COPIES * 4 * package + _TRAINED_COPIES * 4 * adapter,
        free_bytes=free_bytes(ready.device),
    )


def _base(ready: _Ready) -> dict[str, Tensor]:
    """Return the weights that the runs began with, where the adapter replaces them; nothing is read for others."""
    spec = ready.config.spec()
    if spec.kind in LOW_RANK:
        return {}
    base = base_tensors(ready.package, adapted_names(spec, ready.package.layout, ready.package.block_tensors()))
    return base if ready.round is None else grown(base, ready.round)


def _loss_of(ready: _Ready, spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> float | None:
    """Return the held-out loss of the package's model with that adapter; None where it is not finite."""
    attached = attach_to_package(ready.package, spec, device=ready.device, round_=ready.round)
    attached.load(tensors)
    model: Any = attached.model
    model.eval()
    precision: Literal["bf16", "fp32"] = "bf16" if uses_bf16(ready.config.precision, _device(model)) else "fp32"
    held_out = ready.text.validation
    try:
        found = perplexity(model, held_out, batch_size=8, pad_id=ready.text.pad_id, precision=precision).loss
    except RunFailed:
        return None
    return found if math.isfinite(found) else None


def _released(ready: _Ready, runs: Sequence[Kept], tensors: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Return what the mean of private runs may claim, now that the ledger has it; None of others."""
    config = ready.config
    if config.dp is None:
        return None
    units = units_of(ready.text.examples, unit=config.dp.unit, rows_per_user=config.dp.rows_per_user)
    return release_mean(
        config.dp,
        [averages.folder_of(ready.work, number) for number in range(1, config.runs + 1)],
        [run.record.charged or "" for run in runs],
        tensors,
        num_units=len(units),
        batch_size=config.batch_size,
        engine=runs[0].record.engine,
    )


def _written(ready: _Ready, done: _Done) -> dict[str, object]:
    """The bundle stands, and its record before it. Returns the verb's result."""
    config, outcome, text = done.config, done.outcome, ready.text
    names = declared(done.spec, ready.package.layout, ready.package.block_tensors())
    kept = record_of(
        config,
        package=ready.package,
        spec=done.spec,
        data_sha256=ready.data,
        data_files=ready.digests,
        text=text,
        outcome=outcome,
        guarantee=done.guarantee,
        job_id=None if ready.job is None else ready.job.job_id,
        canaries=ready.planted.commitment,
        answered=answered(ready.round),
        anchor=ready.anchor,
        averaged=done.averaged,
    )
    figures = {
        "num_records": text.num_records,
        "num_tokens": outcome.tokens,
        "steps": outcome.steps,
        "validation_loss": math.nan if outcome.best_loss is None else outcome.best_loss,
    }
    scans: list[Scan] = []

    def before(stage: Path, digest: str) -> None:
        scans.append(_release(stage, ready, done, names, figures))
        write_run(run_path(config.output), kept.model_copy(update={"bundle_digest": digest}))

    bundle = write_bundle(
        config.output,
        package=ready.package,
        spec=done.spec,
        tensors=done.tensors,
        expected=names,
        round_digest=None if ready.round is None else ready.round.digest,
        figures=figures,
        disclose=config.disclose,
        before=before,
    )
    ready.planted.mark(config, bundle=bundle.digest)
    _finish(config, ready.work)
    _say_outcome(config, outcome)
    result = _result(bundle, text, outcome) | {"scan": scans[0].model_dump(), **done.told}
    return result | ({} if done.guarantee is None else {"privacy": done.guarantee})


def _release(
    stage: Path, ready: _Ready, done: _Done, names: Mapping[str, TensorSpec], figures: Mapping[str, float]
) -> Scan:
    """Return what was read of the bundle at `stage` once nothing was found in it, and a sealed-off run was quiet.

    Raises:
        PolicyError: when the bundle may not get its name.
    """
    require_quiet()
    config = done.config
    logged = [loss for folder in _folders(config, ready.work) for loss in losses_in(folder / averages.LOG_NAME)]
    scan = scan_bundle(
        stage,
        texts=texts_of(ready.text.read),
        figures=[*done.losses, *logged],
        spec=done.spec,
        disclosed={name: figures[name] for name in config.disclose},
        paths=[*config.data, config.output, config.package, *([] if config.anchor is None else [config.anchor])],
        known=names,
    )
    require_clean(scan)
    say(f"scanned: {scan.num_bytes:,} bytes of the bundle; no text, path, name, time or loss of this machine's in it")
    return scan


def job_for(folder: Path, package: Package) -> Job:
    """Return the opened job in `folder`, which is for this package.

    Raises:
        WrongBinding: when it names another package or base model.
        ArtefactError: when there is no job, or none of the specified form.
    """
    job = read_job(folder).job
    for what, found, wanted in (
        ("package", package.digest, job.package_digest),
        ("base model", package.manifest.base_digest, job.base_digest),
    ):
        if found != wanted:
            raise WrongBinding(
                f"job {folder.name!r} is for {what} {wanted[:19]}, package {package.path.name!r} has {found[:19]}",
                hint="give the job that came with this package",
            )
    return job


def require_in_time(job: Job, *, now: float) -> None:
    """Return only if the owner still takes a bundle of the job; an end that is near is said.

    Args:
        now: seconds since 1970.

    Raises:
        Expired: when nothing that is tuned now would be taken.
    """
    if now > job.expires:
        raise Expired(
            f"job {job.job_id[:12]} expired on {utc(job.expires)}", hint="ask the owner for a new job before tuning"
        )
    if job.expires - now < _NEAR_SECONDS and world().is_main:
        say(f"job {job.job_id[:12]} ends on {utc(job.expires)}: a bundle handed in later is not taken")


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


def _checkpoint_activations(model: Any) -> None:
    """Activations are computed anew in the backward pass instead of kept.

    Raises:
        ConfigError: when the architecture cannot.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        raise ConfigError("--gradient-checkpointing: the package's architecture does not support it") from None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _advised(config: TuneConfig, job: Job) -> TuneConfig:
    """Return the settings with the job's learning rate, if it is used, and say whether it is."""
    found = config.advised(job)
    if world().is_main and found is config:
        why = "tuning with --dp does not take it" if config.learning_rate is None else f"{config.rate():g} is used"
        say(f"the job advises learning rate {job.learning_rate:g}; {why}")
    elif world().is_main:
        say(f"learning rate {found.rate():g}, as the job advises; --learning-rate takes another")
    return found


def work_folder(output: Path) -> Path:
    """Return where checkpoints of a run towards `output` live: ``OUTPUT.work``."""
    return output.parent / f"{output.name}.work"


def _make_room(work: Path) -> None:
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


def _binding(config: TuneConfig, package: Package, planted: Planted, round_: Round | None, data: str) -> dict[str, str]:
    """Return what a resumed run must share beside the loop's settings, one entry per setting."""
    text = ("fields", "document_field", "separator", "on_long", "pack", "block_tokens", "validation", "audit_share")
    shared = config.model_dump(mode="json", include={*text, "batch_size"}) | {"canaries": planted.commitment}
    shared |= {f"adapter.{name}": value for name, value in config.spec().model_dump(mode="json").items()}
    shared |= {} if round_ is None else {"round": round_.digest}
    shared |= {} if config.runs == 1 else {"runs": config.runs}
    bound = {"package": package.digest, "data": data, **{k: str(v) for k, v in shared.items()}}
    return bound if config.dp is None else bound | private_binding(config.dp)


def _say_outcome(config: TuneConfig, outcome: Outcome) -> None:
    """What the run was worth is said, loudly when it made things worse, and what comes next."""
    best, before = outcome.best_loss, outcome.before_loss
    if best is not None and before is not None:
        which = f"best validation loss {best:.4f} at step {outcome.best_step}"
        if config.runs > 1:
            which = f"validation loss of the mean {best:.4f}"
        say(f"{which}, before tuning {before:.4f}")
        if not best < before:
            say("WARNING: tuning made it worse. This bundle is of no use to the owner; it was written all the same.")
            say(f"  try a lower --learning-rate: {config.rate() / 10:g} instead of {config.rate():g}, or more data")
    if config.round is None:
        planted = [] if config.canaries is None else ["--canaries", config.canaries]
        texts = [word for path in config.data for word in ("--data", path)]
        audit = ["offsite", "audit", "bundle", config.package, config.output, *texts, *planted]
        say_next(*audit, "-o", config.output.with_name(f"{config.output.name}-audit"))


def _folders(config: TuneConfig, work: Path) -> list[Path]:
    """Return where the runs' checkpoints and logs are: one folder, or one for each of several."""
    if config.runs == 1:
        return [work]
    return [averages.folder_of(work, number) for number in range(1, config.runs + 1)]


def _finish(config: TuneConfig, work: Path) -> None:
    """The log stands beside the bundle, for the client alone; checkpoints are gone."""
    log = work / averages.LOG_NAME
    target = config.output.parent / f"{config.output.name}.{averages.LOG_NAME}"
    if config.runs > 1:
        with staged_file(target, replace=True) as stage:
            stage.write_bytes(averages.joined_log(_folders(config, work)))
    elif log.is_file():
        log.replace(target)
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
