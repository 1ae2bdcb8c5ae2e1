"""What a run is given, opened, read and found to belong together, before anything is trained or written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters.average import LOW_RANK, mean_spec
from adapters.heads import encoder_of, read_size, require_classifier
from adapters.kinds import declared
from adapters.rates import LEARNING_RATES
from adapters.settings import head_of
from client.objectives.rewardmodel import RewardBundle, read_reward
from client.privacy.run import private_binding
from client.tuning import averages
from client.tuning.config import TuneConfig
from client.tuning.data import TrainingText, prepare, say_files, say_text
from client.tuning.learning import anchor_digest, bound_objective
from client.tuning.rounds import first_step, round_for, start_seed
from client.tuning.runrecord import Planted, planted_for, read_as, text_settings
from offsite.artefacts.bundle import ENCODER_TASKS, AdapterSpec
from offsite.artefacts.job import Job, read_job
from offsite.artefacts.package import Package, open_package
from offsite.artefacts.round import Round
from offsite.audits.accounting import require_extra
from offsite.console import say, utc
from offsite.digests import joined_digest, sha256_file
from offsite.errors import ConfigError, DataError, Expired, UnsupportedModel, WrongBinding
from offsite.seq2seq.models import start_token
from offsite.seq2seq.refusals import refuse_settings
from offsite.staging import refuse_existing
from offsite.tasks.config import RuleSettings
from offsite.tasks.read import read_task
from offsite.tasks.rules import Rules, read_rules
from offsite.tasks.task import Task
from offsite.tensors import TensorSpec
from offsite.text.records import Record, require_files
from offsite.text.rows import files_in
from offsite.training.checkpoints import require_work
from offsite.training.config import LoopConfig
from offsite.training.devices import choose_device
from offsite.training.precision import Settled, settled
from offsite.training.processes import is_launched, world
from offsite.training.trackers import require_trackers

_PASSES_OF_STEP = 3
_FEWEST_VALIDATIONS, _MOST_VALIDATIONS = 3, 10
_NEAR_SECONDS = 3 * 86400
"""A job that ends sooner is said to."""


@dataclass(frozen=True)
class Ready:
    """What the verb was given, opened, read, and found to belong together; `config` has what job and round say."""

    config: TuneConfig
    package: Package
    job: Job | None
    round: Round | None
    planted: Planted
    device: torch.device
    text: TrainingText
    spec: AdapterSpec
    digests: tuple[str, ...]
    eval_digests: tuple[str, ...]
    anchor: str | None
    work: Path
    rules: Rules | None = None
    task: Task | None = None
    reward: RewardBundle | None = None

    @property
    def reward_digest(self) -> str | None:
        """Digest of the bundle that rewards, where there is one."""
        return None if self.reward is None else self.reward.digest

    @property
    def names(self) -> dict[str, TensorSpec]:
        """The adapter's tensors, as a run trains them."""
        return declared(self.spec, self.package.layout, self.package.block_tensors())

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
        binding = _binding(self.config, self.spec, self.package, self.planted, self.round, self.data)
        binding |= {} if self.task is None else {"task": self.task.digest}
        binding |= {"eval": joined_digest(self.eval_digests)} if self.eval_digests else {}
        return binding | bound_objective(self.config, self.anchor, self.rules, self.reward_digest)

    @property
    def data(self) -> str:
        """Digest of all files."""
        return joined_digest(self.digests)


def make_ready(config: TuneConfig) -> Ready:
    """Return what these settings name, once all of it is found to belong together; nothing is trained or written."""
    refuse_existing(config.output)
    config = config.model_copy(update={"data": files_in(config.data), "eval": files_in(config.eval)})
    require_files(config.data)
    require_files(config.eval)
    rules = read_rules(config.rules or RuleSettings()) if config.samples_answers else None
    require_trackers(config.report_to)
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
    reward = None if config.reward is None else read_reward(config.reward, package)
    task = task_for(config, job)
    planted = planted_for(config, package, job)
    if package.is_seq2seq:
        require_answers_alone(config, package)
        config = config.model_copy(update={"pack": False})
    spec = _with_head(config, package, job)
    declared(spec, package.layout, package.block_tensors())
    device = choose_device(config.device)
    reader = package.load_reader()
    digests = [sha256_file(path) for path in config.data]
    eval_digests = tuple(_of_another_file(path, digests) for path in config.eval)
    anchor = anchor_digest(config, [*digests, *eval_digests])
    rows = every_row(config, package, task)
    held_out = every_row(config, package, task, of=config.eval) if config.eval else None
    if world().is_main:
        say_files(config.data, rows)
        say_files(config.eval, held_out or [])
    text = prepare(
        rows,
        reader,
        block_tokens=config.block_tokens,
        batch_size=config.batch_size,
        packed=config.packed,
        on_long=config.on_long,
        validation=config.held_out_share,
        seed=config.seed,
        audit_share=config.audit_share,
        canaries=planted.records,
        first_step=first_step(round_),
        num_new=config.num_new,
        ended=spec.head is None,
        start=start_token(package.empty_model().config) if package.is_seq2seq else None,
        held_out=held_out,
    )
    if config.dp is not None and text.num_in_both:
        raise DataError(
            f"--dp: {text.num_in_both} rows of --data stand in --eval, too: one row there would decide about several",
            hint="take them out of one of the two",
        )
    if world().is_main:
        say_text(text)
    config = config.model_copy(update={"precision": _precision(config, device, work)})
    found = (config, package, job, round_, planted, device, text, spec, tuple(digests), eval_digests, anchor, work)
    return Ready(*found, rules, task, reward)


def _of_another_file(path: Path, data: Sequence[str]) -> str:
    """Return the digest of a file that is validated on.

    Raises:
        ConfigError: when it is one of the files that are trained on.
    """
    found = sha256_file(path)
    if found in data:
        raise ConfigError(f"--eval: {path.name} is among --data", hint="held-out text is not tuned on")
    return found


def every_row(
    config: TuneConfig, package: Package, task: Task | None, *, of: Sequence[Path] | None = None
) -> list[Record]:
    """Return all rows of the data, or of these files, as the run reads them.

    Raises:
        DataError, ConfigError: as `read_as`.
    """
    return read_as(
        config.data if of is None else of,
        text_settings(config, task),
        share_documents=config.by_user,
        pairs=config.reads_pairs,
        questions=config.samples_answers,
        labels=config.labels,
        of_head=config.objective if config.has_head else "",
        images=package.pixels is not None,
    )


def require_answers_alone(config: TuneConfig, package: Package) -> None:
    """Return only if nothing is asked that an encoder-decoder does not learn yet.

    Raises:
        ConfigError: naming the settings.
    """
    asked = {
        f"--objective {config.objective}": config.objective not in ("next-token", "dft"),
        "--dp": config.dp is not None,
        "--canaries": config.canaries is not None,
        "--round": config.round is not None,
        "--anchor": config.anchor is not None,
        "--channel-dropout": config.channel_dropout > 0,
        "--launch": config.launch > 1,
        "--pack": config.pack and "pack" in config.model_fields_set,
    }
    hint = "tune it on rows of a prompt and an answer, by --objective next-token or dft"
    refuse_settings(f"package {package.path.name!r}", asked, hint)


def _with_head(config: TuneConfig, package: Package, job: Job | None) -> AdapterSpec:
    """Return the adapter, with the head that these settings ask for and the package's model can carry.

    Raises:
        WrongBinding: when the job's head reads states of another size than the package's.
        UnsupportedModel: when the package's architecture takes none, or is an encoder and there is to be none.
    """
    spec = config.spec()
    known = ENCODER_TASKS if package.pixels is None else ("classify",)
    if package.is_encoder and config.objective not in known:
        what = "a text and a label, or regress, or tag" if package.pixels is None else "an image and a label"
        raise UnsupportedModel(
            f"package {package.path.name!r} holds an encoder, which has no next tokens: --objective {config.objective} "
            "cannot be learnt on it",
            hint=f"tune it with --objective classify --labels A,B on rows of {what}",
        )
    if not config.has_head:
        return spec
    model = package.empty_model()
    require_classifier(model, config.objective)
    head = head_of(config.objective, config.labels, read_size(model), encoder_of(model))
    found = spec.model_copy(update={"head": head})
    if job is not None and job.adapter.head != found.head:
        raise WrongBinding(
            f"job {job.job_id[:12]} asks for a head on other states than those of package {package.path.name!r}",
            hint="give the job that came with this package",
        )
    return found


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


def task_for(config: TuneConfig, job: Job | None) -> Task | None:
    """Return the task by which the data is read: the job's, else the one that these settings name, if any.

    Raises:
        ConfigError, DataError: when the task's file is not as needed, or its rows are to be pairs.
        WrongBinding: when the job carries another task than the file holds.
    """
    named = None if config.task is None else read_task(config.task)
    carried = None if job is None else job.task
    if named is not None and carried is not None and named.digest != carried.digest:
        raise WrongBinding(
            f"--task: the job carries task {carried.name!r}, {carried.digest[:19]}, the file holds another",
            hint="leave --task out, and the job's is taken",
        )
    if carried is not None and (config.compares_answers or config.samples_answers or config.has_head):
        raise ConfigError(
            f"--objective {config.objective}: the job carries task {carried.name!r}, whose rows are prompts and answers"
        )
    return named if carried is None else carried


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
        evaluate_every=config.evaluate_every or _steps_between(config, text, steps),
        patience=config.patience,
        tensorboard=config.tensorboard,
        report=config.report(config.output, is_sealed=config.sealed_off),
    )


def _precision(config: TuneConfig, device: torch.device, work: Path) -> Settled:
    """Return the arithmetic of all runs that these settings start, in whatever process; of resumed ones, their own."""
    if not config.resume:
        return settled(config.precision, device)
    folders = [work, *(averages.folder_of(work, number) for number in range(1, config.runs + 1))]
    stated = next((one for one in map(averages.precision_of, folders) if one), None)
    return settled(config.precision, device, works=folders, stated=stated)


def _steps_between(config: TuneConfig, text: TrainingText, steps: int) -> int:
    """Return after how many steps a run is validated: a tenth of them, up to a third where that takes longer.

    Longer than training does: a step takes about three passes over its tokens, a validation one over all held out. A
    private run is validated at its end alone; its interval is part of what it is resumed by.
    """
    if config.dp is not None:
        return max(1, steps // _MOST_VALIDATIONS)
    if config.samples_answers:  # what takes long is to answer
        affordable = steps * config.batch_size * config.rloo_samples // len(text.validation)
        return -(-steps // max(_FEWEST_VALIDATIONS, min(_MOST_VALIDATIONS, affordable)))
    trained = _PASSES_OF_STEP * steps * text.batches.num_tokens(0)
    sides = [side for example in text.validation for side in example.sides]
    affordable = trained // sum(len(side.input_ids) + len(side.source) for side in sides)
    return -(-steps // max(_FEWEST_VALIDATIONS, min(_MOST_VALIDATIONS, affordable)))


def work_folder(output: Path) -> Path:
    """Return where checkpoints of a run towards `output` live: ``OUTPUT.work``."""
    return output.parent / f"{output.name}.work"


def _advised(config: TuneConfig, job: Job) -> TuneConfig:
    """Return the settings with the job's learning rate, if it is used, and say whether it is."""
    found = config.advised(job)
    if world().is_main and found is config:
        how = "--objective rloo" if config.samples_answers else "--dp"
        why = f"tuning with {how} does not take it" if config.learning_rate is None else f"{config.rate():g} is used"
        say(f"the job advises learning rate {job.learning_rate:g}; {why}")
    elif world().is_main:
        say(f"learning rate {found.rate():g}, as the job advises; --learning-rate takes another")
    return found


def _binding(
    config: TuneConfig, spec: AdapterSpec, package: Package, planted: Planted, round_: Round | None, data: str
) -> dict[str, str]:
    """Return what a resumed run must share beside the loop's settings, one entry per setting."""
    text = ("fields", "document_field", "separator", "on_long", "pack", "block_tokens", "validation", "audit_share")
    shared = config.model_dump(mode="json", include={*text, "batch_size"}) | {"canaries": planted.commitment}
    shared |= {f"adapter.{name}": value for name, value in spec.model_dump(mode="json").items()}
    shared |= {} if round_ is None else {"round": round_.digest}
    shared |= {} if config.runs == 1 else {"runs": config.runs}
    bound = {"package": package.digest, "data": data, **{k: str(v) for k, v in shared.items()}}
    return bound if config.dp is None else bound | private_binding(config.dp)
