"""Public text made ready for the owner: batches to train on, text held out, text to choose blocks and channels on."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from emulator.compression.activations import Batch
from emulator.distillation.masked import MaskedBatches, Masking
from offsite.digests import sha256_bytes
from offsite.errors import ConfigError
from offsite.modelling.context import require_context
from offsite.seq2seq.models import is_seq2seq, start_token
from offsite.text.batches import Batches, Example, collate, encode, pack, pad_id
from offsite.text.forms import encode_answers, encode_images, halved, is_answered
from offsite.text.records import Record, split_by_document
from offsite.vision.reader import ImageReader, Reader


@dataclass(frozen=True)
class PublicText:
    """Public text in blocks of one length.

    Attributes:
        train: the batch of any step, a function of the step alone.
        held_out: batches of documents that `train` does not hold; empty when none were asked for.
        calibration: batches out of `train`, its first, of one epoch at most.
        digest: names the text, the tokens and their order.
        is_masked: whether some tokens of every batch but those of `calibration` are masked.
    """

    train: Batches = field(repr=False)
    held_out: Sequence[Batch] = field(repr=False)
    calibration: Sequence[Batch] = field(repr=False)
    digest: str
    is_masked: bool = False


def prepare(
    records: Sequence[Record],
    tokenizer: Reader,
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
    masking: Masking | None = None,
) -> PublicText:
    """Return the records as blocks of `block_tokens`, in batches of `batch_size`, split by document.

    Args:
        tokenizer: or what reads images, where the records are such; a block is an image then.
        model: the model that will read the text; only its vocabulary's and context's sizes are looked at.
        holdout: share of the documents to hold out; none holds nothing out.
        evaluation_tokens: of the held-out text, at most so many tokens, at least one block.
        calibration_tokens: of the training text, at most so many tokens, at least one batch.
        first_step: batches that earlier runs have taken; these go on after them.
        packed: fill the blocks across rows; otherwise one row each, of at most `block_tokens`.
        masking: masks tokens of what is trained on, anew in every step, and of what is held out.

    Raises:
        DataError: too few documents to hold any out, or nothing to learn from.
        ConfigError: blocks longer than the model's context, or a tokenizer that is not this model's.
    """
    if isinstance(tokenizer, ImageReader):
        block_tokens = tokenizer.num_places
    else:
        require_context(model, block_tokens, "blocks")
    train, held_out = (records, []) if holdout is None else split_by_document(records, fraction=holdout, seed=seed)
    start = start_token(model.config) if is_seq2seq(model) else None
    blocks = _blocks(train, tokenizer, block_tokens, packed, start)
    held_blocks = _blocks(held_out, tokenizer, block_tokens, packed, start)[: max(1, evaluation_tokens // block_tokens)]
    if not isinstance(tokenizer, ImageReader):
        _check_vocabulary(model, [*blocks, *held_blocks])
    pad = pad_id(tokenizer)
    batches = Batches(blocks, batch_size=batch_size, seed=seed, pad_id=pad, first_step=first_step)
    wanted = max(1, calibration_tokens // (batch_size * block_tokens))
    held = [collate(held_blocks[i : i + batch_size], pad) for i in range(0, len(held_blocks), batch_size)]
    calibration = [batches.batch(step) for step in range(min(wanted, batches.num_steps_per_epoch))]
    digest = _digest([blocks, held_blocks])
    if masking is None:
        return PublicText(batches, held, calibration, digest)
    train_batches = MaskedBatches(
        blocks, batch_size=batch_size, seed=seed, pad_id=pad, masking=masking, first_step=first_step
    )
    held = [masking.masked(batch, f"held-out/{number}") for number, batch in enumerate(held)]
    return PublicText(train_batches, held, calibration, sha256_bytes(f"{digest} {masking.digest}".encode()), True)


def _blocks(
    records: Sequence[Record],
    tokenizer: Reader,
    block_tokens: int,
    packed: bool,
    start: int | None = None,
) -> list[Example]:
    """Return the records as blocks; for an encoder-decoder, whose `start` token is given, prompts and answers.

    Of running text the first half of a block stands for a prompt.
    """
    if not records:
        return []
    if isinstance(tokenizer, ImageReader):
        return encode_images(records, tokenizer).examples
    if start is not None:
        asked = [one for one in records if is_answered(one)]
        others = [one for one in records if not is_answered(one)]
        found = encode_answers(asked, tokenizer, start=start, context=block_tokens).examples if asked else []
        return found + halved(_blocks(others, tokenizer, block_tokens, packed), start=start)
    encoded = encode(records, tokenizer, context=block_tokens, whole_text=packed)
    return pack(encoded.examples, block_tokens=block_tokens) if packed else list(encoded.examples)


def _check_vocabulary(model: PreTrainedModel, blocks: Sequence[Example]) -> None:
    num_known = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index, union-attr, arg-type]
    largest = max(max([*block.input_ids, *block.source]) for block in blocks)
    if largest >= num_known:
        raise ConfigError(f"the tokenizer gives token {largest}, the model knows {num_known}: they do not fit together")


def _digest(parts: Sequence[Sequence[Example]]) -> str:
    whole = hashlib.sha256(b"offsite/v1/public-text\0")
    for blocks in parts:
        for block in blocks:
            whole.update(b"" if block.image is None else bytes.fromhex(block.image.digest))
            for ids in (block.input_ids, *([block.source] if block.source else [])):
                whole.update(array("q", [len(ids), *ids]).tobytes())
        whole.update(array("q", [-1]).tobytes())
    return "sha256:" + whole.hexdigest()
