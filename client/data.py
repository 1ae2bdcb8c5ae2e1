"""The client's private text, as batches to train on and examples to validate on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from offsite.errors import ConfigError, DataError
from offsite.records import Record, split_by_document
from offsite.text import Batches, Encoded, Example, encode, pack, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingText:
    """Batches and examples of the training documents, examples of the held-out ones, and what became of the rows."""

    batches: Batches = field(repr=False)
    validation: list[Example] = field(repr=False)
    examples: list[Example] = field(repr=False)
    pad_id: int
    num_records: int
    num_tokens: int
    num_truncated: int
    num_dropped: int
    longest_tokens: int = 0
    largest_id: int = 0


def prepare(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_tokens: int,
    batch_size: int,
    packed: bool = True,
    on_long: Literal["truncate", "error"] = "truncate",
    validation: float = 0.1,
    seed: int = 0,
) -> TrainingText:
    """Return the records as training batches and validation examples; a document is on one side as a whole.

    Args:
        block_tokens: longest sequence in tokens.
        batch_size: sequences in one optimiser step.
        validation: share of documents held out, between 0 and 1.

    Raises:
        DataError: when a row is too long under "error", or there is too little text for one batch.
        ConfigError: when the tokenizer cannot serve.
    """
    train, held_out = split_by_document(records, fraction=validation, seed=seed)
    sides: list[Encoded] = []
    shaped: list[list[Example]] = []
    for side in (train, held_out):
        encoded = encode(side, tokenizer, context=block_tokens, on_long=on_long, whole_text=packed)
        sides.append(encoded)
        shaped.append(pack(encoded.examples, block_tokens=block_tokens) if packed else list(encoded.examples))
    if len(shaped[0]) < batch_size:
        raise DataError(
            f"too little text: {len(shaped[0])} sequences of up to {block_tokens} tokens, one step needs {batch_size}",
            hint="use a smaller --batch-size or --block-tokens, or more data",
        )
    if not shaped[1]:
        raise DataError("too little text is held out to validate on", hint="raise --validation, or give more data")
    pad = pad_id(tokenizer)
    return TrainingText(
        batches=Batches(shaped[0], batch_size=batch_size, seed=seed, pad_id=pad),
        validation=shaped[1],
        examples=shaped[0],
        pad_id=pad,
        num_records=len(train),
        num_tokens=sides[0].num_tokens,
        num_truncated=sum(side.num_truncated for side in sides),
        num_dropped=sum(side.num_dropped for side in sides),
        longest_tokens=max(len(example.input_ids) for side in shaped for example in side),
        largest_id=max(max(example.input_ids) for side in shaped for example in side),
    )


def require_fit(text: TrainingText, model: PreTrainedModel) -> None:
    """Return only if the model can read the text: its context is long enough and it knows every token.

    Raises:
        ConfigError: saying which of the two is too small.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and text.longest_tokens > context:
        raise ConfigError(
            f"sequences of {text.longest_tokens} tokens, the package's context is {context}",
            hint=f"use --block-tokens {context}",
        )
    num_known = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index, union-attr, arg-type]
    if text.largest_id >= num_known:
        raise ConfigError(f"the package's tokenizer gives token {text.largest_id}, its model knows {num_known}")
