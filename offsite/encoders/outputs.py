"""What a model says of every position, whether it is causal, an encoder of texts or images, or an encoder-decoder.

Shapes: B rows, T tokens, D hidden, V vocabulary; of images C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offsite.encoders.trunk import is_encoder
from offsite.seq2seq.inputs import inputs_of, with_one_source
from offsite.seq2seq.models import is_seq2seq
from offsite.vision.models import PIXELS, made_up_pixels, reads_images


def outputs(model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
    """Return what a model says of every position: a causal model's logits (B, T, V), an encoder's states (B, T, D).

    An encoder-decoder's logits are of its decoder; its encoder reads the first row, for every one. A vision encoder
    reads made-up images, as many as there are rows.
    """
    if reads_images(model):
        return outputs_of(model, {PIXELS: made_up_images(model, len(input_ids_BT))})
    given: dict[str, Any] = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT}
    if is_seq2seq(model):
        given = inputs_of(with_one_source(input_ids_BT, attention_mask_BT))
    if is_encoder(model):
        states: Tensor = model(**given).last_hidden_state
        return states
    logits: Tensor = model(**given, use_cache=False).logits
    return logits


def outputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the same of a batch as `offsite.text.batches.collate` makes it, on the model's device."""
    if PIXELS in batch:
        pixels_BCHW = batch[PIXELS].to(next(model.parameters()).dtype)
        states: Tensor = model(pixel_values=pixels_BCHW).last_hidden_state
        return states
    return outputs(model, batch["input_ids"], batch.get("attention_mask"))


def made_up_images(model: nn.Module, num_images: int) -> Tensor:
    """Return noise (B, C, H, W) that this vision encoder, or classifier of one, can read; on its device."""
    config: Any = model.config
    return made_up_pixels(config, num_images).to(next(model.parameters()).device)


def made_up_ids(model: nn.Module, num_rows: int, num_tokens: int) -> Tensor:
    """Return rows (B, T) int64 of tokens that the model knows, always the same; of a vision encoder zeros."""
    config: Any = model.config
    place = next(model.parameters()).device
    if reads_images(model):
        return torch.zeros((num_rows, num_tokens), dtype=torch.long, device=place)
    vocabulary = int(config.get_text_config().vocab_size)
    return torch.randint(vocabulary, (num_rows, num_tokens), generator=torch.Generator().manual_seed(0)).to(place)
