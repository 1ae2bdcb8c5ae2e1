"""Which blocks of the middle an emulator by layer-drop keeps.

The numbers here count within the middle, from 0. The first and the last block of the middle are always
kept: they meet the trainable ends, and whoever loses the last one leaves the top end without its input
(rounding with ``int`` did so in an earlier system for many pairs of sizes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from emulator.compression.activations import Batch, forward, on_device, real_tokens, seen_by
from offsite.errors import ConfigError
from offsite.modelling.blocks import hidden_of


def uniform(num_middle: int, num_kept: int) -> tuple[int, ...]:
    """Return `num_kept` evenly spaced block numbers, ascending, with the first and the last of the middle.

    The spacing is ``(num_middle - 1) / (num_kept - 1)``, each multiple rounded half to even, in exact
    arithmetic. Source: arXiv:2302.04870, whose code rounds the same way.

    Raises:
        ConfigError: when `num_kept` cannot hold both the first and the last, or exceeds the middle.
    """
    check_num_kept(num_middle, num_kept)
    if num_kept == 1:
        return (0,)
    return tuple(round(Fraction(i * (num_middle - 1), num_kept - 1)) for i in range(num_kept))


def by_influence(influences: Sequence[float], num_kept: int) -> tuple[int, ...]:
    """Return the blocks of the middle with the largest `influences`, ascending, and the first and last.

    Of equal influences the earlier block is kept, so that the choice is a function of its input.

    Args:
        influences: one number per block of the middle, as `measure_influences` returns them.

    Raises:
        ConfigError: as `uniform`.
    """
    num_middle = len(influences)
    check_num_kept(num_middle, num_kept)
    if num_kept == 1:
        return (0,)
    inner = sorted(range(1, num_middle - 1), key=lambda i: (-influences[i], i))
    return tuple(sorted({0, num_middle - 1, *inner[: num_kept - 2]}))


def check_num_kept(num_middle: int, num_kept: int) -> None:
    """Return only if `num_kept` blocks, the first and the last among them, can be kept.

    Raises:
        ConfigError: saying what was asked and what the middle holds.
    """
    if num_kept > num_middle:
        raise ConfigError(f"asked to keep {num_kept} blocks of the middle, which has {num_middle}")
    if num_kept < min(2, num_middle):
        raise ConfigError(
            f"asked to keep {num_kept} of {num_middle} blocks of the middle, expected at least 2: "
            "its first and its last are always kept"
        )


@torch.no_grad()
def measure_influences(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch]) -> list[float]:
    """Return, for each block, how much it turns the hidden state: the mean over tokens of 1 - cosine(in, out).

    Padding does not count. Between 0 (the block could be left out) and 2.

    Args:
        blocks: blocks of `model`, in any number.
        batches: public text as ``input_ids`` and ``attention_mask``, (batch, tokens) int64.

    Source: "block influence" of ShortGPT, arXiv:2403.03853, equation 1.
    """
    sums, count = [0.0] * len(blocks), 0
    for batch in batches:
        here = on_device(batch, next(model.parameters()).device)
        real_BT = real_tokens(here)
        count += int(real_BT.sum())

        def see(number: int, before_BTD: Tensor, output: Any, real_BT: Tensor = real_BT) -> None:
            after_BTD = hidden_of(output)
            cosine_BT = nn.functional.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
            sums[number] += float((1 - cosine_BT)[real_BT].double().sum())

        with seen_by(blocks, see):
            forward(model, here)
    if count == 0:
        raise ConfigError("measuring the blocks' influence needs public text, found none")
    return [total / count for total in sums]
