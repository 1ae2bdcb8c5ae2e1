"""Arithmetic in float32 whatever the dtype of a model's weights, for comparisons that bfloat16's noise would drown.

Blocks are widened one at a time, so that the model is not held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While inside, every module computes with its parameters in float32; they are themselves again after it."""
    handles = []
    for module, parameters in _units(model):
        own = [parameter for parameter in parameters if parameter.is_floating_point()]
        if any(parameter.dtype != torch.float32 for parameter in own):
            widen, restore = _hooks(own)
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Yield modules with the parameters that are wide while they run: every block, and the model with all the rest.

    Nothing is taken in smaller parts because models read weights, and their dtype, of modules that they do not call.
    """
    blocks = list(_blocks(model))
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    yield model, [parameter for parameter in model.parameters() if id(parameter) not in inside]
    yield from ((block, list(block.parameters())) for block in blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _hooks(parameters: list[nn.Parameter]) -> tuple[Callable[..., None], Callable[..., None]]:
    stored: list[list[Tensor]] = []

    def widen(*_: object) -> None:
        stored.append([parameter.data for parameter in parameters])
        for parameter in parameters:
            parameter.data = parameter.data.float()

    def restore(*_: object) -> None:
        for parameter, data in zip(parameters, stored.pop(), strict=True):
            parameter.data = data

    return widen, restore
