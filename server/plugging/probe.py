"""A fixed batch of tokens to compare what two forms of one model compute, before either is trusted.

The arithmetic is float32 whatever the weights' dtype: in bfloat16 the noise of the activations (3% of the logits of a
model of 30 blocks) hides both a small adapter and a wrong merge. Of a model that is mapped from its files, memory holds
one block at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offsite.blockwise import block_by_block
from offsite.encoders.outputs import made_up_ids, made_up_images, outputs
from offsite.encoders.trunk import is_encoder_config
from offsite.errors import NotFinite
from offsite.evaluation.heads import SCORE, head_scores
from offsite.modelling.context import context_of
from offsite.modelling.head import states_at
from offsite.vision.models import PIXELS, reads_images

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_ROWS, NUM_TOKENS = 2, 32

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest deviation allowed between merged and unmerged logits, by the dtype of the merged weights: merging rounds
every changed weight once, by at most a relative 2^-9 in bfloat16 and 2^-12 in float16."""

READ_BACK_TOLERANCE = 1e-5
"""Largest deviation allowed between an adapter on the model and the same adapter opened again from its folder."""


@torch.no_grad()
def probe_logits(model: PreTrainedModel, what: str = "the model") -> Tensor:
    """Return the logits on the fixed batch, (rows, tokens, vocabulary) float32 on the CPU, centred per position.

    A constant added to all logits of a position changes no probability, so it is taken out.

    Raises:
        NotFinite: when a logit is NaN or infinite.
    """
    ids_BT = _ids(model)
    with block_by_block(model, torch.float32):
        logits_BTV = outputs(model, ids_BT).float().cpu()
    if not bool(torch.isfinite(logits_BTV).all()):
        raise NotFinite(f"the output of {what} holds NaN or infinity")
    return logits_BTV - logits_BTV.mean(-1, keepdim=True)


@torch.no_grad()
def probe_heads(model: PreTrainedModel, what: str = "the model") -> Tensor:
    """Return the scores of a model with a head on the fixed batch, (rows * tokens, labels) float32 on the CPU.

    Every position is scored, of an encoder every row, in the model's own dtype of the head's weights.

    Raises:
        NotFinite: when a score is NaN or infinite.
    """
    ids_BT = _ids(model)
    with block_by_block(model, torch.float32):
        if reads_images(model):
            images = {PIXELS: made_up_images(model, NUM_ROWS)}
            return _finite(head_scores(model, images, pad_id=-1).cpu(), what)
        if is_encoder_config(model.config):  # which reads a row as a whole
            batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
            return _finite(head_scores(model, batch, pad_id=-1).cpu(), what)
        states_ND = states_at(model, {"input_ids": ids_BT}, torch.ones_like(ids_BT, dtype=torch.bool))
        scores_NL: Tensor = model.get_submodule(SCORE)(states_ND).float().cpu()
    return _finite(scores_NL, what)


def _finite(scores_NL: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(scores_NL).all()):
        raise NotFinite(f"the output of {what} holds NaN or infinity")
    return scores_NL


def _ids(model: PreTrainedModel) -> Tensor:
    return made_up_ids(model, NUM_ROWS, min(NUM_TOKENS, context_of(model) or NUM_TOKENS))


def deviation(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference over that of `expected`: 0 for equal logits."""
    scale = expected.double().norm()
    difference = (found.double() - expected.double()).norm()
    return float(difference / scale) if scale else float(difference)
