"""Whether a step's activations fit into the memory that is free, measured on one row before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from offsite.training.config import Precision
from offsite.training.precision import uses_bf16
from offsite.training.step import StepLoss

_SPARE = 0.8
"""A step's activations may take this much of what is free; gradients, moments and other programs have the rest."""


def activation_bytes(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    loss: StepLoss,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> int:
    """Return what a forward pass of `batch` keeps for its backward pass, in bytes; nothing is changed by it.

    Every storage is counted once, parameters and buffers of the model not at all.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T) int64, on the model's device.
    """
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := _storage(tensor)) not in own:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    device = batch["input_ids"].device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast(),
    ):
        total, _ = loss(model, dict(batch))
    del total
    return sum(kept.values())


def bytes_of_step(model: nn.Module, batch: Mapping[str, Tensor], loss: StepLoss, precision: Precision) -> int:
    """Return what a training pass over `batch` keeps for its backward pass, in bytes.

    Args:
        batch: as `loss` takes it, on any device.
        precision: of the run.
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    is_bf16 = uses_bf16(precision, device)
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        return activation_bytes(
            model,
            batch,
            loss,
            lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16, cache_enabled=False),
        )
    finally:
        for module, mode in modes:
            module.training = mode


def fits(num_bytes: int, free_bytes: int | None) -> bool:
    """Tell whether activations of so many bytes leave enough of what is free; None, unknown, is enough."""
    return free_bytes is None or num_bytes <= _SPARE * free_bytes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
