"""The loss of a text's tokens, each predicted from those before it: plain, or weighed by its own probability.

Shapes: B rows, T tokens, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from offsite.modelling.head import CrossEntropy, values_at
from offsite.seq2seq.inputs import row_names
from offsite.text.batches import IGNORED


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy in nats over labels that count, and their number; both scalars.

    Args:
        batch: ``input_ids``, ``labels`` and ``attention_mask``, each (rows, tokens) int64; of an encoder-decoder also
            what its encoder reads (`offsite.seq2seq.inputs`).
    """
    device = next(model.parameters()).device
    losses_N, counted_BT = token_losses(model, {name: tensor.to(device) for name, tensor in batch.items()})
    return losses_N.sum(), counted_BT.sum()


def dft_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy in nats, each token's times its own probability, summed, and how many count; scalars.

    The probability is held fixed: the gradient is that of -p; that of the next token's loss is 1/p times as large. So
    what the emulator gets badly wrong does not outweigh the rest.

    Source: dynamic fine-tuning, arXiv:2508.05629.

    Args:
        batch: ``input_ids``, ``labels`` and ``attention_mask``, each (rows, tokens) int64, on the model's device.
    """
    losses_N, counted_BT = token_losses(model, batch)
    return (losses_N * (-losses_N.detach()).exp()).sum(), counted_BT.sum()


class Tempered:
    """The cross-entropy of scores that are divided by a temperature first, in nats."""

    def __init__(self, targets_N: Tensor, temperature: float) -> None:
        self._own, self._temperature = CrossEntropy(targets_N), temperature

    def __call__(self, scores_nV: Tensor, rows: slice, *, slopes: bool) -> tuple[Tensor, Tensor | None]:
        """See `offsite.modelling.head.Measure`."""
        values_n, slopes_nV = self._own(scores_nV / self._temperature, rows, slopes=slopes)
        return values_n, None if slopes_nV is None else slopes_nV / self._temperature


def token_losses(
    model: nn.Module, batch: Mapping[str, Tensor], prefix: str = "", *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy in nats where labels count, (N,) float32 in row order, and where that is, (B, T) bool.

    A place is that of the token before the one that counts: the position whose scores predict it.

    Args:
        batch: ``input_ids``, ``labels`` and ``attention_mask``, each (B, T) int64, on the model's device.
        prefix: of these names.
        temperature: what scores are divided by.
    """
    targets_BT = batch[f"{prefix}labels"][:, 1:]
    counted_BT = torch.zeros_like(batch[f"{prefix}labels"], dtype=torch.bool)
    counted_BT[:, :-1] = targets_BT != IGNORED
    rows = {name: batch[f"{prefix}{name}"] for name in row_names(batch)}
    targets_N = targets_BT[targets_BT != IGNORED]
    measure = CrossEntropy(targets_N) if temperature == 1 else Tempered(targets_N, temperature)
    return values_at(model, rows, counted_BT, measure), counted_BT


def by_row(values_N: Tensor, counted_BT: Tensor) -> Tensor:
    """Return the sum of each row's values, (B,), differentiable."""
    rows_N = counted_BT.nonzero()[:, 0]
    return values_N.new_zeros(len(counted_BT)).index_add(0, rows_N, values_N)
