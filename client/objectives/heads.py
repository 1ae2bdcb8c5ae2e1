"""Losses of a head: rewards of pairs, classes or values of texts, tags of words; on which batches, and what is said of
held-out rows.

- reward: -log sigmoid(r(chosen) - r(rejected)), r the head's number of a whole row, beginning and answer;
- classify: the cross-entropy of the row's label, in nats;
- tag: the same of each word's tag, over its first token;
- regress: the squared error of the row's value, in units of the values that are trained on (`Units`).

A text is read as a head reads it (``adapters/heads.py``).

Source: the reward model of InstructGPT, arXiv:2203.02155, with one pair for each comparison.

Shapes: B rows or pairs, T tokens, L labels.
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
from offsite.errors import DataError, RunFailed
from offsite.evaluation.byhead import measure_head
from offsite.evaluation.heads import head_scores, read_states
from offsite.evaluation.measure import evaluating
from offsite.text.batches import IGNORED, Example, collate

_ROWS_OF_START = 256
_SMALLEST = 1e-12
_FAR_FROM_ZERO = 10
"""Values whose mean is so many times their deviation are hard to learn without a bias."""


@dataclass(frozen=True)
class Units:
    """The units that values are learnt in: what a head gives in training is (value - `centre`) / `scale`.

    The scale is the deviation of the values trained on. Where the head has a bias the centre is their mean, so that it
    begins at that; without one the mean has no place of its own, the centre is 0, and the head begins along the mean
    state that it reads (`begin_at`). What is released gives values themselves: both are folded into the head's last
    linear (`folded`).

    Attributes:
        start: what an untrained head should give, in these units.
    """

    centre: float = 0.0
    scale: float = 1.0
    start: float = 0.0

    @classmethod
    def of(cls, examples: Sequence[Example], *, has_bias: bool) -> Units:
        """Return the units of the values trained on.

        Raises:
            DataError: when all of them are equal.
        """
        values = [one.value for one in examples if one.value is not None]
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        if max(values) == min(values):
            raise DataError("all rows to train on have one value", hint="there is nothing to learn; check the column")
        if has_bias:
            return cls(centre=mean, scale=deviation)
        if abs(mean) > _FAR_FROM_ZERO * deviation:
            say(
                f"the mean of the values is over {_FAR_FROM_ZERO} times their deviation, and this head has no bias: "
                "take a constant off them, or fewer will be told apart"
            )
        return cls(scale=deviation, start=mean / deviation)

    def folded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an adapter's tensors with a head that gives values, each in its dtype; the others share memory."""
        found = dict(tensors)
        if self == Units():
            return found
        found["head.weight"] = (tensors["head.weight"].double() * self.scale).to(tensors["head.weight"].dtype)
        if "head.bias" in tensors:
            bias_L = tensors["head.bias"].double() * self.scale + self.centre
            found["head.bias"] = bias_L.to(tensors["head.bias"].dtype)
        return found


def begin_at(
    model: nn.Module,
    weight_1D: nn.Parameter,
    units: Units,
    rows: Sequence[Example],
    *,
    pad_id: int,
    precision: Precision,
) -> None:
    """A head without a bias, of one row, gives `units.start` of the mean of the states that it reads.

    Args:
        model: the causal language model that carries it; not changed otherwise.
        rows: whose states are read, the first `_ROWS_OF_START` of them.

    Raises:
        RunFailed: when a state is not finite.
    """
    place = weight_1D.device
    sum_D = torch.zeros(weight_1D.shape[1], dtype=torch.float64)
    with torch.no_grad(), evaluating(model), torch.autocast(place.type, torch.bfloat16, precision == "bf16"):
        for start in range(0, min(len(rows), _ROWS_OF_START), BATCH):
            batch = collate(rows[start : min(start + BATCH, _ROWS_OF_START)], pad_id)
            states_BD = read_states(model, {name: one.to(place) for name, one in batch.items()}, pad_id=pad_id)
            sum_D += states_BD.double().sum(0).cpu()
    mean_D = sum_D / min(len(rows), _ROWS_OF_START)
    if not bool(torch.isfinite(mean_D).all()):
        raise RunFailed("the package's hidden states are not finite", hint="ask the owner for another package")
    with torch.no_grad():
        weight_1D[0] = (units.start / mean_D.square().sum().clamp_min(_SMALLEST) * mean_D).to(weight_1D)


class HeadBatches:
    """The text's own batches, with what a head learns of each row: both rows of a pair, its label, value or tags."""

    def __init__(self, text: Rows, units: Units | None = None) -> None:
        self._text, self._units = text, units or Units()

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the collated rows with what is learnt of them.

        Labels are under ``targets`` (B,) int64, values in their units under ``values`` (B,) float32, tags under
        ``tags`` (B, T) int64 with -100 where none is, and rejected answers' rows under ``rejected_``.
        """
        chosen = self._text.batches.chosen(step)
        found = collate(chosen, self._text.pad_id)
        if chosen[0].tagged:
            return found | {"tags": found["labels"]}
        values = [example.value for example in chosen if example.value is not None]
        if values:
            units = self._units
            return found | {"values": torch.tensor([(value - units.centre) / units.scale for value in values])}
        others = [example.rejected for example in chosen if example.rejected is not None]
        if others:
            rejected = collate(others, self._text.pad_id)
            return found | {f"rejected_{name}": tensor for name, tensor in rejected.items()}
        return found | {"targets": torch.tensor([example.target for example in chosen])}


@dataclass(frozen=True)
class HeadLoss:
    """The loss of a step: of pairs, labels, values or tags, whichever the batch holds.

    Attributes:
        pad_id: the tokenizer's padding token, before which a row is read.
    """

    pad_id: int

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of the batch's rows, pairs or words, and their number; both scalars.

        Args:
            batch: as `HeadBatches` gives it, on the model's device.
        """
        scores_BL = head_scores(model, batch, pad_id=self.pad_id)
        count = torch.tensor(len(scores_BL))
        if "tags" in batch:
            tags_N = batch["tags"].flatten()
            total = functional.cross_entropy(scores_BL.flatten(0, 1), tags_N, reduction="sum", ignore_index=IGNORED)
            return total, (tags_N != IGNORED).sum()
        if "values" in batch:
            return (scores_BL[:, 0] - batch["values"]).square().sum(), count
        if "targets" in batch:
            return functional.cross_entropy(scores_BL, batch["targets"], reduction="sum"), count
        others = {name: batch[f"rejected_{name}"] for name in ("input_ids", "attention_mask")}
        rejected_BL = head_scores(model, others, pad_id=self.pad_id)
        return functional.softplus(rejected_BL - scores_BL).sum(), count


_SHOWN = {"macro_f1": "macro-F1 {:.3f}", "f1": "entity F1 {:.3f}", "spearman": "Spearman {:.3f}"}


class HeadValidation:
    """The loss of held-out rows, pairs or words, and how right a head is about them."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        pad_id: int,
        precision: Precision,
        labels: Sequence[str] = (),
        units: Units | None = None,
    ) -> None:
        self._examples, self._pad_id, self._precision = examples, pad_id, precision
        self._labels, self._units = labels, units or Units()

    def measure(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        """Return the mean loss, and the figures of the head's task: those of values in their own units.

        Raises:
            RunFailed: when the model's output is not finite.
        """
        said = measure_head(
            model,
            self._examples,
            self._labels,
            batch_size=BATCH,
            pad_id=self._pad_id,
            precision=self._precision,
            centre=self._units.centre,
            scale=self._units.scale,
        )
        return said.loss, said.figures

    def told(self, model: nn.Module) -> float:
        """Return the loss alone; the rest is said."""
        loss, figures = self.measure(model)
        if math.isfinite(loss):
            first = self._examples[0]
            what = "words" if first.tagged else "rows" if first.rejected is None else "pairs"
            told = [f"{figures['accuracy']:.1%} right"] if "accuracy" in figures else [f"RMSE {figures['rmse']:.4g}"]
            told += [words.format(figures[name]) for name, words in _SHOWN.items() if name in figures]
            say(f"held-out {what}: loss {loss:.4f}, {', '.join(told)}")
        return loss

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return what is told of the tuned model, by name."""
        return self.measure(model)[1]
