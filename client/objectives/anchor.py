"""An anchor: on public text the tuned emulator is to say what the untuned one says.

What public text can teach an adapter is how to mend the emulator; a divergence from the untuned emulator on such text
is a price for that. KL(untuned || tuned) is summed over the vocabulary at every position of a few rows a step, in the
modes of evaluation. The untuned emulator is the model with the adapter's tensors as they were when it was attached,
which do nothing yet; they are kept for it.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapters.kinds import Attached
from offsite.errors import ConfigError
from offsite.evaluation.measure import evaluating
from offsite.modelling.head import Divergence, before_head, values_at
from offsite.text.batches import Batches, encode, pack, pad_id
from offsite.text.records import read_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS = 128
"""Longest row: the divergence is taken at every position, of short rows."""


def public_batches(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_tokens: int,
    batch_size: int,
    num_known: int,
    seed: int,
) -> Batches:
    """Return the public text as batches of rows of at most 128 tokens, filled across its documents.

    Args:
        block_tokens: most tokens that a row may have besides.
        num_known: tokens that the model knows.

    Raises:
        ConfigError, DataError: as `read_files` and `encode`, or when the model does not know a token of it.
    """
    tokens = min(_TOKENS, block_tokens)
    rows = pack(encode(read_files([path]), tokenizer, context=tokens, whole_text=True).examples, block_tokens=tokens)
    largest = max(max(row.input_ids) for row in rows)
    if largest >= num_known:
        raise ConfigError(f"--anchor: the package's tokenizer gives token {largest}, its model knows {num_known}")
    return Batches(rows, batch_size=batch_size, seed=seed, pad_id=pad_id(tokenizer))


class Untuned:
    """The model as it was: its adapter's tensors as they are now are kept beside those that are tuned."""

    def __init__(self, attached: Attached) -> None:
        """Keep the adapter's tensors as they are now: untrained."""
        self._kept = [(parameter, parameter.detach().clone()) for parameter in attached.trainable.values()]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While inside, the adapter's tensors are as they began."""
        tuned = [parameter.data for parameter, _ in self._kept]
        for parameter, data in self._kept:
            parameter.data = data
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._kept, tuned, strict=True):
                parameter.data = data


class Anchor:
    """The untuned emulator, beside the model that is tuned."""

    def __init__(self, attached: Attached) -> None:
        """Keep the adapter's tensors as they are now: untrained."""
        self._untuned = Untuned(attached)

    def divergence(self, model: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return KL(untuned || tuned) in nats, summed over the positions that are no padding; scalar, differentiable.

        Args:
            ids_BT, mask_BT: tokens and where they count, int64.
        """
        rows = {"input_ids": ids_BT, "attention_mask": mask_BT}
        with evaluating(model):
            with torch.no_grad(), self._untuned.inside():
                before = before_head(model, rows, mask_BT.bool())
            return values_at(model, rows, mask_BT.bool(), Divergence(before)).sum()
