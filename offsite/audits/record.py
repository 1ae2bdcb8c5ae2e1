"""What an audit found, as a file: ``audit.json`` in a folder of its own. Read this file to know what an audit may say.

Three audits have this form. *bundle*: the client's, of what its adapter gives away of its data. *plugged-in*: the
owner's, of that adapter in the full model, by canaries that the client committed to before it tuned and revealed
afterwards. *package*: the owner's, of what its package gives away of the full model.

An audit holds figures and digests: no text, no name of a person or machine, no path, and of the owner's model neither
block nor channel numbers. Whether a figure is good enough is not in it: `offsite.audits.gates` says so, from the
figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, model_validator

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import JOB_ID_PATTERN
from offsite.artefacts.layout import Key, Line, Method
from offsite.digests import DIGEST_PATTERN, sha256_bytes
from offsite.errors import ArtefactError, TooLarge, WrongNames
from offsite.evaluation.results import SPARE_PATTERN, WAY_PATTERN
from offsite.folders import listed, names_in
from offsite.staging import staged_file, staged_folder
from offsite.strictjson import Sparse, Strict, parse_object, parse_strict
from offsite.tasks.config import RuleName
from offsite.tasks.task import Task

AUDIT_FORMAT: Final = "offsite/audit/1"
RUN_FORMAT: Final = "offsite/run/1"
AUDIT_NAME = "audit.json"
AUDIT_LIMIT_BYTES = 16 * 2**20
MAX_POINTS = 400

Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
SignalName = Literal["loss", "reference", "min-k", "min-k++"]
DECLARED_SIGNAL: Final[SignalName] = "reference"
"""The one signal that the bound on epsilon and the gate on canaries go by, settled before any score is seen."""
MAX_STEPS = 10**6
"""No claim is of more steps: what accountants do with more takes longer than a verifier should wait."""


class Estimate(Strict):
    """A figure with the interval that holds it at that confidence."""

    value: float
    low: float
    high: float
    confidence: float = Field(0.95, gt=0, lt=1)

    @model_validator(mode="after")
    def _ordered(self) -> Estimate:
        if not self.low <= self.value <= self.high:
            raise ValueError("the value is outside of its interval")
        return self


# --- what a bundle gives away of the data


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


class KeptRun(Run):
    """The record as it lies at the client's: with the digest of every file, where the data was several.

    ``data_sha256`` is the digest of all of them then (`offsite.digests.sha256_files`). ``eval_files`` are digests of
    files that were validated on in place of a share of the data. ``objective`` is None for a run that minimised the
    next token's loss.
    """

    optional: ClassVar[frozenset[str]] = Run.optional | {"data_files", "eval_files", "objective"}

    data_files: tuple[Digest, ...] = ()
    eval_files: tuple[Digest, ...] = ()
    objective: Objective | None = None

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


class Membership(Strict):
    """One attack that tells trained-on rows from others by a score; `tpr_at_1` is its hit rate at 1% false alarms.

    A hit rate is None where there are too few others to measure it (1,000 at 1%, 10,000 at 0.1%). ``roc`` are points
    (false alarms, hits) from (0, 0) to (1, 1).
    """

    signal: SignalName
    num_members: int = Field(ge=1)
    num_nonmembers: int = Field(ge=1)
    auc: Estimate
    balanced_accuracy: Share
    tpr_at_1: Estimate | None
    tpr_at_01: Estimate | None
    roc: tuple[tuple[Share, Share], ...] = Field(min_length=2, max_length=MAX_POINTS)


class EpsilonBound(Strict):
    """A lower bound on epsilon from one run, and what a perfect attack with as many canaries could have shown.

    Source: arXiv:2305.08846. It can refute a claimed epsilon; a small value confirms nothing. ``declared`` are all the
    numbers of guesses that were tried; epsilon is that of ``num_guesses`` of them, of which ``num_correct`` were right.
    """

    signal: SignalName
    epsilon: float = Field(ge=0)
    delta: float = Field(ge=0, lt=1)
    confidence: float = Field(gt=0, lt=1)
    num_canaries: int = Field(ge=1, le=100_000)
    num_guesses: Count
    num_correct: Count
    declared: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, max_length=8)
    rule: Line
    ceiling: float = Field(ge=0)


class Exposure(Strict):
    """How far made-up secrets stand out: bits of exposure of each one that was trained on, and those read back out.

    Source: arXiv:1802.08232. ``most_bits`` is the exposure of rank 1 among ``num_candidates``.
    """

    num_secrets: int = Field(ge=1)
    num_candidates: int = Field(ge=2)
    repeats: int = Field(ge=1)
    bits: tuple[float, ...] = Field(max_length=10_000)
    bits_before: tuple[float, ...] = Field(max_length=10_000)
    most_bits: float = Field(ge=0)
    num_extracted_greedy: Count
    num_extracted_top_k: Count
    num_samples: Count


class CanaryAudit(Strict):
    """What was measured on canaries: rows made up before tuning, each trained on or not by a fair coin."""

    commitment: Digest
    num: int = Field(ge=1)
    num_included: Count
    membership: tuple[Membership, ...] = ()
    bound: EpsilonBound | None = None
    exposure: Exposure | None = None


class Verbatim(Strict):
    """Rows of the training text that come back word for word from their beginnings, after tuning and before it.

    ``num_new`` came back after tuning and not before; None where only the two numbers are known.
    """

    num_rows: Count
    prefix_tokens: int = Field(ge=1)
    continuation_tokens: int = Field(ge=1)
    num_extracted: Count
    num_extracted_before: Count
    num_new: Count | None = None


class ScanFigures(Strict):
    """What was looked for in the bundle's bytes, and how often anything of each kind was found."""

    num_bytes: Count
    num_ngrams_compared: Count
    found: dict[Key, Count]


class BundleAudit(Sparse):
    """The content of ``audit.json`` of the client's audit. Scores are of the emulator, with and without the adapter.

    ``objective`` is what the run minimised, without the digest of any text; None for the next token's loss. Of a run
    that learned from preferences (``dpo``) a row is a pair of answers, and the signals loss and reference go by how far
    the chosen one is ahead of the other (`offsite.audits.scores.score_pairs`). Of a run that learned from rewards
    (``rloo``) the row's own answer is scored, which was never a target of the loss. Where the adapter has a head they
    go by what that learnt of a row (`score_heads`), and ``auc_before`` by the text, of which an untrained head says
    nothing.

    ``run`` is the run's record as `quoted`. Rows were chosen by ``seed``, at most ``rows_limit`` of either side.
    ``nonmembers`` says where the rows that were not trained on come from. ``auc_before`` is how well the emulator's
    loss without the adapter tells them from the others: 0.5, unless the two differ by more than what was trained on.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"objective"})

    format: Literal["offsite/audit/1"] = AUDIT_FORMAT
    kind: Literal["bundle"] = "bundle"
    run: Run
    objective: Objective | None = None
    tokens_per_row: int = Field(ge=2)
    seed: Count | None = None
    rows_limit: int | None = Field(None, ge=1)
    membership: tuple[Membership, ...]
    nonmembers: Literal["set aside", "validation", "file"] | None = None
    auc_before: Estimate | None = None
    canaries: CanaryAudit | None = None
    verbatim: Verbatim | None = None
    scan: ScanFigures
    versions: dict[Key, Line] = {}


class PluggedAudit(Sparse):
    """The content of ``audit.json`` of the owner's audit of an adapter in the full model, by revealed canaries.

    ``way`` says how it was plugged in and asked (``0.5``, ``mlp=0.5,mix=0.7``), and is not there for all of the update;
    ``spare_text`` is a digest of the public text's tokens where directions were spared; ``corrected`` says whether the
    emulator's fault was taken out of the update first.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"way", "spare_text", "corrected"})

    format: Literal["offsite/audit/1"] = AUDIT_FORMAT
    kind: Literal["plugged-in"] = "plugged-in"
    bundle_digest: Digest
    package_digest: Digest
    base_digest: Digest
    way: str = Field("", pattern=WAY_PATTERN)
    spare_text: str = Field("", pattern=SPARE_PATTERN)
    corrected: bool = False
    canaries: CanaryAudit
    versions: dict[Key, Line] = {}


# --- what a package gives away of the model


class Capability(Strict):
    """One thing models can do, scored for the full model and for what the client holds.

    ``kept`` is the share of the full model's skill above ``chance`` that the emulator has as sent: for perplexity in
    nats per token, chance being a unigram model; for tasks in the metric itself.
    """

    name: Line
    metric: Key
    num_rows: int = Field(ge=1)
    chance: float
    full: float
    emulator: float
    emulator_tuned: float | None = None
    plugged_in: float | None = None
    kept: float


class BlockAlignment(Strict):
    """How like one of the owner's blocks a block of the emulator is at best: cosine of weights, CKA of hidden states.

    Source: linear CKA, arXiv:1905.00414. Which of the owner's blocks it is stays with the owner.
    """

    block: str = Field(pattern=r"^(bottom|middle|top)\.[0-9]{1,4}$")
    cosine: float = Field(ge=-1.001, le=1.001)
    cka: float = Field(ge=-0.001, le=1.001)


class Similarity(Strict):
    """What of the owner's parameters is in the package bit for bit: by whole tensors, and by rows of matrices.

    ``num_within_rounding`` counts those that are no further than one step of bfloat16 away too, which a mark moves
    entries by: at least ``num_verbatim_by_row``. None in audits of earlier versions.
    """

    num_parameters: int = Field(ge=1)
    num_verbatim: Count
    num_verbatim_by_row: Count
    num_within_rounding: Count | None = None
    blocks: tuple[BlockAlignment, ...]


class RecoveryPoint(Strict):
    """Where an attack stood after so many tokens: perplexity, and the share of the lost capability it had regained."""

    num_tokens: Count
    perplexity: float = Field(gt=0)
    regained: float


class Recovery(Strict):
    """One way to rebuild the full model's ability from the package alone: holes filled, then healed on public text."""

    attack: Key
    trained_parameters: Count
    points: tuple[RecoveryPoint, ...] = Field(min_length=1, max_length=MAX_POINTS)

    @property
    def best(self) -> float:
        """The most it regained at any point."""
        return max(point.regained for point in self.points)


Way = Literal["rehearsed client", "client", "recovery attack"]
"""By whom an emulator was tuned before it was measured what it lacks: a client that the owner played on public text of
the field, the client itself, an attack that heals it on public text."""


class Withheld(Strict):
    """What a client is left with after one way of tuning, on the held-out text.

    ``nats`` is ln(``perplexity`` of the tuned emulator / the full model's as it was), per token: 0 or less, and nothing
    is withheld. ``num_tokens`` were tuned on, None where that was the client's affair; ``told`` says how, in words.
    """

    way: Way
    nats: float
    perplexity: float = Field(gt=0)
    num_tokens: int | None = Field(ge=1)
    told: Line


class Union(Strict):
    """What several packages of one model hold together: shares of the middle's parameters."""

    num_packages: int = Field(ge=2)
    share_single: Share
    share_union: Share


class PackageAudit(Sparse):
    """The content of ``audit.json`` of the owner's audit of a package.

    ``withheld`` has one entry for each way of tuning that was measured: none in audits of earlier versions.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"withheld"})

    format: Literal["offsite/audit/1"] = AUDIT_FORMAT
    kind: Literal["package"] = "package"
    package_digest: Digest
    base_digest: Digest
    method: Method
    middle_parameters: int = Field(ge=1)
    emulator_parameters: int = Field(ge=1)
    capabilities: tuple[Capability, ...] = Field(min_length=1)
    similarity: Similarity
    recovery: tuple[Recovery, ...] = ()
    recovery_text: Line = ""
    withheld: tuple[Withheld, ...] = ()
    union: Union | None = None
    versions: dict[Key, Line] = {}

    @model_validator(mode="after")
    def _once_each_way(self) -> PackageAudit:
        ways = [one.way for one in self.withheld]
        if len(set(ways)) < len(ways):
            raise ValueError("a way of tuning is told twice")
        return self

    @property
    def withheld_zero_shot(self) -> float | None:
        """What the emulator lacks as it was sent, in nats per token: no measure of what a client is left with.

        None where held-out text was not measured on.
        """
        texts = [one for one in self.capabilities if one.name == "perplexity"]
        return texts[0].emulator - texts[0].full if texts else None  # losses are logarithms of perplexities

    @property
    def least_withheld(self) -> Withheld | None:
        """The way of tuning that leaves the client with most; None where none was measured."""
        return min(self.withheld, key=lambda one: one.nats, default=None)


Audit = BundleAudit | PluggedAudit | PackageAudit
_KINDS: dict[str, type[BundleAudit] | type[PluggedAudit] | type[PackageAudit]] = {
    "bundle": BundleAudit,
    "plugged-in": PluggedAudit,
    "package": PackageAudit,
}


def write_audit(out: Path, audit: Audit) -> str:
    """Write the audit folder `out`, whole or not at all, and return the digest of its ``audit.json``.

    Raises:
        ConfigError: when `out` exists.
        RunFailed: when the disk is full.
    """
    raw = _raw(audit)
    with staged_folder(out) as stage:
        (stage / AUDIT_NAME).write_bytes(raw)
    return sha256_bytes(raw)


def read_audit(folder: Path) -> tuple[Audit, str]:
    """Return the audit in `folder`, which holds nothing else, and the digest of its bytes.

    Raises:
        ArtefactError: when there is no such folder or no audit in it.
        WrongNames: when it holds anything besides.
        TooLarge, WrongBinding, BadSchema: when the file is not an audit of this format.
    """
    if not folder.is_dir():
        raise ArtefactError(f"no audit folder named {folder.name!r}", hint="check the path")
    path = folder / AUDIT_NAME
    if path.is_symlink() or not path.is_file():
        raise ArtefactError(f"folder {folder.name!r} holds no {AUDIT_NAME}", hint="offsite audit writes it")
    if extra := names_in(folder) - {AUDIT_NAME}:
        raise WrongNames(f"{folder.name!r} holds {listed(extra)} besides {AUDIT_NAME}")
    raw = _limited(path)
    return parse_audit(parse_object(raw, AUDIT_NAME)), sha256_bytes(raw)


def parse_audit(stated: dict[str, object]) -> Audit:
    """Return the audit that a JSON object states, by its kind.

    Raises:
        WrongBinding, BadSchema: when it is not an audit of this format.
    """
    kind = stated.get("kind")
    cls = _KINDS.get(kind if isinstance(kind, str) else "", BundleAudit)
    return parse_strict(json.dumps(stated).encode(), cls, AUDIT_NAME, {"format": AUDIT_FORMAT})


def run_path(bundle: Path) -> Path:
    """Return where the record of the run that made `bundle` lies: ``BUNDLE.run.json`` beside it."""
    return bundle.parent / f"{bundle.name}.run.json"


def write_run(path: Path, run: Run) -> None:
    """The run's record stands at `path`, in place of an older one.

    Raises:
        RunFailed: when the disk is full.
    """
    with staged_file(path, replace=True) as stage:
        stage.write_bytes(_raw(run))


def read_run(path: Path) -> KeptRun:
    """Return the run's record.

    Raises:
        ArtefactError: when there is none.
        TooLarge, WrongBinding, BadSchema: when it is not one of this format.
    """
    if not path.is_file():
        raise ArtefactError(f"no run record {path.name!r}", hint="offsite tune leaves it beside the bundle; keep both")
    return parse_strict(_limited(path), KeptRun, path.name, {"format": RUN_FORMAT})


def _raw(model: Strict) -> bytes:
    return json.dumps(model.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False).encode("ascii") + b"\n"


def _limited(path: Path) -> bytes:
    with path.open("rb") as handle:
        raw = handle.read(AUDIT_LIMIT_BYTES + 1)
    if len(raw) > AUDIT_LIMIT_BYTES:
        raise TooLarge(f"{path.name}: over {AUDIT_LIMIT_BYTES} bytes")
    return raw
