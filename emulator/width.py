"""A narrower middle: which MLP channels it keeps, and how the kept ones make up for the others.

Every block stays, so an adapter on any of its linears lifts into the full model one to one: on attention as it
is, on the MLP with zero rows and columns for the channels that were left out.

Shapes: B rows, T tokens, N tokens that are text, C channels, K of them kept, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emulator.trace import Batch, forward, on_device, real_tokens, seen_by
from offsite.blocks import find_mlp, outgoing_weight, slice_mlp
from offsite.errors import ConfigError

MULTIPLE = 8
"""Widths are multiples of this where the MLP is wide enough: matrix units work on tiles."""

RIDGE = 0.01
"""Weight of staying at the old outgoing weights in `refit`, as a share of the mean square activation."""

MOMENTS_LIMIT_BYTES = 2 * 2**30
"""What the matrices of one pass over the calibration text may take; more blocks than fit make more passes."""


@dataclass(frozen=True)
class Activity:
    """What the MLP channels of one block did on public text, padding apart.

    Attributes:
        mean: (C,) float32, mean activation.
        moment: mean product of activations, float32: (C, C), or its diagonal (C,) where that is enough.
    """

    mean: Tensor
    moment: Tensor

    @property
    def square(self) -> Tensor:
        """Mean square activation, (C,) float32."""
        return self.moment if self.moment.dim() == 1 else self.moment.diagonal()


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


def activities(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch], *, products: bool
) -> Iterator[Activity]:
    """Yield, block by block, what the MLP channels of `blocks` do when `model` reads `batches`.

    Args:
        blocks: blocks of `model`, in any number.
        products: measure how every two channels go together, not only each alone.

    Raises:
        UnsupportedModel: when a block has no single MLP, such as a mixture of experts.
        ConfigError: when there is no text.
    """
    if not batches:
        raise ConfigError("choosing MLP channels needs public text, found none")
    widths = [find_mlp(block).num_channels for block in blocks]
    largest = 4 * max(widths) * (max(widths) if products else 1)
    at_once = max(1, MOMENTS_LIMIT_BYTES // largest)
    for first in range(0, len(blocks), at_once):
        yield from _activities(model, blocks[first : first + at_once], batches, products)


@torch.no_grad()
def _activities(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch], products: bool
) -> list[Activity]:
    device = next(model.parameters()).device
    mlps = [find_mlp(block) for block in blocks]
    sums = [torch.zeros(mlp.num_channels, device=device) for mlp in mlps]
    moments = [torch.zeros([mlp.num_channels] * (2 if products else 1), device=device) for mlp in mlps]
    count = 0
    outputs = [block.get_submodule(mlp.output) for block, mlp in zip(blocks, mlps, strict=True)]
    for batch in batches:
        here = on_device(batch, device)
        real_BT = real_tokens(here)
        count += int(real_BT.sum())

        def see(number: int, activation: Tensor, _output: Any, real_BT: Tensor = real_BT) -> None:
            found_NC = activation.reshape(*real_BT.shape, -1)[real_BT].float()
            sums[number] += found_NC.sum(0)
            if products:
                moments[number].addmm_(found_NC.T, found_NC)
            else:
                moments[number] += found_NC.square().sum(0)

        with seen_by(outputs, see):
            forward(model, here)
    return [Activity(total / count, moment / count) for total, moment in zip(sums, moments, strict=True)]


def score(block: nn.Module, activity: Activity) -> Tensor:
    """Return (C,) float32: how much each channel adds to the hidden state, root mean square over the text.

    That is its root mean square activation times the norm of its outgoing weights: what leaving out this channel
    alone would cost. Source: saliency of FFN neurons in FedPFT, arXiv:2404.11536 (norms of attached weights),
    weighted by activation as in Wanda, arXiv:2306.11695.
    """
    norm_C: Tensor = outgoing_weight(block, find_mlp(block)).float().norm(dim=0)
    return activity.square.sqrt() * norm_C


def best(scores: Tensor, num: int) -> list[int]:
    """Return the numbers of the `num` largest scores, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:num]
    return sorted(order.tolist())


def narrow(block: nn.Module, channels: Sequence[int]) -> None:
    """Leave only these channels in the block's MLP, as copies; what `block` shared with another model is untouched."""
    slice_mlp(block, find_mlp(block), torch.tensor(channels))


@torch.no_grad()
def refit(block: nn.Module, full_block: nn.Module, channels: Sequence[int], activity: Activity) -> None:
    """The outgoing weights of the narrowed `block` are those that come nearest to the full MLP's output.

    Least squares over the text of `activity`, of (C, C) moments, with a small pull (`RIDGE`) to the full model's
    weights; where the output has a bias it takes up what the channels left out did on average.

    Source: reconstruction after channel pruning, arXiv:1707.06168.
    """
    kept = torch.tensor(channels, device=activity.mean.device)
    moment_CC, mean_C = activity.moment.double(), activity.mean.double()
    weight_DC = outgoing_weight(full_block, find_mlp(full_block)).double()
    bias_D = block.get_submodule(find_mlp(block).output).bias
    if isinstance(bias_D, Tensor):
        moment_CC = moment_CC - mean_C[:, None] * mean_C
    gram_KK = moment_CC[kept][:, kept]
    pull = RIDGE * gram_KK.diagonal().mean() + 1e-12
    wanted_KD = moment_CC[kept] @ weight_DC.T + pull * weight_DC.T[kept]
    gram_KK.diagonal().add_(pull)
    fitted_DK = torch.linalg.solve(gram_KK, wanted_KD).T
    if isinstance(bias_D, Tensor):
        missed_D = weight_DC @ mean_C - fitted_DK @ mean_C[kept]
        bias_D.data = (bias_D.double() + missed_D).to(bias_D.dtype)  # a new tensor: the old one is the full model's
    outgoing_weight(block, find_mlp(block)).copy_(fitted_DK)
