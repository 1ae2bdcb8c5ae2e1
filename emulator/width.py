"""Which MLP channels a narrower middle keeps, from what the channels do on public text.

Every block stays, so an adapter on any of its linears lifts into the full model one to one: on attention as it
is, on the MLP with zero rows and columns for the channels that were left out.

Shapes: B rows, T tokens, C channels, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emulator.trace import Batch, forward, on_device, real_tokens, seen_by
from offsite.blocks import find_mlp, outgoing_weight, slice_mlp
from offsite.errors import ConfigError

MULTIPLE = 8
"""Widths are multiples of this where the MLP is wide enough: matrix units work on tiles."""


def num_kept(num_channels: int, share: float) -> int:
    """Return how many of `num_channels` a `share` of them is: the nearest multiple of `MULTIPLE`, at least 1.

    A share of 1 is all of them, and fewer than `MULTIPLE` are counted singly.

    Raises:
        ConfigError: when `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"asked to keep a share of {share} of the MLP channels, expected above 0 and at most 1")
    num = max(1, round(share * num_channels))
    if share == 1 or num < MULTIPLE:
        return num
    return min(num_channels, MULTIPLE * round(num / MULTIPLE))


@torch.no_grad()
def measure_channels(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch]) -> list[Tensor]:
    """Return, for each block, how much every MLP channel adds to the hidden state on public text.

    The score of a channel is its mean absolute activation over tokens times the norm of its outgoing weights.
    Padding does not count.

    Returns:
        one (C,) float64 CPU tensor per block.

    Raises:
        UnsupportedModel: when a block has no single MLP, such as a mixture of experts.
        ConfigError: when there is no text.

    Source: saliency of FFN neurons in FedPFT, arXiv:2404.11536 (norms of attached weights), here weighted by
    activation as Wanda does, arXiv:2306.11695.
    """
    mlps = [find_mlp(block) for block in blocks]
    sums = [torch.zeros(mlp.num_channels, dtype=torch.float64) for mlp in mlps]
    count = 0
    outputs = [block.get_submodule(mlp.output) for block, mlp in zip(blocks, mlps, strict=True)]
    for batch in batches:
        here = on_device(batch, next(model.parameters()).device)
        real_BT = real_tokens(here)
        count += int(real_BT.sum())

        def see(number: int, activation: Tensor, _output: Any, real_BT: Tensor = real_BT) -> None:
            sizes_NC = activation.reshape(*real_BT.shape, -1)[real_BT].abs()
            sums[number] += sizes_NC.sum(0, dtype=torch.float32).double().cpu()

        with seen_by(outputs, see):
            forward(model, here)
    if count == 0:
        raise ConfigError("choosing MLP channels needs public text, found none")
    norms = [outgoing_weight(block, mlp).double().norm(dim=0).cpu() for block, mlp in zip(blocks, mlps, strict=True)]
    return [total / count * norm for total, norm in zip(sums, norms, strict=True)]


def best(scores: Tensor, num: int) -> list[int]:
    """Return the numbers of the `num` largest scores, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:num]
    return sorted(order.tolist())


def narrow(block: nn.Module, channels: Sequence[int]) -> None:
    """Leave only these channels in the block's MLP, as copies; what `block` shared with another model is untouched."""
    slice_mlp(block, find_mlp(block), torch.tensor(channels))
