"""Perplexity of a causal language model on held-out text, measured where the loss counts.

Shapes: B = rows in a batch, T = tokens of its longest row, N = positions that count, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offsite.errors import ConfigError, DataError, RunFailed
from offsite.modelling.context import require_context
from offsite.modelling.head import CrossEntropy, values_at
from offsite.text.batches import IGNORED, Example, collate


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood in nats per token, its exponential, and the tokens it is a mean of."""

    loss: float
    perplexity: float
    num_tokens: int


def perplexity(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    device: torch.device | str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The model's perplexity over every position whose label counts, each weighing the same.

    Padding and the size of batches do not enter. Logits are computed at counted positions only, some at a
    time, the loss in float32, its sum in float64. The model is neither moved nor changed.

    Args:
        device: where batches go; without it, where the model's first parameter is.
        precision: "bf16" runs the model under autocast; "fp32" runs it in the dtype it has.
        progress: called after each batch with examples done and examples in all.

    Raises:
        DataError: no position counts.
        ConfigError: `batch_size` is not positive, or an example is longer than the model's context.
        RunFailed: the loss is not finite.
    """
    if batch_size < 1:
        raise ConfigError(f"batches of {batch_size} examples, expected at least 1")
    if not any(example.num_loss_tokens for example in examples):
        raise DataError(f"nothing to measure: no token of {len(examples)} examples counts in the loss")
    require_context(model, max(len(example.input_ids) for example in examples), "text in sequences")
    place = torch.device(device) if device is not None else next(model.parameters()).device
    ordered = sorted(examples, key=lambda example: len(example.input_ids), reverse=True)  # least padding
    total, num_tokens = 0.0, 0
    with torch.no_grad(), evaluating(model), torch.autocast(place.type, torch.bfloat16, precision == "bf16"):
        for start in range(0, len(ordered), batch_size):
            rows = ordered[start : start + batch_size]
            if any(example.num_loss_tokens for example in rows):
                batch = {name: tensor.to(place) for name, tensor in collate(rows, pad_id).items()}
                losses_N = _losses(model, batch)
                total += losses_N.double().sum().item()
                num_tokens += losses_N.numel()
            if not math.isfinite(total):
                raise RunFailed("the loss is not finite", hint="check the model: a weight may be NaN or far too large")
            if progress is not None:
                progress(start + len(rows), len(ordered))
    loss = total / num_tokens
    if loss > 700.0:  # its exponential is beyond float64
        raise RunFailed(f"the loss is {loss:.0f} nats per token, beyond any use", hint="check the model's weights")
    return Perplexity(loss, math.exp(loss), num_tokens)


def _losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Negative log-likelihood at every position that counts: (N,) float32."""
    targets_BT = batch["labels"][:, 1:]
    counted_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
    counted_BT[:, :-1] = targets_BT != IGNORED
    return values_at(model, batch, counted_BT, CrossEntropy(targets_BT[targets_BT != IGNORED]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module is back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


__all__ = [
    "Perplexity",
    "evaluating",
    "perplexity",
]
