"""What a head is measured by, whatever it is for: the loss of every row, and its task's figures.

Shapes: N rows, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from offsite.evaluation.heads import head_figures, label_losses, pair_losses, scores_of
from offsite.evaluation.regression import regression_figures
from offsite.evaluation.tags import tag_figures, tag_losses, tag_scores, targets_of
from offsite.text.batches import Example


@dataclass(frozen=True)
class Said:
    """What a head was found to say of rows.

    Attributes:
        losses: of every row or pair, of tags the mean over its words; in nats, of values squared errors.
        weights: how often each counts: of tags its words, else once.
        figures: the task's figures by name.
    """

    losses: list[float]
    weights: list[int]
    figures: dict[str, float]

    @property
    def loss(self) -> float:
        """The mean loss of a row, a pair or a word."""
        return math.fsum(a * b for a, b in zip(self.losses, self.weights, strict=True)) / sum(self.weights)

    @property
    def num(self) -> int:
        """How many rows, pairs or words that is the mean of."""
        return sum(self.weights)


def measure_head(
    model: nn.Module | None,
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    batch_size: int,
    pad_id: int,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
    centre: float = 0.0,
    scale: float = 1.0,
) -> Said:
    """Return what the model's head says of rows of one kind: pairs, or rows with a label, a value, or tags.

    Args:
        model: with a head; None for one whose head was never trained, which prefers no label, and of whose values the
            mean of the rows is the best that can be said.
        labels: of the head.
        precision, progress: as of `offsite.evaluation.heads.scores_of`.
        centre, scale: what the head gives is a value less the one, over the other; losses are squared errors over the
            square of `scale`.

    Raises:
        RunFailed: when a score is not finite.
    """
    how = {"batch_size": batch_size, "pad_id": pad_id, "precision": precision, "progress": progress}
    rows = [side for example in examples for side in example.sides]
    once = [1] * len(examples)
    if rows[0].tagged:
        found = [targets_of(row) for row in rows]
        words = [torch.zeros(len(one), len(labels), dtype=torch.float64) for one in found]
        if model is not None:
            words = tag_scores(model, rows, **how)  # type: ignore[arg-type]
        losses = [tag_losses(one, tags) for one, tags in zip(words, found, strict=True)]
        return Said(losses, [len(tags) for tags in found], tag_figures(words, found, labels))
    values = [row.value for row in rows if row.value is not None]
    if values:
        said = [math.fsum(values) / len(values)] * len(values)
        if model is not None:
            given = scores_of(model, rows, **how)[:, 0].tolist()  # type: ignore[arg-type]
            said = [centre + scale * one for one in given]
        errors = [((one - value) / scale) ** 2 for one, value in zip(said, values, strict=True)]
        return Said(errors, once, regression_figures(said, values))
    scores_NL = torch.zeros(len(rows), len(labels) or 1, dtype=torch.float64)
    if model is not None:
        scores_NL = scores_of(model, rows, **how)  # type: ignore[arg-type]
    targets = [row.target for row in rows if row.target is not None]
    figures = head_figures(scores_NL, targets)
    return Said(label_losses(scores_NL, targets) if targets else pair_losses(scores_NL), once, figures)
