"""``BUNDLE.run.json``: what a client keeps of a run, so that an audit can repeat how its text was read and split.

It stands before the bundle does, and names the bundle by digest. A crash between the two leaves a record of a bundle
that never was, which says nothing about another; it never leaves a bundle that cannot be audited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from client.tuning.data import rows_drawn
from offsite import __version__
from offsite.audits.canaries import CanarySet, mark_used, read_canaries, records_of, require_unmarked
from offsite.audits.runs import (
    AnsweredRound,
    AveragedRun,
    Claim,
    KeptRun,
    Loop,
    Objective,
    Rewarded,
    TextSettings,
    read_run,
    run_path,
)
from offsite.errors import ArtefactError, PolicyError, WrongBinding
from offsite.tasks.rows import read_task_rows, training_records
from offsite.text.records import Record, read_files

if TYPE_CHECKING:
    from client.tuning.config import TuneConfig
    from client.tuning.data import TrainingText
    from offsite.artefacts.bundle import AdapterSpec
    from offsite.artefacts.job import Job
    from offsite.artefacts.package import Package
    from offsite.tasks.task import Task
    from offsite.training.config import LoopConfig
    from offsite.training.loop import Outcome


def record_of(
    config: TuneConfig,
    *,
    package: Package,
    spec: AdapterSpec | None = None,
    data_sha256: str,
    data_files: Sequence[str] = (),
    eval_files: Sequence[str] = (),
    text: TrainingText,
    outcome: Outcome,
    guarantee: Mapping[str, object] | None = None,
    job_id: str | None = None,
    canaries: str | None = None,
    answered: AnsweredRound | None = None,
    anchor: str | None = None,
    reward: str | None = None,
    averaged: tuple[AveragedRun, ...] = (),
    task: Task | None = None,
    loop: Loop | None = None,
) -> KeptRun:
    """Return the record of a run that ended so, of a bundle whose digest is not known yet: it has all zeros.

    Args:
        config: the settings as the run took them, a job's adapter and a private run's steps among them.
        spec: the bundle's adapter, where it is not the one that was trained: the mean of several runs.
        data_sha256: digest of the data, taken when it was read.
        data_files: digest of each file, where there are several.
        eval_files: digest of each file that was validated on in place of a share of the data.
        guarantee: what `PrivateRun.release` returned, of a private run.
        canaries: digest of the canary set committed to, if any was trained on.
        answered: the federation's round that the run answered, if any.
        anchor: digest of the anchor's file, if there is one.
        reward: digest of the bundle that rewarded, if one did.
        averaged: the several runs whose mean the bundle is, if it is one; `outcome` is of all of them together.
        task: by which the data was read, if by one.
        loop: how long and how exactly each run was to train.
    """
    claim = None if guarantee is None else {name: guarantee[name] for name in Claim.model_fields}
    draws = [(one.seed, one.steps) for one in averaged] or [(config.seed, outcome.best_step)]
    return KeptRun(
        bundle_digest="sha256:" + "0" * 64,
        package_digest=package.digest,
        base_digest=package.manifest.base_digest,
        job_id=job_id,
        adapter=spec or config.spec(),
        data_sha256=data_sha256,
        data_files=tuple(data_files) if len(data_files) > 1 else (),
        eval_files=tuple(eval_files),
        objective=_objective(config, anchor, reward, outcome.ended),
        text=text_settings(config, task),
        num_records=text.num_records,
        num_drawn=_num_drawn(text, draws, config.batch_size, is_private=claim is not None),
        num_tokens=text.num_tokens,
        steps=outcome.best_step,
        steps_run=outcome.steps,
        batch_size=config.batch_size,
        learning_rate=config.rate(),
        canaries=canaries,
        num_canaries=text.num_canaries,
        sealed_off=config.sealed_off,
        claim=None if claim is None else Claim.model_validate(claim),
        round=answered,
        averaged=averaged,
        loop=loop,
        versions=versions(),
    )


def loop_of(settings: LoopConfig) -> Loop:
    """Return what the record says of a run's loop."""
    return Loop.model_validate({name: getattr(settings, name) for name in Loop.model_fields})


def _objective(config: TuneConfig, anchor: str | None, reward: str | None, ended: str | None) -> Objective | None:
    """Return what the run minimised, and by which collapse it ended, if by one."""
    found = config.stated(anchor, reward)
    if found is None or found.rloo is None or ended is None or ended == "patience":
        return found
    rewarded = Rewarded.model_validate({**found.rloo.model_dump(), "ended": ended})
    return found.model_copy(update={"rloo": rewarded})


def _num_drawn(text: TrainingText, draws: Sequence[tuple[int, int]], batch_size: int, *, is_private: bool) -> int:
    """Return how many rows, canaries apart, had a token in a batch of any run; of private runs, about as many.

    Args:
        draws: of each run, the seed of its batches and the step of its weights.
    """
    if is_private:  # drawn by coins that nobody knows
        return min(text.num_records, sum(steps for _, steps in draws) * batch_size)
    own = len(text.rows) - text.num_canaries
    return max(1, sum(number < own for number in rows_drawn(text, draws, whole=False)))


def text_settings(config: TuneConfig, task: Task | None = None) -> TextSettings:
    """Return how the run's text was read and cut."""
    return TextSettings(
        fields=config.fields,
        document_field=(config.dp and config.dp.user_field) or config.document_field,
        separator=config.separator,
        on_long=config.on_long,
        packed=config.packed,
        block_tokens=config.block_tokens,
        validation=config.held_out_share,
        audit_share=config.audit_share,
        seed=config.seed,
        task=task,
    )


@dataclass(frozen=True)
class Planted:
    """Rows of canaries that a run trains on, and the digest committed to; no rows and None without canaries."""

    records: list[Record] = field(default_factory=list, repr=False)
    commitment: str | None = None
    canaries: CanarySet | None = field(default=None, repr=False)

    def mark(self, config: TuneConfig, *, bundle: str | None = None) -> None:
        """The folder of canaries says that this run trains on them, and once it stands, which bundle they are in.

        Raises:
            RunFailed: when the disk is full or the folder cannot be written.
        """
        if config.canaries is not None and self.canaries is not None:
            mark_used(config.canaries, self.canaries, config.output, bundle=bundle)


def planted_for(config: TuneConfig, package: Package, job: Job | None) -> Planted:
    """Return the canaries that these settings name, made for this package and job and for no other bundle.

    Raises:
        WrongBinding: when they were made for another package or job.
        PolicyError: when another run was begun on them.
        ArtefactError: when there are none, or they are unsound.
    """
    if config.canaries is None:
        return Planted()
    canaries, commitment = read_canaries(config.canaries)
    what = f"canaries {config.canaries.name!r}"
    if canaries.package_digest != package.digest:
        raise WrongBinding(
            f"{what} were made for package {canaries.package_digest[:19]}, this is {package.digest[:19]}",
            hint="make canaries with this package",
        )
    job_id = None if job is None else job.job_id
    if canaries.job_id != job_id:
        made, given = (f"job {one[:12]}" if one else "no job" for one in (canaries.job_id, job_id))
        raise WrongBinding(f"{what} were made for {made}, this run is for {given}", hint="give both the same --job")
    require_unmarked(config.canaries, canaries, config.output, resume=config.resume)
    require_unused(config.output, commitment, resume=config.resume)
    return Planted(records_of(canaries), commitment, canaries)


def read_as(
    data: Sequence[Path],
    settings: TextSettings,
    *,
    share_documents: bool = False,
    pairs: bool = False,
    questions: bool = False,
    labels: Sequence[str] = (),
    of_head: str = "",
    images: bool = False,
) -> list[Record]:
    """Return the files' records, read as those settings say.

    Args:
        pairs: the run learns from preferences, and from nothing else.
        questions: the run answers prompts, and learns from its answers' rewards.
        labels: the run learns to tell these, from rows of a text and one of them.
        of_head: task of the head that the run trains.
        images: the rows hold an image in place of the text.

    Raises:
        DataError, ConfigError: as `offsite.text.records.read_files`.
    """
    if settings.task is not None:
        rows = read_task_rows(
            data,
            settings.task,
            fields=settings.fields,
            document_field=settings.document_field,
            share_documents=share_documents,
        )
        return training_records(rows, settings.task)
    return read_files(
        data,
        fields=settings.fields,
        document_field=settings.document_field,
        separator=settings.separator,
        share_documents=share_documents,
        pairs=pairs,
        questions=questions,
        labels=labels,
        of_head=of_head,
        images=images,
    )


def versions() -> dict[str, str]:
    """Return the versions of offsite and of the libraries that compute."""
    return {"offsite": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def require_unused(output: Path, canaries: str, *, resume: bool) -> None:
    """Return only if no record beside `output` says that these canaries went into a bundle.

    A set that two bundles were trained on is known after the first was audited, and its coins are no secret then. This
    also finds a copy of a set, which has no mark of the other's use. The
    record of a run that is resumed may be there: it came to it before its bundle did.

    Raises:
        PolicyError: naming the record.
    """
    for path in sorted(output.parent.glob("*.run.json")):
        if resume and path == run_path(output):
            continue
        try:
            found = read_run(path)
        except ArtefactError:  # somebody else's file, or of a format to come
            continue
        if found.canaries == canaries:
            raise PolicyError(
                f"these canaries were trained on for the bundle of {path.name!r}, a set is for one bundle",
                hint="offsite canaries makes another set",
            )
