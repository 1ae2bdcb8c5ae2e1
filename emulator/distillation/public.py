"""Public text made ready for the owner: batches to train on, text held out, text to choose blocks and channels on."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emulator.compression.activations import Batch
from offsite.errors import ConfigError
from offsite.modelling.context import require_context
from offsite.text.batches import Batches, Example, collate, encode, pack, pad_id
from offsite.text.records import Record, split_by_document


@dataclass(frozen=True)
class PublicText:
    """Public text in blocks of one length.

    Attributes:
        train: the batch of any step, a function of the step alone.
        held_out: batches of documents that `train` does not hold; empty when none were asked for.
        calibration: batches out of `train`, its first, of one epoch at most.
        digest: names the text, the tokens and their order.
    """

    train: Batches = field(repr=False)
    held_out: Sequence[Batch] = field(repr=False)
    calibration: Sequence[Batch] = field(repr=False)
    digest: str


def prepare(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    block_tokens: int,
    batch_size: int,
    seed: int,
    holdout: float | None,
    evaluation_tokens: int,
    calibration_tokens: int,
    first_step: int = 0,
    packed: bool = True,
) -> PublicText:
    """Return the records as blocks of `block_tokens`, in batches of `batch_size`, split by document.

    Args:
        model: the model that will read the text; only its vocabulary's and context's sizes are looked at.
        holdout: share of the documents to hold out; none holds nothing out.
        evaluation_tokens: of the held-out text, at most so many tokens, at least one block.
        calibration_tokens: of the training text, at most so many tokens, at least one batch.
        first_step: batches that earlier runs have taken; these go on after them.
        packed: fill the blocks across rows; otherwise one row each, of at most `block_tokens`.

    Raises:
        DataError: too few documents to hold any out, or nothing to learn from.
        ConfigError: blocks longer than the model's context, or a tokenizer that is not this model's.
    """
    require_context(model, block_tokens, "blocks")
    train, held_out = (records, []) if holdout is None else split_by_document(records, fraction=holdout, seed=seed)
    blocks = _blocks(train, tokenizer, block_tokens, packed)
    held_blocks = _blocks(held_out, tokenizer, block_tokens, packed)[: max(1, evaluation_tokens // block_tokens)]
    _check_vocabulary(model, [*blocks, *held_blocks])
    pad = pad_id(tokenizer)
    batches = Batches(blocks, batch_size=batch_size, seed=seed, pad_id=pad, first_step=first_step)
    wanted = max(1, calibration_tokens // (batch_size * block_tokens))
    return PublicText(
        batches,
        [collate(held_blocks[i : i + batch_size], pad) for i in range(0, len(held_blocks), batch_size)],
        [batches.batch(step) for step in range(min(wanted, batches.num_steps_per_epoch))],
        _digest([blocks, held_blocks]),
    )


def _blocks(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, block_tokens: int, packed: bool
) -> list[Example]:
    if not records:
        return []
    encoded = encode(records, tokenizer, context=block_tokens, whole_text=packed)
    return pack(encoded.examples, block_tokens=block_tokens) if packed else list(encoded.examples)


def _check_vocabulary(model: PreTrainedModel, blocks: Sequence[Example]) -> None:
    num_known = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index, union-attr, arg-type]
    largest = max(max(block.input_ids) for block in blocks)
    if largest >= num_known:
        raise ConfigError(f"the tokenizer gives token {largest}, the model knows {num_known}: they do not fit together")


def _digest(parts: Sequence[Sequence[Example]]) -> str:
    whole = hashlib.sha256(b"offsite/v1/public-text\0")
    for blocks in parts:
        for block in blocks:
            whole.update(array("q", [len(block.input_ids), *block.input_ids]).tobytes())
        whole.update(array("q", [-1]).tobytes())
    return "sha256:" + whole.hexdigest()
