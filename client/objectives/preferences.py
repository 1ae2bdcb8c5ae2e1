"""Pairs of answers to one prompt, of which the first is to be preferred: the loss, and what it is measured against.

How much a model prefers a pair's first answer is told by log-ratios to the untuned emulator, so that what is wrong with
both answers alike drops out. With h = (log p(y) - log p0(y)) - (log p(y') - log p0(y')), y the chosen answer, y' the
rejected one, p0 the untuned emulator and s a label's smoothing:

- sigmoid: -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)
- ipo: (h - 1 / (2 beta))^2, with each answer's log-ratio divided by the number of its tokens.

The untuned emulator is the model with the adapter on it before the first step, in the run's own arithmetic, kept hidden
states included: untuned, h is 0. Its log-probabilities are taken once, before the first step, of the rows that the run
comes to. They lie beside the checkpoints, are as private as the data, and go with them.

Source: DPO, arXiv:2305.18290; smoothed as in its appendix on conservative labels (cDPO); IPO, arXiv:2310.12036, per
token as its authors computed it.

Shapes: B pairs, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.objectives.tokens import by_row, token_losses
from offsite.console import progress, say
from offsite.evaluation.preferences import log_probabilities, preferred
from offsite.staging import staged_file
from offsite.strictjson import Strict, parse_strict, write_compact
from offsite.text.batches import IGNORED, Example, collate

if TYPE_CHECKING:
    from offsite.text.batches import Batches

ROWS_AT_ONCE = 32
"""Pairs that are measured, and then kept."""

BATCH = 8

Key = TypeVar("Key")
Precision = Literal["fp32", "bf16"]


class Measured(Strict):
    """What is kept of some pairs: log-probabilities of both answers, in nats, before tuning."""

    log_chosen: tuple[float, ...]
    log_rejected: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """Two rows that begin with one prompt, and how probable their answers are to the untuned emulator, in nats."""

    chosen: Example = field(repr=False)
    rejected: Example = field(repr=False)
    log_chosen: float
    log_rejected: float

    @property
    def reference(self) -> float:
        """By how much the untuned emulator prefers the first answer, in nats."""
        return self.log_chosen - self.log_rejected


@dataclass(frozen=True)
class Rule:
    """What a pair's loss is made of; see the module's docstring."""

    beta: float
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    smoothing: float = 0.0

    def losses(self, chosen_B: Tensor, rejected_B: Tensor, num_chosen_B: Tensor, num_rejected_B: Tensor) -> Tensor:
        """Return each pair's loss, (B,), in the dtype given.

        Args:
            chosen_B, rejected_B: log-ratios of both answers to the untuned emulator, in nats.
            num_chosen_B, num_rejected_B: tokens of theirs that count.
        """
        if self.loss == "ipo":
            return (chosen_B / num_chosen_B - rejected_B / num_rejected_B - 1 / (2 * self.beta)).square()
        scaled_B = self.beta * (chosen_B - rejected_B)
        found_B = functional.softplus(-scaled_B)
        if not self.smoothing:
            return found_B
        return (1 - self.smoothing) * found_B + self.smoothing * functional.softplus(scaled_B)


class Rows(Protocol):
    """The client's text: the rows of every step."""

    @property
    def batches(self) -> Batches:
        """The rows of every step."""

    @property
    def pad_id(self) -> int:
        """The token that rows are filled up with."""


class PairBatches:
    """The text's own batches, with the pair of every row: what `pair_loss` takes."""

    def __init__(self, text: Rows, pairs: Mapping[int, Pair]) -> None:
        """Take the pairs by ``id`` of the text's examples."""
        self._text, self._pairs = text, pairs

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return both rows of every pair, collated, and the untuned emulator's log-probabilities, (B, 2) float32."""
        pairs = [self._pairs[id(example)] for example in self._text.batches.chosen(step)]
        rejected = collate([pair.rejected for pair in pairs], self._text.pad_id)
        found = collate([pair.chosen for pair in pairs], self._text.pad_id)
        found |= {f"rejected_{name}": tensor for name, tensor in rejected.items()}
        return found | {"reference": torch.tensor([[pair.log_chosen, pair.log_rejected] for pair in pairs])}


def pair_loss(model: nn.Module, batch: Mapping[str, Tensor], *, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return the summed loss of the batch's pairs, and their number; both scalars.

    Args:
        batch: as `PairBatches` gives it, on the model's device.
    """
    ratios, nums = [], []
    for side, prefix in enumerate(("", "rejected_")):
        logs_B = -by_row(*token_losses(model, batch, prefix))
        ratios.append(logs_B - batch["reference"][:, side].to(logs_B))
        nums.append((batch[f"{prefix}labels"][:, 1:] != IGNORED).sum(1))
    losses_B = rule.losses(ratios[0], ratios[1], nums[0], nums[1])
    return losses_B.sum(), torch.tensor(len(losses_B))


def measured_pairs(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int,
    precision: Precision,
    work: Path | None = None,
    binding: Mapping[str, str] | None = None,
    label: str = "pairs before tuning",
) -> dict[int, Pair]:
    """Return the pair of every example, by its ``id``; progress is shown.

    They are in the order and in the parts in which `Validation` measures them: of the same model it finds the same.

    Args:
        model: untuned.
        examples: of pairs, each once.
        work: folder that keeps what was measured; none keeps nothing.
        binding: what a run must share to take what an earlier one measured.
        label: what the progress line calls them.

    Raises:
        BadSchema: when what was kept is damaged.
        RunFailed: when the model's output is not finite, or the disk is full.
    """
    order = sorted(examples, key=lambda one: [(len(side.input_ids), side.input_ids, side.labels) for side in one.sides])
    bound = {**(binding or {}), "precision": precision}
    pairs: dict[int, Pair] = {}
    with progress(len(order), label) as bar:
        for part in in_parts(order, ROWS_AT_ONCE):
            tokens = [(side.input_ids, side.labels) for one in part for side in one.sides]
            path = None if work is None else work / f"preferences-{bound_name({**bound, 'rows': tokens})}.json"
            found = None if path is None else read_kept(path, Measured, len(part))
            if found is None:
                found = _measured(model, part, pad_id=pad_id, precision=precision)
                if path is not None:
                    keep(path, found)
            for one, log_chosen, log_rejected in zip(part, found.log_chosen, found.log_rejected, strict=True):
                chosen, rejected = one.sides
                pairs[id(one)] = Pair(chosen, rejected, log_chosen, log_rejected)
            bar.update(len(pairs))
    return pairs


class Validation:
    """The loss of held-out pairs, and how often their chosen answer has gained on the other."""

    def __init__(self, pairs: Sequence[Pair], rule: Rule, *, pad_id: int, precision: Precision) -> None:
        """Take pairs in the order of `measured_pairs`."""
        self._pairs, self._rule, self._pad_id, self._precision = pairs, rule, pad_id, precision

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """Return the mean loss of a pair, and the accuracy of the implicit reward, from 0 to 1.

        Raises:
            RunFailed: when the model's output is not finite.
        """
        found: list[tuple[float, float]] = []
        for part in in_parts([pair.chosen for pair in self._pairs], ROWS_AT_ONCE):
            logs = _measured(model, part, pad_id=self._pad_id, precision=self._precision)
            found += zip(logs.log_chosen, logs.log_rejected, strict=True)
        before = [(pair.log_chosen, pair.log_rejected) for pair in self._pairs]
        nums = [(pair.chosen.num_loss_tokens, pair.rejected.num_loss_tokens) for pair in self._pairs]
        chosen_B, rejected_B = (_float64(found) - _float64(before)).unbind(1)
        losses_B = self._rule.losses(chosen_B, rejected_B, *_float64(nums).unbind(1))
        return float(losses_B.mean()), preferred((chosen_B - rejected_B).tolist())

    def told(self, model: nn.Module) -> float:
        """Return the loss alone; the accuracy is said."""
        loss, accuracy = self.measure(model)
        if math.isfinite(loss):
            say(f"held-out pairs: loss {loss:.4f}, the chosen answer has gained on the other in {accuracy:.1%}")
        return loss

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return what is told of the tuned model, by name."""
        return {"reward_accuracy": self.measure(model)[1]}


def _float64(rows: Sequence[tuple[float, float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _measured(model: nn.Module, part: Sequence[Example], *, pad_id: int, precision: Precision) -> Measured:
    rows = [side for one in part for side in one.sides]
    logs = log_probabilities(model, rows, batch_size=BATCH, pad_id=pad_id, precision=precision)
    return Measured(log_chosen=tuple(logs[::2]), log_rejected=tuple(logs[1::2]))


# --- what is kept beside the checkpoints

Kept = TypeVar("Kept", bound=Measured)


def bound_name(stated: Mapping[str, object]) -> str:
    """Return a short digest of what the files of a run follow from, for their names."""
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]


def in_parts(keys: Sequence[Key], num: int) -> Iterator[Sequence[Key]]:
    """Yield the keys, so many at a time."""
    return (keys[first : first + num] for first in range(0, len(keys), num))


def keep(path: Path, found: Measured) -> None:
    """What was found of some pairs stands at `path`. Raises RunFailed when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path, replace=True) as stage:
        stage.write_bytes(write_compact(found))


def read_kept(path: Path, cls: type[Kept], num: int) -> Kept | None:
    """Return what an earlier run found of so many pairs, if it is all there.

    Raises:
        BadSchema: when the file is damaged.
    """
    if not path.is_file():
        return None
    found = parse_strict(path.read_bytes(), cls, path.name, {})
    return found if all(len(getattr(found, name)) == num for name in cls.model_fields) else None
