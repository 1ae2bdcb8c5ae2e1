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

from offsite.artefacts.layout import Key, Line, Method
from offsite.audits.runs import RECORD_LIMIT_BYTES, Count, Digest, Objective, Run, written
from offsite.digests import sha256_bytes
from offsite.errors import ArtefactError, WrongNames
from offsite.evaluation.results import SPARE_PATTERN, WAY_PATTERN
from offsite.folders import listed, names_in, read_own
from offsite.staging import staged_folder
from offsite.strictjson import Sparse, Strict, parse_object, parse_strict

AUDIT_FORMAT: Final = "offsite/audit/1"
AUDIT_NAME = "audit.json"
MAX_POINTS = 400
MAX_RETUNINGS = 64
MAX_ROWS_RETUNED = 20_000

Share = Annotated[float, Field(ge=0, le=1)]
SignalName = Literal["loss", "reference", "min-k", "min-k++"]
DECLARED_SIGNAL: Final[SignalName] = "reference"
"""The one signal that the bound on epsilon and the gate on canaries go by, settled before any score is seen."""


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


class Guesses(Strict):
    """What one attack guessed right of rows that fair coins had put in or left out, over all retunings.

    Of ``num_pairs`` pairs, of a row that was in and one that was not, it gave the first the higher score in
    ``num_right`` and both the same in ``num_tied``. Of the rows that scored highest it said that they were in:
    ``num_guesses`` times, ``num_correct`` of them rightly.
    """

    signal: SignalName
    num_pairs: int = Field(ge=1)
    num_right: Count
    num_tied: Count
    num_guesses: int = Field(ge=1)
    num_correct: Count


class Retuned(Strict):
    """What attacks found of adapters that were tuned as the bundle was, each on a half of the rows that coins chose.

    It is of the way of tuning on these rows, not of the bundle. ``num_rows`` had a coin in each of the retunings:
    ``num_in`` of them were in. ``steps`` are those whose weights were attacked. ``num_asked`` retunings were to be
    made; fewer were where the time given was over, which no result had a say in.
    """

    num_rows: int = Field(ge=2, le=MAX_ROWS_RETUNED)
    num_asked: int = Field(ge=1, le=MAX_RETUNINGS)
    num_in: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, max_length=MAX_RETUNINGS)
    steps: tuple[Count, ...] = Field(min_length=1, max_length=MAX_RETUNINGS)
    attacks: tuple[Guesses, ...] = Field(min_length=1, max_length=4)


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
    ``retuned`` is of the way of tuning, where retunings were made; None where none were.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"objective", "retuned"})

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
    retuned: Retuned | None = None
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
    raw = written(audit)
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
    raw = read_own(path, RECORD_LIMIT_BYTES)
    return parse_audit(parse_object(raw, AUDIT_NAME)), sha256_bytes(raw)


def parse_audit(stated: dict[str, object]) -> Audit:
    """Return the audit that a JSON object states, by its kind.

    Raises:
        WrongBinding, BadSchema: when it is not an audit of this format.
    """
    kind = stated.get("kind")
    cls = _KINDS.get(kind if isinstance(kind, str) else "", BundleAudit)
    return parse_strict(json.dumps(stated).encode(), cls, AUDIT_NAME, {"format": AUDIT_FORMAT})
