"""What a model says of every position, whether it is causal, an encoder or an encoder-decoder.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offsite.encoders.trunk import is_encoder
from offsite.seq2seq.inputs import inputs_of, with_one_source
from offsite.seq2seq.models import is_seq2seq


def outputs(model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
    """Return what a model says of every position: a causal model's logits (B, T, V), an encoder's states (B, T, D).

    An encoder-decoder's logits are of its decoder; its encoder reads the first row, for every one.
    """
    given: dict[str, Any] = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT}
    if is_seq2seq(model):
        given = inputs_of(with_one_source(input_ids_BT, attention_mask_BT))
    if is_encoder(model):
        states: Tensor = model(**given).last_hidden_state
        return states
    logits: Tensor = model(**given, use_cache=False).logits
    return logits
