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
from typing import Any

import numpy as np

from adapters.kinds import Attached, declared
from client.audit.config import AuditBundleConfig
from client.audit.given import Given, num_new, open_given
from client.audit.retunings import clear, retune
from client.audit.rows import Rows, choose_rows
from client.audit.table import show
from client.tuning.hidden import FOLDER, kept_states
from client.tuning.runrecord import versions
from client.tuning.scan import losses_in, scan_bundle, texts_of
from client.tuning.tune import attach_to_package
from offsite.audits.canaryaudit import CanaryScores, audit_canaries, canary_examples, read_out, score_canaries
from offsite.audits.extraction import verbatim
from offsite.audits.gates import bundle_gates, needs_retunings, passed
from offsite.audits.keptscores import kept_scores
from offsite.audits.membership import membership_of
from offsite.audits.record import (
    BundleAudit,
    CanaryAudit,
    Membership,
    Retuned,
    ScanFigures,
    SignalName,
    Verbatim,
    write_audit,
)
from offsite.audits.retunings import area
from offsite.audits.runs import quoted
from offsite.audits.scores import Floats, RowScores, beginning_of, score_heads, score_pairs, score_rows, signals
from offsite.audits.statistics import require_extra
from offsite.console import progress, say, say_next
from offsite.encoders.trunk import is_encoder
from offsite.errors import ConfigError, RunFailed
from offsite.evaluation.heads import SCORE
from offsite.modelling.context import context_of
from offsite.modelling.head import causal_lm
from offsite.privacyreport.record import audit_digest
from offsite.seq2seq.models import is_seq2seq, start_token
from offsite.staging import refuse_existing, scratch_folder
from offsite.text.batches import IGNORED, Example, pad_id
from offsite.text.records import require_files
from offsite.text.rows import files_in
from offsite.training.devices import choose_device
from offsite.vision.reader import ImageReader, Reader, tokenizer_in

NUM_VERBATIM = 200
BEGINNINGS = (32, 16, 8)
"""Tokens of a row that are given, and that must come back; shorter ones where rows are short."""

DELTA_WITHOUT_CLAIM = 1e-5


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
    """Run the verb: read, score twice, scan, retune where that is of use, write the audit, whatever it finds.

    Raises:
        ConfigError, DataError, ArtefactError, RunFailed: as the steps it is made of; no audit then stands.
    """
    began = time.monotonic()
    refuse_existing(config.output)
    if config.keep_scores is not None:
        _require_scores_apart(config.keep_scores, config.output)
    names = ("data", "eval", "nonmembers")
    config = config.model_copy(update={name: files_in(getattr(config, name)) for name in names})
    for name in names:
        require_files(getattr(config, name))
    require_extra()
    given = open_given(config)
    with scratch_folder(config.output) as scratch:
        audit, rows, attacks = _measure(config, given, scratch)
    audit = audit.model_copy(update={"retuned": _retuned(config, given, audit)})
    with kept_scores(config.keep_scores, attacks, len(rows.members), audit=audit_digest(audit)):
        digest = write_audit(config.output, audit)
    clear(config.output)
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


def _require_scores_apart(scores: Path, output: Path) -> None:
    """Return only if the scores can be written where they are to be: in a folder that is there, apart from the audit.

    Raises:
        ConfigError: when they cannot.
    """
    refuse_existing(scores)
    if output.absolute() in (scores.absolute(), *scores.absolute().parents):
        raise ConfigError(
            f"--keep-scores {scores.name!r} would lie in the audit, which is handed on", hint="give a place beside it"
        )
    if not scores.absolute().parent.is_dir():
        raise ConfigError(f"--keep-scores: there is no folder {scores.parent.name!r}", hint="make it first")


def _measure(
    config: AuditBundleConfig, given: Given, scratch: Path
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
        compared = _compared(rows)
        texts, scored = _said(config, model, tokenizer, compared, labels, label) if compared else (None, None)
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
    given: Given,
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


def _said(
    config: AuditBundleConfig,
    model: Any,
    tokenizer: Reader,
    examples: list[Example],
    labels: Sequence[str],
    label: str,
) -> tuple[RowScores | None, RowScores | None]:
    """Return what the model says of the rows' texts, None of an encoder, and what attacks on them go by."""
    texts = None if is_encoder(causal_lm(model)) else _of_texts(config, model, tokenizer, examples, label)
    if not hasattr(causal_lm(model), SCORE):
        return texts, texts
    size, pad = config.batch_size, pad_id(tokenizer)
    return texts, score_heads(model, texts, examples, labels, batch_size=size, pad_id=pad)


def _of_texts(
    config: AuditBundleConfig, model: Any, tokenizer: Reader, examples: list[Example], label: str
) -> RowScores:
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


def _of_the_package(config: AuditBundleConfig, given: Given, tokenizer: Reader, rows: Rows) -> RowScores | None:
    """Return what the package's own model says of the rows, where a round began with other weights; otherwise None.

    Whether rows are alike but for training is asked of a model that read none of them. The weights of a later round may
    know the client's rows from earlier ones: that is leakage, and no excuse.
    """
    if given.round is None or given.round.is_first or not _compared(rows):
        return None
    model: Any = given.package.load_model(dtype="float32")
    model.to(choose_device(config.device)).eval()
    return _of_texts(config, model, tokenizer, _compared(rows), "the package alone")


def _retuned(config: AuditBundleConfig, given: Given, audit: BundleAudit) -> Retuned | None:
    """Return what attacks on retunings guess right, where rows are too few to attack the bundle itself."""
    reader = given.package.load_reader()
    head = given.run.adapter.head

    def score(model: Any, examples: list[Example], label: str) -> RowScores:
        _, found = _said(config, model, reader, examples, () if head is None else head.labels, label)
        if found is None:
            raise RunFailed("an encoder without a head was to be scored")
        return found

    is_causal = not given.package.is_encoder and not given.package.is_seq2seq
    return retune(config, given, reader, score, is_causal=is_causal, is_needed=needs_retunings(audit))


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


def _canary_audit(given: Given, rows: Rows, before: _Found, after: _Found) -> CanaryAudit | None:
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


def _scan(config: AuditBundleConfig, given: Given) -> ScanFigures:
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
        "retunings": 0 if audit.retuned is None else len(audit.retuned.num_in),
        "retuned_auc": {}
        if audit.retuned is None
        else {one.signal: round(area(one)[0], 6) for one in audit.retuned.attacks},
        "canary_auc": {} if canaries is None else {one.signal: one.auc.value for one in canaries.membership},
        "epsilon_claimed": None if audit.run.claim is None else audit.run.claim.epsilon,
        "epsilon_shown": None if bound is None else bound.epsilon,
        "secrets_extracted": None
        if exposure is None
        else max(exposure.num_extracted_greedy, exposure.num_extracted_top_k),
        "rows_extracted": None if verbatim_ is None else verbatim_.num_new,
    }
