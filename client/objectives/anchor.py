"""An anchor: on public text the tuned emulator is to say what the untuned one says.

What public text can teach an adapter is how to mend the emulator; a divergence from the untuned emulator on such text
is a price for that. KL(untuned || tuned) is summed over the vocabulary at every position of a few rows a step, in the
modes of evaluation. The untuned emulator is the model with the adapter's tensors as they were when it was attached,
which do nothing yet; they are kept for it.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from adapters.kinds import Attached
from offsite.errors import ConfigError
from offsite.evaluation.measure import evaluating
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


class Anchor:
    """The untuned emulator, beside the model that is tuned."""

    def __init__(self, attached: Attached) -> None:
        """Keep the adapter's tensors as they are now: untrained."""
        names = {id(parameter): name for name, parameter in attached.model.named_parameters()}
        self._kept = {names[id(one)]: one.detach().clone() for one in attached.trainable.values()}

    def divergence(self, model: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return KL(untuned || tuned) in nats, summed over the positions that are no padding; scalar, differentiable.

        Args:
            ids_BT, mask_BT: tokens and where they count, int64.
        """
        given: Mapping[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
        with evaluating(model):
            with torch.no_grad():
                untuned_BTV = functional_call(model, self._kept, (), dict(given)).logits.float().log_softmax(-1)
            tuned_BTV = model(**given).logits.float().log_softmax(-1)
        found_BT = functional.kl_div(tuned_BTV, untuned_BTV, reduction="none", log_target=True).sum(-1)
        return (found_BT * mask_BT).sum()
