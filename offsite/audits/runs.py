"""The client's own record of a run, ``BUNDLE.run.json``, and what an audit quotes of it. Read this file to know what
either may say of how a bundle was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, model_validator

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import JOB_ID_PATTERN
from offsite.artefacts.layout import Key, Line
from offsite.digests import DIGEST_PATTERN
from offsite.errors import ArtefactError
from offsite.folders import read_own
from offsite.staging import staged_file
from offsite.strictjson import Sparse, Strict, parse_strict
from offsite.tasks.config import RuleName
from offsite.tasks.task import Task
from offsite.training.config import Precision, Schedule

RUN_FORMAT: Final = "offsite/run/1"
RECORD_LIMIT_BYTES = 16 * 2**20

Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]
Count = Annotated[int, Field(ge=0)]
MAX_STEPS = 10**6
"""No claim is of more steps: what accountants do with more takes longer than a verifier should wait."""


class Claim(Strict):
    """What a differentially private run claims, and the public constants from which anybody can compute it again.

    ``epsilon`` is of this run by PLD, ``epsilon_total`` of all runs that the client's ledger has on any of the same
    records. ``num_runs`` counts those: runs that were tried and thrown away are among them, choices made by looking at
    their results are not accounted for.
    """

    mechanism: Literal["Poisson-subsampled Gaussian"]
    neighbours: Literal["one unit added or removed"]
    unit: Literal["example", "user"]
    rows_per_user: int | None = Field(None, ge=1)
    number_of_units_public: bool
    epsilon: float = Field(ge=0)
    epsilon_prv: float = Field(ge=0)
    epsilon_rdp: float = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    noise_multiplier: float = Field(gt=0)
    clip: float = Field(gt=0)
    sample_rate: float = Field(gt=0, le=1)
    divisor: int = Field(ge=1)
    steps: int = Field(ge=1, le=MAX_STEPS)
    accountant: Line
    sampler: Literal["poisson"]
    noise: Line
    released: Line
    engine: Key | Line | None = None
    epsilon_total: float = Field(ge=0)
    delta_total: float = Field(gt=0, lt=1)
    budget: float = Field(ge=0)
    num_runs: int = Field(ge=1)
    num_resumes: Count
    num_releases: Count


class TextSettings(Sparse):
    """How a run's text was read and cut, as far as an audit must repeat it; ``task``: by which, if by one.

    ``validation`` is the share of the documents that was validated on; 0 where that was text in files of its own.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"task"})

    fields: dict[str, str] = {}
    document_field: str | None = None
    separator: str | None = None
    on_long: Literal["truncate", "error"] = "truncate"
    packed: bool
    block_tokens: int = Field(ge=2)
    validation: float = Field(ge=0, lt=1)
    audit_share: float = Field(ge=0, lt=1)
    seed: Count
    task: Task | None = None


class Rewarded(Sparse):
    """How a run was rewarded for answers of its model's own (``rloo``).

    Of every prompt ``num_samples`` answers of at most ``max_new_tokens`` were sampled; ``beta`` is what a nat of
    distance from the untuned emulator cost. ``rules`` are the kinds of rules, without what they asked for;
    ``reward_weight`` is what a reward model's number counted, where there was one, and ``reward_digest`` that of its
    bundle, in the client's own record alone. ``ended`` says why the run ended before its last step: its distance was
    beyond ``kl_limit``, or its entropy below ``entropy_floor``.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"reward_weight", "reward_digest", "ended"})

    beta: float = Field(ge=0)
    num_samples: int = Field(ge=2)
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(gt=0)
    kl_limit: float = Field(gt=0)
    entropy_floor: float = Field(ge=0)
    rules: tuple[RuleName, ...] = ()
    reward_weight: float | None = Field(None, gt=0)
    reward_digest: Digest | None = None
    ended: Literal["kl", "entropy"] | None = None

    @model_validator(mode="after")
    def _rewards(self) -> Rewarded:
        if not self.rules and self.reward_weight is None:
            raise ValueError("nothing is rewarded")
        return self


class Objective(Sparse):
    """What a run minimised, where that was not the next token's loss alone.

    A head's labels are in the adapter. The ``dpo_...`` are of preferences, ``rloo`` of rewards, ``spin_beta`` of
    answers before the emulator's own; ``anchor_sha256`` is the digest of the public text on which the tuned emulator
    was held to the untuned one, with ``anchor_weight``; ``channel_dropout`` the chance of an MLP's channel to be left
    out of a step.
    """

    optional: ClassVar[frozenset[str]] = frozenset(
        {"dpo_beta", "dpo_loss", "dpo_label_smoothing", "rloo"}
        | {"spin_beta", "anchor_sha256", "anchor_weight", "channel_dropout"}
    )

    loss: Literal["next-token", "dpo", "rloo", "reward", "classify", "regress", "tag", "dft", "spin"]
    dpo_beta: float | None = Field(None, gt=0)
    dpo_loss: Literal["sigmoid", "ipo"] | None = None
    dpo_label_smoothing: float | None = Field(None, gt=0, lt=0.5)
    rloo: Rewarded | None = None
    spin_beta: float | None = Field(None, gt=0)
    anchor_sha256: Digest | None = None
    anchor_weight: float | None = Field(None, gt=0)
    channel_dropout: float | None = Field(None, gt=0, lt=1)

    def quoted(self) -> Objective:
        """Return what others may read of it: no digest of a file or bundle of the client's."""
        rloo = None if self.rloo is None else self.rloo.model_copy(update={"reward_digest": None})
        return self.model_copy(update={"anchor_sha256": None, "rloo": rloo})


class AnsweredRound(Strict):
    """The round of a federation that a run answered, and at which step of the client's text the run began."""

    digest: Digest
    number: int = Field(ge=1)
    first_step: Count


class AveragedRun(Strict):
    """One of several runs whose mean is the bundle: seed of its batches, step of its weights, steps that it took."""

    seed: Count
    steps: int = Field(ge=1)
    steps_run: int = Field(ge=1)


class Run(Sparse):
    """The client's own record of a run, ``BUNDLE.run.json``. It stays with the client; audits quote it (`quoted`).

    ``num_records`` are those trained on, canaries apart; ``num_drawn`` of them, of a private run about so many, came
    in a batch, if only in part, by the step whose weights are released. That is ``steps``; ``steps_run`` were taken in
    all, the same number in a private run. ``canaries`` is the digest committed to, where any were used. ``round`` is
    None for a run on the package alone; one that answers a round began with the weights that the round gave, and so
    does its audit. Where the bundle is the mean of several runs on the same text, ``averaged`` has each of them,
    ``steps`` and ``steps_run`` are their sums, the rows drawn are those drawn in any of them, and a claim is of all of
    them together. What may be None for the sake of a quotation is never None in the record itself.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"averaged"})

    format: Literal["offsite/run/1"] = RUN_FORMAT
    bundle_digest: Digest
    package_digest: Digest
    base_digest: Digest
    job_id: str | None = Field(None, pattern=JOB_ID_PATTERN)
    adapter: AdapterSpec
    data_sha256: Digest | None
    text: TextSettings
    num_records: int | None = Field(ge=1)
    num_drawn: int | None = Field(None, ge=1)
    num_tokens: int | None = Field(ge=1)
    steps: int = Field(ge=1)
    steps_run: int | None = Field(None, ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    canaries: Digest | None = None
    num_canaries: Count = 0
    sealed_off: bool = False
    claim: Claim | None = None
    round: AnsweredRound | None = None
    averaged: tuple[AveragedRun, ...] = Field((), max_length=64)
    versions: dict[Key, Line] = {}

    @model_validator(mode="after")
    def _adds_up(self) -> Run:
        """Raise ValueError where several runs are not what their sums say."""
        runs = self.averaged
        if not runs:
            return self
        if len(runs) < 2 or [one.seed for one in runs] != list(range(self.text.seed, self.text.seed + len(runs))):
            raise ValueError("averaged: not several runs from the text's seed on")
        if self.steps != sum(one.steps for one in runs) or self.steps_run != sum(one.steps_run for one in runs):
            raise ValueError("averaged: steps are not the sum of the runs'")
        if self.claim is not None and (self.claim.steps != self.steps or self.claim.num_runs < len(runs)):
            raise ValueError("averaged: the claim is not of all the runs")
        return self

    @property
    def draws(self) -> tuple[tuple[int, int], ...]:
        """Of each run, the seed of its batches and the step whose weights were taken."""
        return tuple((one.seed, one.steps) for one in self.averaged) or ((self.text.seed, self.steps),)


class Loop(Strict):
    """How long and how exactly a run was to train, beside what `Run` says: what a retuning has to repeat.

    ``steps`` are those that were planned.
    """

    steps: int = Field(ge=1)
    warmup_steps: Count
    schedule: Schedule
    weight_decay: float = Field(ge=0)
    clip_norm: float = Field(ge=0)
    accumulate: int = Field(ge=1)
    precision: Precision
    evaluate_every: Count
    patience: Count


class KeptRun(Run):
    """The record as it lies at the client's: with the digest of every file, where the data was several.

    ``data_sha256`` is the digest of all of them then (`offsite.digests.sha256_files`). ``eval_files`` are digests of
    files that were validated on in place of a share of the data. ``objective`` is None for a run that minimised the
    next token's loss, ``loop`` in records of earlier versions.
    """

    optional: ClassVar[frozenset[str]] = Run.optional | {"data_files", "eval_files", "objective", "loop"}

    data_files: tuple[Digest, ...] = ()
    eval_files: tuple[Digest, ...] = ()
    objective: Objective | None = None
    loop: Loop | None = None

    @model_validator(mode="after")
    def _was_validated(self) -> KeptRun:
        """Raise ValueError where a run was validated on both, or on nothing."""
        if bool(self.eval_files) == (self.text.validation > 0):
            raise ValueError("eval_files: a share of the data is validated on, or other files are")
        return self


def quoted(run: Run) -> Run:
    """Return what others may read of a run's record: no digest of the data, no name of a column or user field.

    Where a claim says that the number of units is not public, the numbers of rows and tokens are left out too.
    """
    text = run.text.model_copy(update={"fields": {}, "document_field": None, "separator": None})
    left_out: dict[str, object] = {"data_sha256": None, "text": text}
    if run.claim is not None and not run.claim.number_of_units_public:
        left_out |= {"num_records": None, "num_drawn": None, "num_tokens": None}
    return Run.model_validate({name: getattr(run, name) for name in Run.model_fields} | left_out)


def run_path(bundle: Path) -> Path:
    """Return where the record of the run that made `bundle` lies: ``BUNDLE.run.json`` beside it."""
    return bundle.parent / f"{bundle.name}.run.json"


def write_run(path: Path, run: Run) -> None:
    """The run's record stands at `path`, in place of an older one.

    Raises:
        RunFailed: when the disk is full.
    """
    with staged_file(path, replace=True) as stage:
        stage.write_bytes(written(run))


def read_run(path: Path) -> KeptRun:
    """Return the run's record.

    Raises:
        ArtefactError: when there is none.
        TooLarge, WrongBinding, BadSchema: when it is not one of this format.
    """
    if not path.is_file():
        raise ArtefactError(f"no run record {path.name!r}", hint="offsite tune leaves it beside the bundle; keep both")
    return parse_strict(read_own(path, RECORD_LIMIT_BYTES), KeptRun, path.name, {"format": RUN_FORMAT})


def written(model: Strict) -> bytes:
    """Return the bytes in which a record or an audit is written: ASCII, keys sorted, an indent of one, a line end."""
    return json.dumps(model.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False).encode("ascii") + b"\n"
