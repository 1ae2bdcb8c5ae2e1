"""Rows as examples of models that read something else than one running text: encoder-decoders, and images.

Of a prompt and its answer the encoder reads the prompt as the tokenizer closes it. The decoder reads the start token,
then the answer as the tokenizer closes it, with one end-of-sequence token behind; every token but the start counts in
the loss. transformers computes the same from ``labels``: it shifts them behind the start token by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from offsite.errors import ConfigError, DataError
from offsite.text.batches import IGNORED, Encoded, Example
from offsite.text.calls import encoded
from offsite.text.records import Record
from offsite.vision.reader import ImageReader

_ROWS = "give rows of a prompt and a completion, or name the columns: --fields prompt=...,completion=..."


def encode_answers(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    start: int,
    context: int,
    on_long: Literal["truncate", "error"] = "truncate",
) -> Encoded:
    """Return every row as one example; prompt and answer may have `context` tokens each.

    A longer prompt keeps its beginning and its last token, a longer answer its beginning; both are counted.

    Args:
        start: token that every answer begins behind (`offsite.seq2seq.models.start_token`).
        on_long: "error" refuses longer rows instead.

    Raises:
        DataError: when a row is no prompt with an answer, or too long under "error".
        ConfigError: when the tokenizer has no end-of-sequence token.
    """
    _require_end(tokenizer, context)
    examples, num_truncated = [], 0
    for record in records:
        prompt, answer = _parts(record)
        place = record.place or f"row {record.row}"
        source = encoded(tokenizer, prompt, what=f"the prompt of {place}")
        target = _closed(encoded(tokenizer, answer, what=f"the answer of {place}"), tokenizer)
        if max(len(source), len(target) + 1) > context:
            if on_long == "error":
                raise DataError(
                    f"{place}: {len(source)} tokens of a prompt and {len(target) + 1} of an answer, expected at most "
                    f"{context} of each",
                    hint="--on-long truncate cuts such rows and counts them",
                )
            num_truncated += 1
        if not source:
            raise DataError(f"{place}: the prompt has no token for the encoder to read", hint=_ROWS)
        examples.append(_example(source, target, start, context, record.document))
    return _told(examples, num_truncated)


def halved(blocks: Iterable[Example], *, start: int) -> list[Example]:
    """Return blocks of running text for an encoder-decoder: the encoder reads the first half, the decoder the second.

    Blocks of fewer than two tokens are left out.
    """
    found = []
    for block in blocks:
        ids, half = block.input_ids, len(block.input_ids) // 2
        if half:
            found.append(_example(ids[:half], ids[half:], start, len(ids), block.document))
    return found


def _example(source: list[int], target: list[int], start: int, context: int, document: str) -> Example:
    ids = [start, *target][:context]
    kept = source if len(source) <= context else [*source[: context - 1], source[-1]]
    return Example(ids, [IGNORED, *ids[1:]], document, source=tuple(kept))


def is_answered(record: Record) -> bool:
    """Say whether the row is a prompt and its answer."""
    others = record.messages or record.rejected is not None or record.label is not None
    return not others and [counts for _, counts in record.segments] == [False, True]


def _parts(record: Record) -> tuple[str, str]:
    """Return the prompt and the answer of a row."""
    if not is_answered(record):
        shown = "messages" if record.messages else "another form" if record.rejected else "running text"
        raise DataError(
            f"{record.place or f'row {record.row}'}: {shown}, expected a prompt and its answer: an encoder-decoder "
            "reads one and writes the other",
            hint=_ROWS,
        )
    return record.segments[0][0], record.segments[1][0]


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the answer's tokens with one end-of-sequence token behind."""
    end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    return ids if ids[-1:] == [end] else [*ids, end]


def _require_end(tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    if context < 2:
        raise ConfigError(f"context of {context} tokens, expected at least 2")
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token", hint="set eos_token in its configuration")


def _told(examples: list[Example], num_truncated: int) -> Encoded:
    num_tokens = sum(len(one.source) + len(one.input_ids) for one in examples)
    return Encoded(examples, num_truncated, 0, num_tokens, sum(one.num_loss_tokens for one in examples))


def encode_images(records: Sequence[Record], reader: ImageReader) -> Encoded:
    """Every image as one example, whose ids are zeros, one for each place of the image.

    So batches, splits and audits count images as they count text: a place is a token.

    Raises:
        DataError: naming the first row whose image is none that is taken.
    """
    examples = []
    for record in records:

        def error(problem: str, place: str = record.place) -> DataError:
            return DataError(f"{place}: {problem}", hint="leave the row out, or write its image anew as PNG")

        if record.image is None:
            raise error("holds no image")
        picture, ids = reader.picture(record.image, error), [0] * reader.num_places
        target = None if record.label is None else record.label.number
        examples.append(Example(ids, ids, record.document, target=target, image=picture))
    num_tokens = len(examples) * reader.num_places
    return Encoded(examples, 0, 0, num_tokens, num_tokens - len(examples))
