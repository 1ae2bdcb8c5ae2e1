"""Text as token batches: read, tokenise with the loss where it belongs, pack, split by document, batch.

Shapes: B = rows in a batch, T = tokens of its longest row. A label of -100 does not count in the loss.
The label at position t is predicted from the tokens before t, so the first of a row never counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice, takewhile
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from offsite.errors import ConfigError, DataError
from offsite.seq2seq.inputs import SOURCE
from offsite.text.calls import TookTooLong, encoded, enough_seconds, quietly
from offsite.text.chat import ASSISTANT, Spans, answers_only, asked_chat, rendered_chat, written_chat
from offsite.text.headrows import tag_labels
from offsite.text.prompts import prompt_ids
from offsite.text.records import Record, answer_of
from offsite.vision.models import PIXELS
from offsite.vision.reader import ImageReader, Picture, Reader

IGNORED = -100
_ROWS_AT_ONCE = 512

Encoding = tuple[list[int], list[tuple[int, int]]]  # token ids, and the characters that each stands for


@dataclass(frozen=True)
class Example:
    """Token ids and, position by position, labels (-100 where the loss does not count).

    A pair of answers is the chosen row, with the other one in ``rejected``. A question is the row with its right
    answer, where it has one: ``prompt`` is what is to be continued, ``answer`` that answer's text, ``question`` the
    record. A classifier's row has its label's place among the labels in ``target``, a regression's its ``value``; of a
    ``tagged`` one ``labels`` are tags' places. ``closing`` are the special tokens behind its text, as an encoder's
    separator: a cut takes the text's end and leaves them. Of a row for an
    encoder-decoder, ids and labels are the decoder's; ``source`` is what its encoder reads (`offsite.text.forms`).
    Of an ``image`` the ids are zeros, one for each place at which a model has a state (`offsite.text.forms`).
    """

    input_ids: list[int] = field(repr=False)
    labels: list[int] = field(repr=False)
    document: str = field(default="", repr=False)
    rejected: Example | None = field(default=None, repr=False)
    prompt: tuple[int, ...] = field(default=(), repr=False)
    answer: str | None = field(default=None, repr=False)
    question: Record | None = field(default=None, repr=False)
    target: int | None = field(default=None, repr=False)
    value: float | None = field(default=None, repr=False)
    tagged: bool = False
    closing: int = 0
    source: tuple[int, ...] = field(default=(), repr=False)
    image: Picture | None = field(default=None, repr=False)

    @property
    def sides(self) -> tuple[Example, ...]:
        """Both rows of a pair, the chosen one first; of anything else the row itself."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def num_loss_tokens(self) -> int:
        """Positions that a model is scored on: labels that count, the first position apart."""
        return len(self.labels) - 1 - self.labels[1:].count(IGNORED) if self.labels else 0


@dataclass(frozen=True)
class Encoded:
    """Examples and what became of the records: how many were truncated, how many dropped by it."""

    examples: list[Example] = field(repr=False)
    num_truncated: int
    num_dropped: int
    num_tokens: int
    num_loss_tokens: int


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    on_long: Literal["truncate", "error"] = "truncate",
    whole_text: bool = False,
    ended: bool = True,
) -> Encoded:
    """Every record as one example that ends with the end-of-sequence token.

    The loss counts everywhere in running text, on completions only where there are completions, and on
    the assistant's turns of a chat, which the tokenizer's own template renders. Prompt and completion
    are tokenised as one text and told apart by character offsets: tokenised alone, a completion would
    get the word-start mark that SentencePiece puts before every text. A token that straddles the
    border counts. Of a pair both rows are made so, and their tokens are counted together.

    Args:
        context: longest example in tokens. A longer record is cut at its end and counted; when nothing
            that counts is left of it, it is dropped and counted as that too. Of a pair either row is cut;
            it is dropped when nothing that counts is left of one of them, or nothing that tells them apart.
        on_long: "error" refuses a longer record instead.
        whole_text: leave running text whole whatever its length, for `pack` to cut into blocks.
        ended: without, a row ends as the tokenizer ends a text by itself: what a head reads (``adapters/heads.py``).
            Special tokens that close it stay where it is cut, as with the tokenizer's own truncation.

    Raises:
        DataError: a record is too long under "error"; nothing is left; the chat template is missing,
            refuses a conversation, or renders earlier turns differently once later ones follow.
        ConfigError: the tokenizer has no end-of-sequence token or no character offsets, or its special tokens take
            the whole context.
    """
    _check_tokenizer(tokenizer, context)
    if not ended and context <= (added := tokenizer.num_special_tokens_to_add()):
        raise ConfigError(f"a context of {context} tokens has no room for text: the tokenizer adds {added} to each")
    examples: list[Example] = []
    num_truncated = num_dropped = 0
    for record, example in _paired(records, tokenizer, ended=ended):
        num_tokens = max(len(side.input_ids) for side in example.sides)
        if num_tokens > context and not (whole_text and _is_running_text(record)):
            if on_long == "error":
                raise DataError(
                    f"{record.place or f'row {record.row}'}: {num_tokens} tokens, the context is {context}",
                    hint="--on-long truncate cuts such rows and counts them",
                )
            num_truncated += 1
            example = cut(example, context)
        if _counts(example):
            examples.append(example)
        else:
            num_dropped += 1
    if not examples:
        raise DataError(
            f"nothing to learn from: none of {len(records)} rows has a token that counts within {context} tokens",
            hint="raise the context, or shorten the prompts",
        )
    sides = [side for example in examples for side in example.sides]
    num_tokens = sum(len(side.input_ids) for side in sides)
    num_loss_tokens = sum(side.num_loss_tokens for side in sides)
    return Encoded(examples, num_truncated, num_dropped, num_tokens, num_loss_tokens)


def encode_questions(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    num_new: int,
    on_long: Literal["truncate", "error"] = "truncate",
) -> Encoded:
    """Every question as one example: its prompt, tokenised as what is to be continued, and the row with its answer.

    A row without an answer is its prompt, of which nothing counts. A prompt is never cut: one that leaves no room for
    so many new tokens is dropped and counted. A longer answer of the row's own is cut at its end.

    Args:
        context: most tokens of a prompt and what follows it.
        num_new: most tokens that are to follow a prompt.
        on_long: "error" refuses a longer prompt instead.

    Raises:
        DataError: a prompt is too long under "error", or no prompt is left; as `encode` of templates.
        ConfigError: there is no room for a prompt; as `encode` of tokenizers.
    """
    _check_tokenizer(tokenizer, context)
    if num_new >= context:
        raise ConfigError(f"{num_new} new tokens leave no room for a prompt in a context of {context}")
    answered = _tokenised((one for one in records if answer_of(one) is not None), tokenizer, ended=True)
    examples: list[Example] = []
    num_truncated = num_dropped = 0
    for record in records:
        prompt, answer = _prompt_of(record, tokenizer), answer_of(record)
        example = Example(prompt, [IGNORED] * len(prompt), record.document) if answer is None else next(answered)[1]
        if len(prompt) + num_new > context:
            if on_long == "error":
                raise DataError(
                    f"{record.place or f'row {record.row}'}: a prompt of {len(prompt)} tokens leaves no room for "
                    f"{num_new} more in a context of {context}",
                    hint="--on-long truncate leaves such rows out and counts them",
                )
            num_dropped += 1
            continue
        num_truncated += len(example.input_ids) > context
        examples.append(replace(cut(example, context), prompt=tuple(prompt), answer=answer, question=record))
    if not examples:
        raise DataError(
            f"none of {len(records)} prompts leaves room for {num_new} tokens in a context of {context}",
            hint="raise the context, or shorten the prompts",
        )
    num_tokens = sum(len(example.input_ids) for example in examples)
    return Encoded(examples, num_truncated, num_dropped, num_tokens, sum(one.num_loss_tokens for one in examples))


def _prompt_of(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a question's prompt as tokens, closed by nothing."""
    if not record.messages:
        return prompt_ids(tokenizer, record.segments[0][0])
    text = asked_chat(record, tokenizer)
    return encoded(tokenizer, text, what="a prompt", add_special_tokens=False)  # the template writes its own


def answered_ids(record: Record, answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a question with this answer in place of its own, as the tokens that a head reads of such a row.

    They are those of `encode` without an end: of the whole text, or of what the chat template writes of it all.

    Args:
        record: a prompt, with or without an answer: segments of which the first is the prompt, or messages.

    Raises:
        DataError: when the tokenizer or the chat template fails on it, or there is none.
    """
    if not record.messages:
        return encoded(tokenizer, record.segments[0][0] + answer, what="an answer")
    said = (*record.messages[: record.num_given], (ASSISTANT, answer))
    text = written_chat(replace(record, messages=said), tokenizer)
    return encoded(tokenizer, text, what="an answer", add_special_tokens=False)


def cut(example: Example, num_tokens: int) -> Example:
    """Return the example, and the other row of a pair, up to its first so many tokens; those that close it stay."""
    rejected = None if example.rejected is None else cut(example.rejected, num_tokens)
    length = len(example.input_ids)
    end, closed = min(num_tokens, length) - example.closing, length - example.closing
    ids, labels = (part[:end] + part[closed:] for part in (example.input_ids, example.labels))
    return replace(example, input_ids=ids, labels=labels, rejected=rejected)


def pack(examples: Sequence[Example], *, block_tokens: int) -> list[Example]:
    """Consecutive blocks of `block_tokens` filled across examples; the last holds what remains.

    Examples follow one another without a gap, and attention sees across them. A block in which no label
    counts is left out.
    """
    ids = chain.from_iterable(example.input_ids for example in examples)
    labels = chain.from_iterable(example.labels for example in examples)
    blocks = []
    for block in iter(lambda: list(islice(ids, block_tokens)), []):
        packed = Example(block, list(islice(labels, block_tokens)))
        if packed.num_loss_tokens:
            blocks.append(packed)
    return blocks


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """One batch, padded on the right: input_ids, labels and attention_mask, each (B, T) int64.

    Of an encoder-decoder's rows also source_ids and source_mask, (B, S) int64 each; of images also pixel_values,
    (B, 3, H, W) float32.
    """
    num_tokens = max(len(example.input_ids) for example in examples)
    input_ids_BT = torch.full((len(examples), num_tokens), pad_id)
    labels_BT = torch.full((len(examples), num_tokens), IGNORED)
    mask_BT = torch.zeros((len(examples), num_tokens), dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids_BT[row, :length] = torch.tensor(example.input_ids)
        labels_BT[row, :length] = torch.tensor(example.labels)
        mask_BT[row, :length] = 1
    found = {"input_ids": input_ids_BT, "labels": labels_BT, "attention_mask": mask_BT}
    if examples[0].source:
        sources = collate([Example(list(one.source), list(one.source)) for one in examples], pad_id)
        found |= dict(zip(SOURCE, (sources["input_ids"], sources["attention_mask"]), strict=True))
    if images := [one.image.values for one in examples if one.image is not None]:
        found[PIXELS] = torch.stack(images)
    return found


def pad_id(tokenizer: Reader) -> int:
    """The id to pad with: the tokenizer's own, otherwise end-of-sequence; padding is masked either way. Of images 0."""
    if isinstance(tokenizer, ImageReader):
        return 0
    chosen = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else _eos(tokenizer)
    return int(chosen)


class Batches:
    """The batch of any step, from the seed and the step's number alone: resuming needs no other state.

    Examples come in an endless stream of seeded permutations, one per epoch, cut into batches of equal
    size; a batch may span two epochs.

    Args:
        first_step: step of that stream at which these begin: what earlier runs of the same seed have taken.
    """

    def __init__(
        self, examples: Sequence[Example], *, batch_size: int, seed: int, pad_id: int, first_step: int = 0
    ) -> None:
        if not examples or batch_size < 1:
            raise ConfigError(f"{len(examples)} examples in batches of {batch_size}, expected at least one of each")
        self._examples, self._batch_size, self._seed, self._pad_id = examples, batch_size, seed, pad_id
        self._first_step = first_step
        self._orders: dict[int, list[int]] = {}

    def reseeded(self, seed: int) -> Batches:
        """Return batches of the same examples, drawn by another seed."""
        return Batches(
            self._examples,
            batch_size=self._batch_size,
            seed=seed,
            pad_id=self._pad_id,
            first_step=self._first_step,
        )

    @property
    def num_steps_per_epoch(self) -> int:
        """Steps after which every example has been seen."""
        return -(-len(self._examples) // self._batch_size)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The collated batch of `step`, counted from 0."""
        return collate(self.chosen(step), self._pad_id)

    def num_tokens(self, step: int) -> int:
        """Tokens of the batch of `step`, padding apart."""
        sides = [side for example in self.chosen(step) for side in example.sides]
        return sum(len(side.input_ids) + len(side.source) for side in sides)

    def chosen(self, step: int) -> list[Example]:
        """The examples of `step`, counted from 0."""
        first = (self._first_step + step) * self._batch_size
        places = (divmod(place, len(self._examples)) for place in range(first, first + self._batch_size))
        return [self._examples[self._order(epoch)[index]] for epoch, index in places]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            digest = hashlib.blake2b(f"offsite/v1/batches/{self._seed}/{epoch}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            self._orders = {  # one earlier epoch is kept for batches that span two
                **{known: order for known, order in self._orders.items() if known == epoch - 1},
                epoch: torch.randperm(len(self._examples), generator=generator).tolist(),
            }
        return self._orders[epoch]


# --- records to tokens


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    if context < 2:
        raise ConfigError(f"context of {context} tokens, expected at least 2")
    if not tokenizer.is_fast:
        raise ConfigError("the tokenizer knows no character offsets", hint="save it with its tokenizer.json")
    _eos(tokenizer)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that a row ends with; encoders such as BERT end it with their separator."""
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if found is None:
        raise ConfigError("the tokenizer has no end-of-sequence token", hint="set eos_token in its configuration")
    return int(found)


def _is_running_text(record: Record) -> bool:
    return not record.messages and all(counts for _, counts in record.segments)


def _counts(example: Example) -> bool:
    """Tell whether anything can be learnt from the example."""
    first, *others = example.sides
    if first.tagged:
        return any(label != IGNORED for label in first.labels)
    if first.target is not None or first.value is not None:
        return bool(first.input_ids)
    return all(side.num_loss_tokens and side.input_ids != first.input_ids for side in others) and (
        first.num_loss_tokens > 0
    )


def _paired(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, ended: bool
) -> Iterator[tuple[Record, Example]]:
    """Yield every record as an example, a pair as one."""
    others = _tokenised((one.rejected for one in records if one.rejected is not None), tokenizer, ended=ended)
    for record, example in _tokenised(records, tokenizer, ended=ended):
        yield record, example if record.rejected is None else replace(example, rejected=next(others)[1])


def _tokenised(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, *, ended: bool
) -> Iterator[tuple[Record, Example]]:
    eos = _eos(tokenizer)
    shared: dict[int, int] = {}  # one object per id: a long text then costs 8 bytes a token, not 36
    for is_chat, group in groupby(records, key=lambda record: bool(record.messages)):
        while rows := list(islice(group, _ROWS_AT_ONCE)):
            rendered = _rendered(rows, tokenizer, is_chat=is_chat)
            encodings = _encodings(rows, [text for text, _ in rendered], tokenizer, is_chat=is_chat)
            for record, (text, spans), (ids, offsets) in zip(rows, rendered, encodings, strict=True):
                ends = [end for _, end in offsets]
                labels = _labels(ids, ends, spans, len(text))
                if record.words:
                    labels = [IGNORED if n is None else n for n in tag_labels(record.words, record.tags, ends)]
                if ended:
                    _end(ids, labels, eos, closed=is_chat, counts=any(end == len(text) for _, end in spans))
                labels = [shared.setdefault(label, label) for label in labels]
                known = None if record.label is None else record.label.number
                ids = [shared.setdefault(i, i) for i in ids]
                said: dict[str, Any] = {"target": known, "value": record.value, "tagged": bool(record.words)}
                closing = 0 if ended else _num_closing(offsets)
                yield record, Example(ids, labels, record.document, closing=closing, **said)


def _rendered(rows: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, is_chat: bool) -> list[tuple[str, Spans]]:
    """Return the rows' texts, and what of each counts."""
    if not is_chat:
        return [_running(record) for record in rows]
    done: list[tuple[str, Spans]] = []

    def render() -> list[tuple[str, Spans]]:
        for record in rows:
            text, spans = rendered_chat(record, tokenizer)
            done.append((text, answers_only(record, spans)))
        return done

    limit = enough_seconds(sum(len(content) for record in rows for _, content in record.messages))
    return quietly(render, lambda kind: _failed([rows[len(done)]], "chat template", kind), limit_seconds=limit)


def _encodings(
    rows: Sequence[Record], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, is_chat: bool
) -> list[Encoding]:
    """Return of every text its tokens, and which characters each stands for.

    Raises:
        DataError: when the tokenizer fails or does not come to an end, naming the row that it fails on.
    """
    kinds: list[str] = []

    def encode_all() -> list[Encoding]:
        found = tokenizer(
            list(texts),
            add_special_tokens=not is_chat,  # a chat template writes its own
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    def refusal(kind: str) -> DataError:
        kinds.append(kind)
        return _failed(rows, "tokenizer", kind)

    try:
        return quietly(encode_all, refusal, compiled=True, limit_seconds=enough_seconds(sum(map(len, texts))))
    except DataError:
        if len(rows) == 1 or TookTooLong.__name__ in kinds:
            raise
    alone = (_encodings([row], [text], tokenizer, is_chat=is_chat) for row, text in zip(rows, texts, strict=True))
    return [encoding for (encoding,) in alone]


def _failed(rows: Sequence[Record], what: str, kind: str) -> DataError:
    """Return the error for rows on which the model's tokenizer or template raised `kind`."""
    more = f" and {len(rows) - 1} more rows" if len(rows) > 1 else ""
    how = "does not come to an end with" if kind == TookTooLong.__name__ else "fails on"
    named = "" if kind == TookTooLong.__name__ else f" ({kind})"
    return DataError(
        f"{rows[0].place or f'row {rows[0].row}'}{more}: the model's {what} {how} this{named}",
        hint=f"leave the row out, or ask for a model whose {what} works",
    )


def _labels(ids: Sequence[int], ends: Sequence[int], spans: Spans, length: int) -> list[int]:
    """Ids where the token's last character lies in a span. Starts are not asked: byte-level tokenizers
    report them without the spaces before a word."""
    if spans == ((0, length),):
        return list(ids)
    labels = [IGNORED] * len(ids)
    for a, b in spans:
        labels = [i if a < end <= b else label for i, end, label in zip(ids, ends, labels, strict=True)]
    return labels


def _end(ids: list[int], labels: list[int], eos: int, *, closed: bool, counts: bool) -> None:
    """Close with one end-of-sequence token; a chat template may have written it, followed by a line end."""
    if closed and eos in ids[-2:]:
        return
    if ids[-1:] == [eos]:
        ids.pop()
        labels.pop()
    ids.append(eos)
    labels.append(eos if counts else IGNORED)


def _num_closing(offsets: Sequence[tuple[int, int]]) -> int:
    """Return how many tokens at the end stand for no character: what the tokenizer closes a text with."""
    return sum(1 for _ in takewhile(lambda place: place[1] == 0, reversed(offsets)))


def _running(record: Record) -> tuple[str, Spans]:
    text, spans = "", []
    for segment, counts in record.segments:
        if counts:
            spans.append((len(text), len(text) + len(segment)))
        text += segment
    return text, tuple(spans)
