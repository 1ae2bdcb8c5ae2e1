"""Which of two answers a model prefers: by how probable both are to it, and by what has changed since another model.

Shapes: B rows, T tokens, N positions that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from offsite.errors import RunFailed
from offsite.evaluation.measure import evaluating
from offsite.modelling.head import CrossEntropy, values_at
from offsite.text.batches import IGNORED, Example, collate


def log_probabilities(
    model: nn.Module,
    rows: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Return how probable what counts in each row is to the model, in nats, summed in float64.

    Padding and the size of batches do not enter but by rounding. The model is neither moved nor changed.

    Args:
        precision: "bf16" runs the model under autocast; "fp32" runs it in the dtype it has.
        progress: called after each batch with rows done and rows in all.

    Raises:
        RunFailed: when one is not finite.
    """
    place, found = next(model.parameters()).device, [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].input_ids), reverse=True)  # least padding
    with torch.no_grad(), evaluating(model), torch.autocast(place.type, torch.bfloat16, precision == "bf16"):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = {name: one.to(place) for name, one in collate([rows[row] for row in places], pad_id).items()}
            targets_BT = batch["labels"][:, 1:]
            counted_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
            counted_BT[:, :-1] = targets_BT != IGNORED
            losses_N = values_at(model, batch, counted_BT, CrossEntropy(targets_BT[targets_BT != IGNORED]))
            per_row = losses_N.cpu().double().split(counted_BT.sum(1).tolist())
            for row, losses in zip(places, per_row, strict=True):
                found[row] = -float(losses.sum())
            if progress is not None:
                progress(start + len(places), len(order))
    if not all(map(math.isfinite, found)):
        raise RunFailed("an answer's log-probability is not finite", hint="check the model: a weight may be NaN")
    return found


def preferred(margins: Sequence[float]) -> float:
    """Return the share of pairs in which the chosen answer is ahead; one of two that are equal counts half.

    Args:
        margins: of each pair, by how much the chosen answer is ahead; at least one.
    """
    return sum((margin > 0) + 0.5 * (margin == 0) for margin in margins) / len(margins)


def wilson(share: float, num: int, *, deviations: float = 1.959964) -> tuple[float, float]:
    """Return the interval that holds a share seen in `num` draws at 95 % confidence.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    square = deviations**2 / num
    middle = (share + square / 2) / (1 + square)
    reach = deviations / (1 + square) * math.sqrt(share * (1 - share) / num + square / (4 * num))
    return max(0.0, middle - reach), min(1.0, middle + reach)
