"""What an encoder makes of a text as a whole: one vector, by which texts that mean the same lie close together.

The vector is the mean of the last hidden states over the tokens that are no padding, special tokens among them, scaled
to length 1: what sentence-transformers' mean pooling with normalisation gives. A head is passed over; an adapter that
is plugged in counts.

Shapes: B rows, T tokens, D width, N texts.

Source: Reimers and Gurevych, arXiv:1908.10084 (mean pooling).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offsite.encoders.outputs import outputs
from offsite.encoders.trunk import is_encoder
from offsite.errors import RunFailed
from offsite.evaluation.measure import evaluating
from offsite.modelling.head import causal_lm
from offsite.text.batches import Example, collate


def pooled(states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over the tokens where `mask_BT` is 1, at length 1, (B, D) float32."""
    mask_BT1 = mask_BT.unsqueeze(-1).float()
    mean_BD = (states_BTD.float() * mask_BT1).sum(1) / mask_BT1.sum(1)
    return nn.functional.normalize(mean_BD, dim=-1)


def embeddings_of(model: nn.Module, rows: Sequence[Example], *, batch_size: int, pad_id: int) -> Tensor:
    """Return the vector of every row, (N, D) float32 on the CPU. The model is neither moved nor changed.

    Args:
        model: the trunk of an encoder, with an adapter and a head or without, or transformers' classifier of one.

    Raises:
        RunFailed: when one is not finite.
    """
    inner = causal_lm(model)
    trunk = inner if is_encoder(inner) else inner.base_model
    place = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].input_ids), reverse=True)  # least padding
    found: list[Tensor] = []
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = collate([rows[row] for row in order[start : start + batch_size]], pad_id)
            ids_BT, mask_BT = batch["input_ids"].to(place), batch["attention_mask"].to(place)
            found.append(pooled(outputs(trunk, ids_BT, mask_BT), mask_BT).cpu())
    vectors_ND = torch.cat(found)[torch.tensor(order).argsort()]
    if not bool(torch.isfinite(vectors_ND).all()):
        raise RunFailed("an embedding is not finite", hint="check the model: a weight may be NaN")
    return vectors_ND
