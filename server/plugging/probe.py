"""A fixed batch of tokens to compare what two forms of one model compute, before either is trusted.

The arithmetic is float32 whatever the weights' dtype: in bfloat16 the noise of the activations (3% of the logits of a
model of 30 blocks) hides both a small adapter and a wrong merge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offsite.errors import NotFinite
from offsite.modelling.context import context_of
from offsite.modelling.precision import in_float32

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
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    num_tokens = min(NUM_TOKENS, context_of(model) or NUM_TOKENS)
    ids_BT = torch.randint(vocabulary, (NUM_ROWS, num_tokens), generator=generator)
    device = next(model.parameters()).device
    with in_float32(model):
        logits_BTV: Tensor = model(input_ids=ids_BT.to(device), use_cache=False).logits.float().cpu()
    if not bool(torch.isfinite(logits_BTV).all()):
        raise NotFinite(f"the output of {what} holds NaN or infinity")
    return logits_BTV - logits_BTV.mean(-1, keepdim=True)


def deviation(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference over that of `expected`: 0 for equal logits."""
    scale = expected.double().norm()
    difference = (found.double() - expected.double()).norm()
    return float(difference / scale) if scale else float(difference)
