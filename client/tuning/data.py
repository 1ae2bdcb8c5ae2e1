"""The client's private text, as batches to train on and examples to validate on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from offsite.console import say
from offsite.errors import ConfigError, DataError
from offsite.modelling.context import context_of
from offsite.text.batches import IGNORED, Batches, Encoded, Example, encode, encode_questions, pack, pad_id
from offsite.text.forms import encode_answers, encode_images
from offsite.text.records import Record, split_by_document
from offsite.vision.reader import ImageReader, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sides:
    """A file's records by what becomes of their documents: trained on, validated on, or set aside for an audit.

    ``num_in_both`` rows are on no side: they stand in the file that is validated on, too.
    """

    train: list[Record] = field(repr=False)
    validation: list[Record] = field(repr=False)
    audit: list[Record] = field(repr=False)
    num_in_both: int = 0


@dataclass(frozen=True)
class TrainingText:
    """Batches and examples of the training documents, examples of the held-out ones, and what became of the rows.

    ``read`` are the records that the run reads: those trained and validated on, and canaries. ``num_records`` and
    ``num_tokens`` are of the training documents, canaries apart; ``num_in_both`` as of `Sides`. ``rows`` are what is
    trained on row by row, canaries behind the rest; ``examples`` the same as it is trained on, in blocks of
    ``block_tokens`` where it is packed.
    """

    batches: Batches = field(repr=False)
    validation: list[Example] = field(repr=False)
    examples: list[Example] = field(repr=False)
    rows: list[Example] = field(repr=False)
    block_tokens: int | None
    pad_id: int
    num_records: int
    num_tokens: int
    num_truncated: int
    num_dropped: int
    longest_tokens: int = 0
    largest_id: int = 0
    num_canaries: int = 0
    num_aside: int = 0
    num_in_both: int = 0
    read: list[Record] = field(default_factory=list, repr=False)


def split_records(
    records: Sequence[Record],
    *,
    validation: float,
    audit_share: float,
    seed: int,
    held_out: Sequence[Record] | None = None,
) -> Sides:
    """Return the records of each side; a document is on one side as a whole.

    The side follows from `seed` and the document's name, so an audit can repeat it. Those set aside are chosen first,
    independently of those validated on: but for chance they are like those trained on.

    Args:
        validation: share of the documents not set aside that are validated on, between 0 and 1.
        audit_share: share of all documents that are set aside, from 0 for none up to 1, excluded.
        held_out: rows of other files, validated on in place of a share. Rows that say the same as one of them are on no
            side: neither may they be trained on, nor would an audit be right to take them for rows of the other kind.

    Raises:
        DataError: when there are too few documents.
        ConfigError: when `validation` or `audit_share` is out of range.
    """
    known = {record.content for record in held_out or ()}
    kept = [record for record in records if record.content not in known] if known else list(records)
    if not kept:
        raise DataError("every row of --data stands in --eval, too: none is left to train on")
    num_in_both = len(records) - len(kept)
    aside: list[Record] = []
    if audit_share:
        kept, aside = split_by_document(kept, fraction=audit_share, seed=seed, purpose="audit")
    if held_out is not None:
        return Sides(kept, list(held_out), aside, num_in_both)
    train, validated = split_by_document(kept, fraction=validation, seed=seed)
    return Sides(train, validated, aside)


def prepare(
    records: Sequence[Record],
    tokenizer: Reader,
    *,
    block_tokens: int,
    batch_size: int,
    packed: bool = True,
    on_long: Literal["truncate", "error"] = "truncate",
    validation: float = 0.1,
    seed: int = 0,
    audit_share: float = 0.0,
    canaries: Sequence[Record] = (),
    first_step: int = 0,
    num_new: int | None = None,
    ended: bool = True,
    start: int | None = None,
    held_out: Sequence[Record] | None = None,
) -> TrainingText:
    """Return the records as training batches and validation examples; a document is on one side as a whole.

    Args:
        tokenizer: or what reads images, where the records are such.
        block_tokens: longest sequence in tokens.
        batch_size: sequences in one optimiser step.
        validation: share of documents held out, between 0 and 1.
        audit_share: share of documents that are set aside, neither trained nor validated on, below 1.
        canaries: made-up rows that are trained on as well, after the split.
        first_step: batches that earlier rounds have taken; these go on after them.
        num_new: most tokens that are to follow each prompt, where records are questions; None where they are text.
        ended: whether rows end with an end-of-sequence token; not where a head reads them.
        start: token that an encoder-decoder's answers begin behind; None for any other model.
        held_out: rows of other files that are validated on in place of a share; see `split_records`.

    Raises:
        DataError: when a row is too long under "error", or there is too little text for one batch.
        ConfigError: when the tokenizer cannot serve.
    """
    sides = split_records(records, validation=validation, audit_share=audit_share, seed=seed, held_out=held_out)

    def encoded(rows: Sequence[Record]) -> Encoded:
        if isinstance(tokenizer, ImageReader):
            return encode_images(rows, tokenizer)
        if start is not None:
            return encode_answers(rows, tokenizer, start=start, context=block_tokens, on_long=on_long)
        if num_new is not None:
            return encode_questions(rows, tokenizer, context=block_tokens, num_new=num_new, on_long=on_long)
        return encode(rows, tokenizer, context=block_tokens, on_long=on_long, whole_text=packed, ended=ended)

    def shaped(examples: list[Example]) -> list[Example]:
        return pack(examples, block_tokens=block_tokens) if packed else examples

    train, validating = encoded(sides.train), encoded(sides.validation)
    added = encoded(canaries) if canaries else None
    rows = [*train.examples, *(added.examples if added else ())]
    examples = shaped(rows)
    validated = shaped(validating.examples)
    if len(examples) < batch_size:
        raise DataError(
            f"too little text: {len(examples)} sequences of up to {block_tokens} tokens, one step needs {batch_size}",
            hint="use a smaller --batch-size or --block-tokens, or more data",
        )
    if not validated:
        hint = "raise --validation, or give more data" if held_out is None else "give more text in --eval"
        raise DataError("too little text is held out to validate on", hint=hint)
    pad = pad_id(tokenizer)
    parts = [part for part in (train, validating, added) if part is not None]
    every = [row for example in (*examples, *validated) for row in example.sides]
    return TrainingText(
        batches=Batches(examples, batch_size=batch_size, seed=seed, pad_id=pad, first_step=first_step),
        validation=validated,
        examples=examples,
        rows=rows,
        block_tokens=block_tokens if packed else None,
        pad_id=pad,
        num_records=len(sides.train),
        num_tokens=train.num_tokens,
        num_truncated=sum(part.num_truncated for part in parts),
        num_dropped=sum(part.num_dropped for part in parts),
        longest_tokens=max(max(len(row.input_ids), len(row.prompt) + (num_new or 0), len(row.source)) for row in every),
        largest_id=max(max([*row.input_ids, *row.source]) for row in every),
        num_canaries=len(canaries),
        num_aside=len(sides.audit),
        num_in_both=sides.num_in_both,
        read=[*sides.train, *sides.validation, *canaries],
    )


def rows_drawn(text: TrainingText, draws: Iterable[tuple[int, int]], *, whole: bool) -> set[int]:
    """Return the numbers of the rows, in ``text.rows``, that the first batches hold, of any of the runs on that text.

    Args:
        draws: of each run, the seed of its batches and how many of them it took.
        whole: rows of which every token is in them; otherwise those of which any is.
    """
    found: set[int] = set()
    for seed, steps in draws:
        found |= _rows_in(text, text.batches.reseeded(seed), steps, whole=whole)
    return found


def _rows_in(text: TrainingText, batches: Batches, steps: int, *, whole: bool) -> set[int]:
    """Return the numbers of the rows that the first `steps` of these batches hold."""
    numbers = {id(example): number for number, example in enumerate(text.examples)}
    drawn = {numbers[id(example)] for step in range(steps) for example in batches.chosen(step)}
    if text.block_tokens is None:
        return drawn
    kept = _blocks_kept(text.rows, text.block_tokens, len(text.examples))
    blocks, found, start, enough = {kept[number] for number in drawn}, set(), 0, all if whole else any
    for number, row in enumerate(text.rows):
        end = start + len(row.input_ids)
        if enough(block in blocks for block in range(start // text.block_tokens, -(-end // text.block_tokens))):
            found.add(number)
        start = end
    return found


def _blocks_kept(rows: Sequence[Example], block_tokens: int, num_kept: int) -> Sequence[int]:
    """Return the numbers, in the stream of all tokens, of the blocks that packing keeps: those where a label counts.

    Args:
        num_kept: how many they are; where all are, none need be looked at.
    """
    num = -(-sum(len(row.input_ids) for row in rows) // block_tokens)
    if num == num_kept:
        return range(num)
    counts, position = bytearray(num), 0
    for row in rows:
        for label in row.labels:
            if label != IGNORED and position % block_tokens:  # a block's first token follows none
                counts[position // block_tokens] = 1
            position += 1
    return [number for number in range(num) if counts[number]]


def say_files(paths: Sequence[Path], records: Sequence[Record]) -> None:
    """Where there are several files, how many rows of each there are is on stderr."""
    if len(paths) < 2:
        return
    counts = Counter(record.place.rpartition(": ")[0] for record in records)
    for name, count in counts.items():
        say(f"{name}: {count:,} rows")


def say_text(text: TrainingText) -> None:
    """What the text came to is on stderr, in numbers."""
    asks = any(example.prompt for example in text.examples)
    aside = f", {text.num_aside} records set aside for an audit" if text.num_aside else ""
    say(
        f"{text.num_records} records, {text.num_tokens:,} tokens to train on; "
        f"{len(text.validation)} sequences held out{aside}"
    )
    if text.num_in_both:
        say(f"{text.num_in_both} rows stand in --eval, too: they are not trained on")
    if text.num_canaries:
        say(f"{text.num_canaries} rows of canaries are trained on as well")
    if text.num_truncated:
        say(f"{text.num_truncated} rows were longer than the context and were cut")
    if text.num_dropped:
        why = "their prompts leave no room for an answer" if asks else "nothing that counts was left of them"
        say(f"{text.num_dropped} rows were dropped: {why}")


def require_fit(text: TrainingText, model: PreTrainedModel) -> None:
    """Return only if the model can read the text: its context is long enough and it knows every token.

    Raises:
        ConfigError: saying which of the two is too small.
    """
    if text.examples[0].image is not None:  # of the size that the package's reader made
        return
    context = context_of(model)
    if context is not None and text.longest_tokens > context:
        raise ConfigError(
            f"sequences of {text.longest_tokens} tokens, the package's context is {context}",
            hint=f"use --block-tokens {context}",
        )
    num_known = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index, union-attr, arg-type]
    if text.largest_id >= num_known:
        raise ConfigError(f"the package's tokenizer gives token {text.largest_id}, its model knows {num_known}")
