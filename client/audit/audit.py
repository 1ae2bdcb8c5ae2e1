"""`offsite audit bundle PACKAGE BUNDLE --data FILE -o AUDIT`: what an adapter gives away of the text it was tuned on.

Rows that were trained on and rows that were not are scored under the package's model, without the adapter and with
it: the model that the client has. The owner's full model with the adapter in it may say more or less; canaries let the
owner measure that. A bundle that answers a federation's round is scored on the weights which that round gave, and its
rows are those of that round: what earlier rounds gave away is no part of it. Nothing that is shown or written holds
text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.kinds import Attached, declared
from client.audit.config import AuditBundleConfig
from client.audit.rows import Rows, choose_rows
from client.audit.table import show
from client.tuning.hidden import FOLDER, kept_states
from client.tuning.rounds import answered
from client.tuning.runrecord import read_as, versions
from client.tuning.scan import losses_in, scan_bundle, texts_of
from client.tuning.tune import attach_to_package
from offsite.artefacts.bundle import Bundle, open_bundle
from offsite.artefacts.package import Package, open_package
from offsite.artefacts.round import Round, open_round
from offsite.audits.canaries import CanarySet, read_canaries
from offsite.audits.canaryaudit import CanaryScores, audit_canaries, canary_examples, read_out, score_canaries
from offsite.audits.extraction import verbatim
from offsite.audits.gates import bundle_gates, passed
from offsite.audits.keptscores import kept_scores
from offsite.audits.membership import membership_of
from offsite.audits.record import (
    BundleAudit,
    CanaryAudit,
    KeptRun,
    Membership,
    Run,
    ScanFigures,
    SignalName,
    Verbatim,
    quoted,
    read_run,
    run_path,
    write_audit,
)
from offsite.audits.scores import Floats, RowScores, beginning_of, score_heads, score_pairs, score_rows, signals
from offsite.audits.statistics import require_extra
from offsite.console import progress, say, say_next
from offsite.digests import sha256_file
from offsite.encoders.trunk import is_encoder
from offsite.errors import ConfigError, DataError, WrongBinding
from offsite.evaluation.heads import SCORE
from offsite.modelling.context import context_of
from offsite.modelling.head import causal_lm
from offsite.privacyreport.record import audit_digest
from offsite.seq2seq.models import is_seq2seq, start_token
from offsite.staging import refuse_existing, scratch_folder
from offsite.text.batches import IGNORED, Example, pad_id
from offsite.text.records import answer_of, require_files
from offsite.text.rows import files_in
from offsite.training.devices import choose_device
from offsite.vision.reader import ImageReader, Reader, tokenizer_in

if TYPE_CHECKING:
    from offsite.text.records import Record

NUM_VERBATIM = 200
BEGINNINGS = (32, 16, 8)
"""Tokens of a row that are given, and that must come back; shorter ones where rows are short."""

DELTA_WITHOUT_CLAIM = 1e-5


@dataclass(frozen=True)
class _Given:
    """What the verb was given, opened and found to belong together."""

    package: Package
    bundle: Bundle
    run: KeptRun
    records: list[Record] = field(repr=False)
    held_out: list[Record] | None = field(repr=False)
    others: list[Record] | None = field(repr=False)
    canaries: CanarySet | None = field(repr=False)
    round: Round | None


@dataclass(frozen=True)
class _Found:
    """What one of the two models says: of rows, of canaries, and which rows come back.

    ``texts`` are scores of the rows by the vocabulary's own head; ``rows`` are what attacks go by. The two differ where
    a head was tuned. An encoder has no head over a vocabulary, and no row comes back.
    """

    texts: RowScores | None
    rows: RowScores | None
    canaries: CanaryScores | None
    verbatim: np.ndarray[Any, np.dtype[np.bool_]] | None = field(repr=False)


def run(config: AuditBundleConfig) -> dict[str, object]:
    """Run the verb: read, score twice, scan, write the audit. It is written whatever it finds.

    Raises:
        ConfigError, DataError, ArtefactError, RunFailed: as the steps it is made of; no audit then stands.
    """
    began = time.monotonic()
    refuse_existing(config.output)
    if config.keep_scores is not None:
        refuse_existing(config.keep_scores)
    names = ("data", "eval", "nonmembers")
    config = config.model_copy(update={name: files_in(getattr(config, name)) for name in names})
    for name in names:
        require_files(getattr(config, name))
    require_extra()
    given = _open(config)
    with scratch_folder(config.output) as scratch:
        audit, rows, attacks = _measure(config, given, scratch)
    with kept_scores(config.keep_scores, attacks, len(rows.members), audit=audit_digest(audit)):
        digest = write_audit(config.output, audit)
    gates = bundle_gates(audit)
    show(audit, gates, num_nonmembers=rows.num_available)
    say(f"audit: {config.output.name} is written; offsite seal asks its gates")
    if config.round is None:
        sealed = config.bundle.with_name(f"{config.bundle.name}.sealed")
        say_next("offsite", "seal", config.bundle, "--job", "JOB", "--audit", config.output, "-o", sealed)
    return _result(config, audit, digest) | {
        "gates": {gate.name: gate.verdict for gate in gates},
        "passed": passed(gates),
        "seconds": round(time.monotonic() - began, 1),
    }


def _open(config: AuditBundleConfig) -> _Given:
    """Return what belongs together.

    Raises:
        ConfigError: when the bundle answers a federation's round and none is given, or the other way round.
        WrongBinding: when the record, the package, the round, the data or the canaries are not those of the bundle.
    """
    package, bundle = open_package(config.package), open_bundle(config.bundle)
    bundle.bind(package_digest=package.digest, base_digest=package.manifest.base_digest)
    round_ = _round(config, bundle)
    record = read_run(run_path(config.bundle))
    what = f"{run_path(config.bundle).name!r}"
    for name, stated, found in (
        ("bundle", record.bundle_digest, bundle.digest),
        ("package", record.package_digest, package.digest),
        ("adapter", record.adapter, bundle.manifest.adapter),
        ("round", record.round, answered(round_)),
    ):
        if stated != found:
            raise WrongBinding(f"{what} is the record of another {name}", hint="keep it beside its own bundle")
    canaries = _canaries(config, record)
    stated = run_path(config.bundle).name
    _require_same("--data", config.data, record.data_files or (record.data_sha256,), stated)
    _require_same("--eval", config.eval, record.eval_files, stated)
    by_user = record.claim is not None and record.claim.unit == "user"
    head = record.adapter.head
    how: dict[str, Any] = {"share_documents": by_user, "pairs": learns_preferences(record)}
    how |= {"questions": num_new(record) is not None, "labels": () if head is None else head.labels}
    how |= {"of_head": "" if head is None else head.task}
    how |= {"images": package.pixels is not None}
    records = read_as(config.data, record.text, **how)
    held_out = read_as(config.eval, record.text, **how) if config.eval else None
    others = read_as(config.nonmembers, record.text, **how) if config.nonmembers else None
    if num_new(record) is not None:
        _require_answers([*records, *(held_out or ()), *(others or ())])
    return _Given(package, bundle, record, records, held_out, others, canaries, round_)


def learns_preferences(record: KeptRun) -> bool:
    """Tell whether the run's rows are pairs of a chosen and a rejected answer."""
    return record.objective is not None and record.objective.loss in ("dpo", "reward")


def num_new(record: KeptRun) -> int | None:
    """Return how many tokens at most followed a prompt, of a run that learned from rewards; None of others."""
    rewarded = None if record.objective is None else record.objective.rloo
    return None if rewarded is None else rewarded.max_new_tokens


def _require_answers(records: Sequence[Record]) -> None:
    """Return only if every row has an answer that can be scored.

    Raises:
        DataError: naming the first that has none.
    """
    missing = next((record for record in records if answer_of(record) is None), None)
    if missing is not None:
        raise DataError(
            f"{missing.place}: no answer; of a run with --objective rloo an audit scores the rows' answers",
            hint="such a bundle cannot be audited so: tune on rows with answers, or leave the audit out",
        )


def _require_same(flag: str, paths: Sequence[Path], stated: Sequence[str | None], record: str) -> None:
    """Return only if the files are those that the run read, in its order.

    Args:
        record: name of the file that states their digests.

    Raises:
        WrongBinding: naming the first that is another.
    """
    what = "tuned" if flag == "--data" else "validated"
    if len(stated) != len(paths):
        raise WrongBinding(
            f"{flag}: {len(paths)} file(s), this bundle was {what} on {len(stated)}",
            hint="give the same files, in the same order",
        )
    for path, digest in zip(paths, stated, strict=True):
        if sha256_file(path) != digest:
            raise WrongBinding(
                f"{path.name}: not the file that this bundle was {what} on", hint=f"{record!r} has its digest"
            )


def _round(config: AuditBundleConfig, bundle: Bundle) -> Round | None:
    """Return the round that the bundle answers, on whose weights it was tuned; None where it answers none."""
    stated = bundle.manifest.round_digest
    if config.round is None:
        if stated is None:
            return None
        raise ConfigError(
            f"bundle {config.bundle.name!r} was tuned on a federation's round, not on the package alone",
            hint="--round FOLDER names it: WORK/round-NNNN/round",
        )
    if stated is None:
        raise ConfigError(f"--round: bundle {config.bundle.name!r} answers no round", hint="leave --round out")
    found = open_round(config.round)
    if found.digest != stated:
        raise WrongBinding(
            f"bundle {config.bundle.name!r} answers round {stated[:19]}, {config.round.name!r} is {found.digest[:19]}",
            hint="give the round that was tuned on",
        )
    return found


def _canaries(config: AuditBundleConfig, record: Run) -> CanarySet | None:
    if config.canaries is None:
        if record.canaries is None:
            return None
        raise ConfigError("--canaries is missing: the run trained on some", hint="give the folder that tune was given")
    canaries, commitment = read_canaries(config.canaries)
    if commitment != record.canaries:
        stated = "trained on none" if record.canaries is None else f"trained on {record.canaries[:19]}"
        raise WrongBinding(f"canaries {config.canaries.name!r} are {commitment[:19]}, the run {stated}")
    return canaries


def _measure(
    config: AuditBundleConfig, given: _Given, scratch: Path
) -> tuple[BundleAudit, Rows, dict[SignalName, Floats]]:
    tokenizer = given.package.load_reader()
    device = choose_device(config.device)
    attached = attach_to_package(given.package, given.run.adapter, device=device, round_=given.round)
    model: Any = attached.model
    rows = choose_rows(
        given.records,
        given.run,
        tokenizer,
        limit=config.rows,
        context=context_of(model),
        others=given.others,
        held_out=given.held_out,
        canaries=given.canaries,
        seed=config.seed,
        num_new=num_new(given.run),
        start=start_token(causal_lm(model).config) if is_seq2seq(causal_lm(model)) else None,
    )
    say(f"{len(rows.members)} rows that were trained on, {len(rows.nonmembers)} that were not ({_WORDS[rows.source]})")
    if not rows.members:
        say("no row was certainly trained on: the run was too short to say which of them it drew")
    if rows.drawn_share < 1:
        say(f"{rows.drawn_share:.0%} of the canaries to train on were drawn by the step released, the rest is left out")
    below = partial(_below, config, given, attached, tokenizer, rows, scratch)
    head = given.run.adapter.head
    labels = () if head is None else head.labels
    before = _score(config, model, tokenizer, rows, below, label="without the adapter", labels=labels, is_tuned=False)
    started = _of_the_package(config, given, tokenizer, rows) or before.texts
    expected = declared(given.run.adapter, given.package.layout, given.package.block_tensors())
    attached.load(given.bundle.load_tensors(expected))
    after = _score(config, model, tokenizer, rows, below, label="with the adapter", labels=labels, is_tuned=True)
    membership, shift = _membership(before, after, started, len(rows.members))
    audit = BundleAudit(
        run=quoted(given.run),
        objective=None if given.run.objective is None else given.run.objective.quoted(),
        tokens_per_row=config.tokens_per_row,
        seed=config.seed,
        rows_limit=config.rows,
        membership=membership,
        nonmembers=rows.source,
        auc_before=None if shift is None else shift.auc,
        canaries=_canary_audit(given, rows, before, after),
        verbatim=_verbatim(before, after, beginning(_asked(rows))),
        scan=_scan(config, given),
        versions=versions(),
    )
    return audit, rows, _attacks(before, after)


_WORDS = {"set aside": "set aside for this", "validation": "validated on", "file": "from --nonmembers"}


def _score(
    config: AuditBundleConfig,
    model: Any,
    tokenizer: Reader,
    rows: Rows,
    below: Callable[[], AbstractContextManager[object]],
    *,
    label: str,
    labels: Sequence[str],
    is_tuned: bool,
) -> _Found:
    """Return what the model says; inside of `below` what no adapter changes need not be computed again."""
    writes = not is_encoder(causal_lm(model))
    canaries = None
    drawing: dict[str, Any] = {
        "label": label,
        "batch_size": config.batch_size,
        "num_samples": config.secrets_samples,
        "seed": config.seed,
    }
    with below():
        scored = texts = _rows_scored(config, model, tokenizer, rows, label=label) if writes else None
        if (compared := _compared(rows)) and hasattr(causal_lm(model), SCORE):
            pad = pad_id(tokenizer)
            scored = score_heads(model, texts, compared, labels, batch_size=config.batch_size, pad_id=pad)
        if rows.canaries is not None:
            canaries = score_canaries(model, tokenizer_in(tokenizer), rows.canaries, extract=False, **drawing)
    if not writes or is_seq2seq(causal_lm(model)):  # whose answers have no beginning of their own to go on from
        return _Found(texts, scored, canaries, None)
    # what is written token by token is written by the model as it is
    if rows.canaries is not None and canaries is not None and is_tuned:
        canaries = replace(canaries, extracted=read_out(model, tokenizer_in(tokenizer), rows.canaries, **drawing))
    tokens = beginning(_asked(rows))
    asked = [_window(example, tokens) for example in _asked(rows)]
    with _told(max(1, len(asked)), f"{label}: rows asked for") as bar:
        back = verbatim(
            model,
            asked,
            prefix_tokens=tokens,
            continuation_tokens=tokens,
            batch_size=config.batch_size,
            progress=bar,
        )
    return _Found(texts, scored, canaries, back)


def _below(
    config: AuditBundleConfig,
    given: _Given,
    attached: Attached,
    tokenizer: Reader,
    rows: Rows,
    scratch: Path,
) -> AbstractContextManager[object]:
    """Return the context in which what lies below an adapter on the top alone is computed once for both models."""
    model: Any = attached.model
    if is_seq2seq(causal_lm(model)) or isinstance(tokenizer, ImageReader):
        return nullcontext()
    scored = [side for row in _compared(rows) for side in row.sides]
    wanted = [beginning_of(side, config.tokens_per_row) for side in scored]
    if rows.canaries is not None:
        made = canary_examples(model, tokenizer_in(tokenizer), rows.canaries)
        wanted += [beginning_of(one, rows.canaries.tokens) for one in made]
    return kept_states(
        attached,
        wanted,
        pad_id=pad_id(tokenizer),
        folder=scratch / FOLDER,
        limit_bytes=config.cache_bytes,
        binding={
            "package": given.package.digest,
            "round": "" if given.round is None else given.round.digest,
            "precision": "fp32",
        },
        autocast=nullcontext,
    )


def _asked(rows: Rows) -> list[Example]:
    """Return the rows that are asked for word for word; of a pair, both answers."""
    return [side for row in rows.members[:NUM_VERBATIM] for side in row.sides][:NUM_VERBATIM]


def _compared(rows: Rows) -> list[Example]:
    """Return the rows to score, members first; none where one side has none."""
    return [*rows.members, *rows.nonmembers] if rows.members and rows.nonmembers else []


def _rows_scored(
    config: AuditBundleConfig, model: Any, tokenizer: Reader, rows: Rows, *, label: str
) -> RowScores | None:
    """Return what the model says of the rows, members first; None where one side has none."""
    examples = _compared(rows)
    if not examples:
        return None
    score = score_rows if examples[0].rejected is None else score_pairs
    with _told(len(examples), f"{label}: rows") as bar:
        return score(
            model,
            examples,
            batch_size=config.batch_size,
            pad_id=pad_id(tokenizer),
            limit_tokens=config.tokens_per_row,
            progress=bar,
        )


def _of_the_package(config: AuditBundleConfig, given: _Given, tokenizer: Reader, rows: Rows) -> RowScores | None:
    """Return what the package's own model says of the rows, where a round began with other weights; otherwise None.

    Whether rows are alike but for training is asked of a model that read none of them. The weights of a later round may
    know the client's rows from earlier ones: that is leakage, and no excuse.
    """
    if given.round is None or given.round.is_first:
        return None
    model: Any = given.package.load_model(dtype="float32")
    model.to(choose_device(config.device)).eval()
    return _rows_scored(config, model, tokenizer, rows, label="the package alone")


@contextmanager
def _told(total: int, label: str) -> Iterator[Any]:
    with progress(total, label) as bar:
        yield lambda done, _: bar.update(done)


def _attacks(before: _Found, after: _Found) -> dict[SignalName, Floats]:
    """Return the scores of the rows by each attack, members first; none where no row was scored."""
    return {} if before.rows is None or after.rows is None else signals(after.rows, before.rows)


def _membership(
    before: _Found, after: _Found, started: RowScores | None, num_members: int
) -> tuple[tuple[Membership, ...], Membership | None]:
    """Return the attacks, and the loss of a model that read no row as one: it should tell nothing."""
    if before.rows is None or after.rows is None:
        return (), None
    attacks = _attacks(before, after)
    found = tuple(membership_of(name, by[:num_members], by[num_members:]) for name, by in attacks.items())
    if started is None:  # an encoder's, which says nothing of a text
        return found, None
    untuned = -started.loss
    return found, membership_of("loss", untuned[:num_members], untuned[num_members:])


def _canary_audit(given: _Given, rows: Rows, before: _Found, after: _Found) -> CanaryAudit | None:
    if rows.canaries is None or before.canaries is None or after.canaries is None:
        return None
    claim = given.run.claim
    return audit_canaries(
        rows.canaries,
        str(given.run.canaries),
        tuned=after.canaries,
        untuned=before.canaries,
        delta=DELTA_WITHOUT_CLAIM if claim is None else claim.delta,
        drawn_share=rows.drawn_share,
    )


def beginning(rows: Sequence[Example]) -> int:
    """Return the most tokens of `BEGINNINGS` that half of the rows are twice as long as; else the fewest."""
    asked = rows[:NUM_VERBATIM]
    for tokens in BEGINNINGS:
        if sum(len(_window(row, tokens).input_ids) >= 2 * tokens for row in asked) >= max(1, len(asked) / 2):
            return tokens
    return BEGINNINGS[-1]


def num_asked(rows: Sequence[Example]) -> int:
    """Return of how many rows, all of them trained on, an audit would ask for the rest: those that are long enough."""
    asked = rows[:NUM_VERBATIM]
    tokens = beginning(asked)
    return sum(len(_window(row, tokens).input_ids) >= 2 * tokens for row in asked)


def _window(row: Example, tokens: int) -> Example:
    """Return the row from so many tokens before its first that counts: what was not trained on cannot come back."""
    first = next((place for place, label in enumerate(row.labels) if label != IGNORED), 0)
    start = max(0, first - tokens)
    return Example(row.input_ids[start:], row.labels[start:])


def _verbatim(before: _Found, after: _Found, tokens: int) -> Verbatim | None:
    if before.verbatim is None or after.verbatim is None:
        return None
    return Verbatim(
        num_rows=after.verbatim.size,
        prefix_tokens=tokens,
        continuation_tokens=tokens,
        num_extracted=int(after.verbatim.sum()),
        num_extracted_before=int(before.verbatim.sum()),
        num_new=int((after.verbatim & ~before.verbatim).sum()),
    )


def _scan(config: AuditBundleConfig, given: _Given) -> ScanFigures:
    log = config.bundle.parent / f"{config.bundle.name}.log.jsonl"
    scan = scan_bundle(
        config.bundle,
        texts=texts_of([*given.records, *(given.held_out or ())]),
        figures=losses_in(log) if log.is_file() else [],
        spec=given.run.adapter,
        disclosed={str(name): value for name, value in given.bundle.manifest.disclosed.items()},
        paths=[*config.data, *config.eval, config.bundle, config.package],
        known=given.bundle.manifest.tensors,
    )
    return ScanFigures(
        num_bytes=scan.num_bytes,
        num_ngrams_compared=scan.num_ngrams_compared,
        found={name.replace(" ", "_"): num for name, num in scan.found.items()},
    )


def _result(config: AuditBundleConfig, audit: BundleAudit, digest: str) -> dict[str, object]:
    """Return the figures that a program asks for first; all of them are in the audit."""
    canaries, verbatim_ = audit.canaries, audit.verbatim
    bound = None if canaries is None else canaries.bound
    exposure = None if canaries is None else canaries.exposure
    return {
        "audit": Path(config.output).name,
        "audit_digest": digest,
        "bundle_digest": audit.run.bundle_digest,
        "num_members": min((one.num_members for one in audit.membership), default=0),
        "num_nonmembers": min((one.num_nonmembers for one in audit.membership), default=0),
        "nonmembers": audit.nonmembers,
        "auc": {one.signal: one.auc.value for one in audit.membership},
        "auc_before": None if audit.auc_before is None else audit.auc_before.value,
        "canary_auc": {} if canaries is None else {one.signal: one.auc.value for one in canaries.membership},
        "epsilon_claimed": None if audit.run.claim is None else audit.run.claim.epsilon,
        "epsilon_shown": None if bound is None else bound.epsilon,
        "secrets_extracted": None
        if exposure is None
        else max(exposure.num_extracted_greedy, exposure.num_extracted_top_k),
        "rows_extracted": None if verbatim_ is None else verbatim_.num_new,
    }
