"""Which rows an audit scores: some that a run was trained on, and others that it never read.

A row counts as trained on when the run drew it by the step whose weights are released: of fewer steps than an epoch
has, rows whose batch had not come are neither members nor non-members, and so are canaries. Of a private run nobody
knows which were drawn, so all of its units count. A row that stands in the text twice is scored once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from client.privacy.dpsgd import units_of
from client.tuning.data import TrainingText, prepare, rows_drawn, split_records
from offsite.audits.canaries import CanarySet, drawn_only, records_of
from offsite.audits.runs import Run
from offsite.errors import WrongBinding
from offsite.text.batches import Encoded, Example, cut, encode, encode_questions
from offsite.text.forms import encode_answers, encode_images
from offsite.text.records import Record
from offsite.vision.reader import ImageReader, Reader

Source = Literal["set aside", "validation", "file"]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Rows:
    """Rows to score, as they were trained on one by one, and where those not trained on come from.

    ``num_available`` is of non-members, before some were chosen. ``canaries`` is the set without what was to be trained
    on and never was, None where nothing is left of it; ``drawn_share`` is how much of that was drawn.
    """

    members: list[Example] = field(repr=False)
    nonmembers: list[Example] = field(repr=False)
    source: Source
    num_available: int
    canaries: CanarySet | None = field(default=None, repr=False)
    drawn_share: float = 1.0


def choose_rows(
    records: Sequence[Record],
    run: Run,
    tokenizer: Reader,
    *,
    limit: int,
    context: int | None,
    others: Sequence[Record] | None = None,
    held_out: Sequence[Record] | None = None,
    canaries: CanarySet | None = None,
    seed: int = 0,
    num_new: int | None = None,
    start: int | None = None,
) -> Rows:
    """Return at most `limit` rows that the run was trained on and as many that it was not, drawn by `seed`.

    Args:
        records: of the file that was tuned on, all of them.
        context: longest row that the model can read; none for any.
        held_out: rows of other files that were validated on, of a run that did so.
        others: non-members; without them, those set aside, or else those validated on.
        canaries: the set that was trained on.
        num_new: most tokens that followed a prompt, of a run on questions; their answers are what is scored.
        start: token that an encoder-decoder's answers begin behind; None for any other model.

    Raises:
        WrongBinding: when the split does not come out as the run's did.
        DataError: when no row that was trained on has a token to score.
    """
    text = run.text
    sides = split_records(
        records, validation=text.validation, audit_share=text.audit_share, seed=text.seed, held_out=held_out
    )
    if len(sides.train) != run.num_records:
        raise WrongBinding(
            f"the data splits into {len(sides.train)} rows to train on, the run's record says {run.num_records}",
            hint="give the very file that was tuned on",
        )
    source: Source = "file" if others is not None else "set aside" if sides.audit else "validation"
    outside = others if others is not None else sides.audit or sides.validation
    read = [sides.train, *([] if source == "validation" else [sides.validation])]
    known = {record.content for side in read for record in side}
    unread = [record for record in outside if record.content not in known]
    planted = [] if canaries is None else records_of(canaries)
    inside, known_canaries = _trained(records, held_out, sides.train, run, tokenizer, planted, num_new, start)
    inside = _scorable(_distinct(inside))
    nonmembers = _scorable(_distinct(_encoded(unread, run, tokenizer, num_new, start).examples)) if unread else []
    chosen = [some(rows, limit, f"{seed}/{name}") for rows, name in ((inside, "members"), (nonmembers, "others"))]
    fitting = [[example if context is None else cut(example, context) for example in rows] for rows in chosen]
    kept, share = canaries, 1.0
    if canaries is not None and known_canaries is not None:
        kept = drawn_only(canaries, known_canaries)
        share = kept.num_included / max(1, canaries.num_included)
    return Rows(fitting[0], fitting[1], source, len(nonmembers), kept if kept and kept.synthetic else None, share)


def _trained(
    records: Sequence[Record],
    held_out: Sequence[Record] | None,
    train: Sequence[Record],
    run: Run,
    tokenizer: Reader,
    planted: Sequence[Record],
    num_new: int | None,
    start: int | None,
) -> tuple[list[Example], set[str] | None]:
    """Return the rows that count as trained on, and the documents of canaries that do; None where all of them do."""
    examples = _encoded(train, run, tokenizer, num_new, start).examples
    if run.claim is not None:
        units = units_of(examples, unit=run.claim.unit, rows_per_user=run.claim.rows_per_user or 1)
        return [example for unit in units for example in unit], None
    added = _encoded(planted, run, tokenizer).examples if planted else []
    drawn = _drawn(records, held_out, run, tokenizer, planted, num_new, start)
    if drawn is None:
        return examples, None
    inside = [example for number, example in enumerate(examples) if number in drawn]
    return inside, {example.document for number, example in enumerate(added, len(examples)) if number in drawn}


def _drawn(
    records: Sequence[Record],
    held_out: Sequence[Record] | None,
    run: Run,
    tokenizer: Reader,
    planted: Sequence[Record],
    num_new: int | None,
    start: int | None,
) -> set[int] | None:
    """Return the numbers of the rows that the run drew, whole, by the step released; None when it drew them all.

    Of several runs whose mean was released, those that any of them drew.
    """
    whole = text_of(records, run, tokenizer, planted, num_new, start, held_out=held_out)
    found = rows_drawn(whole, run.draws, whole=True)
    return None if len(found) == len(whole.rows) else found


def text_of(
    records: Sequence[Record],
    run: Run,
    tokenizer: Reader,
    planted: Sequence[Record],
    num_new: int | None = None,
    start: int | None = None,
    *,
    held_out: Sequence[Record] | None = None,
) -> TrainingText:
    """Return the text as the run read and cut it, canaries behind the rest; `held_out` of files of their own."""
    text = run.text
    return prepare(
        records,
        tokenizer,
        block_tokens=text.block_tokens,
        batch_size=run.batch_size,
        packed=text.packed,
        on_long=text.on_long,
        validation=text.validation,
        seed=text.seed,
        audit_share=text.audit_share,
        canaries=planted,
        first_step=0 if run.round is None else run.round.first_step,
        num_new=num_new,
        ended=run.adapter.head is None,
        start=start,
        held_out=held_out,
    )


def _encoded(
    records: Sequence[Record],
    run: Run,
    tokenizer: Reader,
    num_new: int | None = None,
    start: int | None = None,
) -> Encoded:
    text = run.text
    if isinstance(tokenizer, ImageReader):
        return encode_images(records, tokenizer)
    if start is not None:
        return encode_answers(records, tokenizer, start=start, context=text.block_tokens, on_long=text.on_long)
    if num_new is not None:
        return encode_questions(records, tokenizer, context=text.block_tokens, num_new=num_new, on_long=text.on_long)
    ended = run.adapter.head is None
    return encode(
        records, tokenizer, context=text.block_tokens, on_long=text.on_long, whole_text=text.packed, ended=ended
    )


def _scorable(examples: Sequence[Example]) -> list[Example]:
    """Return the examples with a token that another one stands before: a labelled text of one token has none."""
    return [example for example in examples if example.num_loss_tokens]


def some(rows: Sequence[Row], limit: int, label: str) -> list[Row]:
    """Return at most `limit` of the rows, in their order, by a draw that the label decides."""
    if len(rows) <= limit:
        return list(rows)
    chosen = random.Random(f"offsite/v1/audit/{label}").sample(range(len(rows)), limit)  # noqa: S311 - not a secret
    return [rows[number] for number in sorted(chosen)]


def _distinct(examples: Sequence[Example]) -> list[Example]:
    """Return the examples in their order, of those that are alike the first."""
    found: dict[tuple[object, ...], Example] = {}
    for example in examples:
        found.setdefault(content_of(example), example)
    return list(found.values())


def content_of(example: Example) -> tuple[object, ...]:
    """Return what two rows that are alike have in common."""
    tokens = tuple(tuple(part) for side in example.sides for part in (side.input_ids, side.labels, side.source))
    return (example.target, example.value, "" if example.image is None else example.image.digest, tokens)
