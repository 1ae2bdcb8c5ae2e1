"""The frozen bottom of an emulator, which is the full model's: computed once for both.

Shapes: B = rows, T = tokens of a row, D = width of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.activations import Batch, hidden_after, real_tokens
from offsite.blockwise import outside_blocks
from offsite.modelling.head import Before, before_head
from offsite.modelling.split import Plan


class Bottom:
    """The blocks of an emulator's bottom end, which a pass may go over: what leaves them is handed in instead."""

    def __init__(self, blocks: Sequence[nn.Module], num_others: Sequence[int | None]) -> None:
        """Take the blocks in order, and how much each returns beside a hidden state; None: it returns that alone."""
        self._blocks, self._num_others = blocks, num_others

    @contextmanager
    def passed_over(self, states_BTD: Tensor) -> Iterator[None]:
        """While inside, a pass of these states' text begins behind the bottom with them."""
        own = [block.__dict__.get("forward") for block in self._blocks]
        for number, block in enumerate(self._blocks):
            is_last = number == len(self._blocks) - 1
            block.forward = _passing(states_BTD if is_last else None, self._num_others[number])
        try:
            yield
        finally:
            for block, before in zip(self._blocks, own, strict=True):
                del block.forward
                if before is not None:
                    block.forward = before


def _passing(states_BTD: Tensor | None, num_others: int | None) -> Callable[..., Any]:
    def forward(*args: Any, **given: Any) -> Any:
        found = states_BTD
        if found is None:
            found = args[0] if args else given["hidden_states"]
        return found if num_others is None else (found, *[None] * num_others)

    return forward


@torch.no_grad()
def shared_bottom(full: PreTrainedModel, emulator: PreTrainedModel, plan: Plan, batch: Batch) -> Bottom | None:
    """Return the emulator's bottom if the full model's hidden states behind it can be handed to the emulator.

    They can where both have the same weights outside of their blocks and in the bottom, and where the emulator computes
    the same from them, bit for bit, as it does by itself: its blocks hand on nothing but a hidden state.

    Args:
        batch: text to try it on, on the models' device.
    """
    blocks = list(emulator.get_submodule(plan.stack.name).children())[: plan.num_bottom]
    theirs = list(full.get_submodule(plan.stack.name).children())[: plan.num_bottom]
    pairs = ((emulator, blocks), (full, theirs))
    mine, others = ([*outside_blocks(one), *_inside(those)] for one, those in pairs)
    if not blocks or not _alike(mine, others):
        return None
    returned: list[int | None] = []

    def see(_module: nn.Module, _args: object, output: Any) -> None:
        returned.append(len(output) - 1 if isinstance(output, tuple) else None)

    handles = [block.register_forward_hook(see) for block in blocks]
    real_BT = real_tokens(batch)
    with hidden_after({0: theirs[-1]}) as states:
        before_head(full, batch, real_BT)
    try:
        expected = before_head(emulator, batch, real_BT)
    finally:
        for handle in handles:
            handle.remove()
    if len(returned) != len(blocks):
        return None  # the blocks are run otherwise than once each
    bottom = Bottom(blocks, returned)
    with bottom.passed_over(states[0]):
        found = before_head(emulator, batch, real_BT)
    return bottom if torch.equal(_hidden(found), _hidden(expected)) else None


def _inside(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for block in blocks for module in block.modules()]


def _hidden(found: Before | Tensor) -> Tensor:
    return found if isinstance(found, Tensor) else found.hidden


def _alike(ones: Sequence[nn.Module], others: Sequence[nn.Module]) -> bool:
    """Tell whether the modules themselves hold the same numbers, in order."""
    mine, theirs = _tensors(ones), _tensors(others)
    return len(mine) == len(theirs) and all(_same(*pair) for pair in zip(mine, theirs, strict=True))


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [
        tensor for module in modules for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)
