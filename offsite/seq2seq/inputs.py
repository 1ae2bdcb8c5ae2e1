"""What a model is called with for a batch: an encoder-decoder's two texts, any other's one.

A row of a prompt and its answer is held as any other row: ``input_ids`` are the decoder's, the start token and the
answer, ``labels`` the same with the start not counted, so that a label is predicted from the position before it. What
the encoder reads stands beside them as ``source_ids`` and ``source_mask``.

Shapes: B rows, S tokens of a prompt, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SOURCE = ("source_ids", "source_mask")
"""Names in a batch of what the encoder reads: (B, S) int64 each; absent of other models."""


def row_names(batch: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of what a model reads of the batch."""
    return ("input_ids", "attention_mask", *(name for name in SOURCE if name in batch))


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the model's arguments for a batch of ``input_ids`` and, unless all is text, ``attention_mask``."""
    own = batch["input_ids"], batch.get("attention_mask")
    if SOURCE[0] not in batch:
        return dict(zip(("input_ids", "attention_mask"), own, strict=True))
    return {
        "input_ids": batch["source_ids"],
        "attention_mask": batch["source_mask"],
        "decoder_input_ids": own[0],
        "decoder_attention_mask": own[1],
    }


def with_one_source(input_ids_BT: Tensor, attention_mask_BT: Tensor | None) -> dict[str, Tensor]:
    """Return made-up rows for an encoder-decoder: the decoder reads them, the encoder the first of them for each."""
    source_BT = input_ids_BT[:1].expand_as(input_ids_BT)
    mask_BT = torch.ones_like(input_ids_BT) if attention_mask_BT is None else attention_mask_BT
    return {
        "input_ids": input_ids_BT,
        "attention_mask": mask_BT,
        "source_ids": source_BT,
        "source_mask": torch.ones_like(source_BT),
    }
