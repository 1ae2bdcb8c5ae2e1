"""Losses of a head: rewards of pairs, classes of texts; on which batches, and what is said of held-out rows.

- reward: -log sigmoid(r(chosen) - r(rejected)), r the head's number of a whole row, beginning and answer;
- classify: the cross-entropy of the row's label, in nats.

A text is read as a head reads it (``adapters/heads.py``).

Source: the reward model of InstructGPT, arXiv:2203.02155, with one pair for each comparison.

Shapes: B rows or pairs, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.objectives.preferences import BATCH, Precision, Rows
from offsite.console import say
from offsite.evaluation.heads import head_figures, head_scores, label_losses, pair_losses, scores_of
from offsite.text.batches import Example, collate


class HeadBatches:
    """The text's own batches, with what a head learns of each row: both rows of a pair, or its label."""

    def __init__(self, text: Rows) -> None:
        self._text = text

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the collated rows with ``targets`` (B,) int64, or those of rejected answers under ``rejected_``."""
        chosen = self._text.batches.chosen(step)
        found = collate(chosen, self._text.pad_id)
        others = [example.rejected for example in chosen if example.rejected is not None]
        if others:
            rejected = collate(others, self._text.pad_id)
            return found | {f"rejected_{name}": tensor for name, tensor in rejected.items()}
        return found | {"targets": torch.tensor([example.target for example in chosen])}


@dataclass(frozen=True)
class HeadLoss:
    """The loss of a step: of pairs or of labels, whichever the batch holds.

    Attributes:
        pad_id: the tokenizer's padding token, before which a row is read.
    """

    pad_id: int

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of the batch's rows or pairs, and their number; both scalars.

        Args:
            batch: as `HeadBatches` gives it, on the model's device.
        """
        scores_BL = head_scores(model, batch, pad_id=self.pad_id)
        count = torch.tensor(len(scores_BL))
        if "targets" in batch:
            return functional.cross_entropy(scores_BL, batch["targets"], reduction="sum"), count
        others = {name: batch[f"rejected_{name}"] for name in ("input_ids", "attention_mask")}
        rejected_BL = head_scores(model, others, pad_id=self.pad_id)
        return functional.softplus(rejected_BL - scores_BL).sum(), count


class HeadValidation:
    """The loss of held-out rows or pairs, and how many a head is right about."""

    def __init__(self, examples: Sequence[Example], *, pad_id: int, precision: Precision) -> None:
        self._examples, self._pad_id, self._precision = examples, pad_id, precision

    def measure(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        """Return the mean loss, and the accuracy from 0 to 1; of a classifier the macro-F1, too.

        Raises:
            RunFailed: when the model's output is not finite.
        """
        rows = [side for example in self._examples for side in example.sides]
        scores_NL = scores_of(model, rows, batch_size=BATCH, pad_id=self._pad_id, precision=self._precision)
        targets = [example.target for example in self._examples if example.target is not None]
        losses = label_losses(scores_NL, targets) if targets else pair_losses(scores_NL)
        figures = head_figures(scores_NL, targets)
        del figures["num_rows"]
        return math.fsum(losses) / len(losses), figures

    def told(self, model: nn.Module) -> float:
        """Return the loss alone; the rest is said."""
        loss, figures = self.measure(model)
        if math.isfinite(loss):
            right = f"{figures['accuracy']:.1%} right"
            more = f", macro-F1 {figures['macro_f1']:.3f}" if "macro_f1" in figures else ""
            say(f"held-out {'rows' if more else 'pairs'}: loss {loss:.4f}, {right}{more}")
        return loss

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return what is told of the tuned model, by name."""
        return self.measure(model)[1]
