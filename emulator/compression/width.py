"""A narrower middle: which MLP channels it keeps, and how the kept ones make up for the others.

Every block stays, so an adapter on any of its linears lifts into the full model one to one: on attention as it
is, on the MLP with zero rows and columns for the channels that were left out.

Shapes: B rows, T tokens, N tokens that are text, C channels, K of them kept, D hidden, S eliminated together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emulator.compression.activations import Batch, forward, on_device, real_tokens, seen_by
from offsite.console import Progress, progress
from offsite.errors import ConfigError
from offsite.modelling.blocks import find_mlp, hidden_of, outgoing_weight, slice_mlp

MULTIPLE = 8
"""Widths are multiples of this where the MLP is wide enough: matrix units work on tiles."""

RIDGE = 0.01
"""Weight of staying at the old outgoing weights in `refit`, as a share of the median channel's square activation.

Not of the mean: where one channel carries a massive activation, that is a thousand times what the others do.
"""

ELIMINATED_TOGETHER = 32
"""Rank-one updates that `eliminate` gathers before it applies them to its matrices: it does not change the result."""

MOMENTS_LIMIT_BYTES = 2 * 2**30
"""What the matrices of one pass over the calibration text may take; more blocks than fit make more passes."""


_TINY = 1e-12  # keeps a hidden state of zeros from dividing by zero


@dataclass(frozen=True)
class Activity:
    """What the MLP channels of one block did on public text, padding apart.

    Means are over tokens, each weighing as one over its squared hidden state after the block: what the MLP adds
    counts against the size of what it is added to, and few tokens of massive activation do not count for all.

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
        group = blocks[first : first + at_once]
        with progress(len(batches), f"reading calibration text for {len(group)} blocks, batches") as bar:
            found = _activities(model, group, batches, products, bar)
        yield from found


@torch.no_grad()
def _activities(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch], products: bool, bar: Progress
) -> list[Activity]:
    device = next(model.parameters()).device
    mlps = [find_mlp(block) for block in blocks]
    sums = [torch.zeros(mlp.num_channels, device=device) for mlp in mlps]
    moments = [torch.zeros([mlp.num_channels] * (2 if products else 1), device=device) for mlp in mlps]
    total = torch.zeros(len(blocks), device=device)
    outputs = [block.get_submodule(mlp.output) for block, mlp in zip(blocks, mlps, strict=True)]
    inside: dict[int, Tensor] = {}

    def see(number: int, activation: Tensor, _output: Any) -> None:
        inside[number] = activation

    for read, batch in enumerate(batches, start=1):
        here = on_device(batch, device)
        real_BT = real_tokens(here)

        def add(number: int, _before: Tensor, output: Any, real_BT: Tensor = real_BT) -> None:
            weight_N = 1 / (hidden_of(output)[real_BT].float().square().sum(-1) + _TINY)
            found_NC = inside.pop(number).reshape(*real_BT.shape, -1)[real_BT].float()
            total[number] += weight_N.sum()
            sums[number] += weight_N @ found_NC
            scaled_NC = found_NC * weight_N.sqrt()[:, None]
            if products:
                moments[number].addmm_(scaled_NC.T, scaled_NC)
            else:
                moments[number] += scaled_NC.square().sum(0)

        with seen_by(outputs, see), seen_by(blocks, add):
            forward(model, here)
        bar.update(read)
    return [Activity(one / all_, moment / all_) for one, moment, all_ in zip(sums, moments, total, strict=True)]


def score(block: nn.Module, activity: Activity) -> Tensor:
    """Return (C,) float32: how much each channel adds to the hidden state, root mean square over the text.

    That is its root mean square activation times the norm of its outgoing weights: what leaving out this channel
    alone would cost. Source: saliency of FFN neurons in FedPFT, arXiv:2404.11536 (norms of attached weights),
    weighted by activation as in Wanda, arXiv:2306.11695.
    """
    norm_C: Tensor = outgoing_weight(block, find_mlp(block)).float().norm(dim=0)
    return activity.square.sqrt() * norm_C


@torch.no_grad()
def eliminate(block: nn.Module, activity: Activity, num: int) -> list[int]:
    """Return the numbers, ascending, of the `num` channels left after the others went one by one.

    Each time that channel goes whose loss costs least once the outgoing weights of those that are left make up for
    it: the problem that `refit` solves for the set that remains, so two channels that say the same do not both stay.
    With H the moments of `activity`, of (C, C), plus the ridge, that is the least ``|w_c|^2 / [H^-1]_cc``; then w
    and H^-1 are brought up to date.

    Source: optimal brain surgeon (Hassibi and Stork, 1993), by structures as in ZipLM, arXiv:2302.04089.
    """
    weight_DC = outgoing_weight(block, find_mlp(block)).double()
    moment_CC = _moment(block, activity)
    moment_CC.diagonal().add_(RIDGE * moment_CC.diagonal().median() + 1e-12)
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(moment_CC))
    left = torch.arange(len(inverse_CC), device=inverse_CC.device)
    while len(left) > num:
        stay, down_CS, out_DS = _eliminate_some(weight_DC, inverse_CC, min(ELIMINATED_TOGETHER, len(left) - num))
        weight_DC = (weight_DC - out_DS @ down_CS.T)[:, stay]
        inverse_CC = (inverse_CC - down_CS @ down_CS.T)[stay][:, stay]
        left = left[stay]
    found: list[int] = left.tolist()
    return found


def _eliminate_some(weight_DC: Tensor, inverse_CC: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return who stays when `num` channels have gone, (C,) bool, and factors of the updates of inverse and weights."""
    down_CS, out_DS = inverse_CC.new_zeros(len(inverse_CC), num), weight_DC.new_zeros(len(weight_DC), num)
    diagonal_C, squares_C = inverse_CC.diagonal().clone(), weight_DC.square().sum(0)
    stay = torch.ones_like(diagonal_C, dtype=torch.bool)
    for done in range(num):
        channel = int(torch.where(stay, squares_C / diagonal_C, torch.inf).argmin())
        row_S = down_CS[channel, :done].clone()
        down_C = inverse_CC[:, channel] - down_CS[:, :done] @ row_S
        root = down_C[channel].sqrt()
        down_C, out_D = down_C / root, (weight_DC[:, channel] - out_DS[:, :done] @ row_S) / root
        along_C = weight_DC.T @ out_D - down_CS[:, :done] @ (out_DS[:, :done].T @ out_D)
        squares_C += down_C * (down_C * out_D.square().sum() - 2 * along_C)
        diagonal_C -= down_C.square()
        down_CS[:, done], out_DS[:, done], stay[channel] = down_C, out_D, False
    return stay, down_CS, out_DS


def strongest(block: nn.Module, activity: Activity, num: int) -> list[int]:
    """Return the numbers, ascending, of the `num` channels of the largest `score`."""
    return best(score(block, activity), num)


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
    moment_CC, mean_C = _moment(full_block, activity), activity.mean.double()
    weight_DC = outgoing_weight(full_block, find_mlp(full_block)).double()
    bias_D = block.get_submodule(find_mlp(block).output).bias
    gram_KK = moment_CC[kept][:, kept]
    pull = RIDGE * gram_KK.diagonal().median() + 1e-12
    wanted_KD = moment_CC[kept] @ weight_DC.T + pull * weight_DC.T[kept]
    gram_KK.diagonal().add_(pull)
    fitted_DK = torch.linalg.solve(gram_KK, wanted_KD).T
    if isinstance(bias_D, Tensor):
        missed_D = weight_DC @ mean_C - fitted_DK @ mean_C[kept]
        bias_D.data = (bias_D.double() + missed_D).to(bias_D.dtype)  # a new tensor: the old one is the full model's
    outgoing_weight(block, find_mlp(block)).copy_(fitted_DK)


def _moment(block: nn.Module, activity: Activity) -> Tensor:
    """Return new (C, C) float64 moments of what the outgoing weights must answer for: a bias takes up the mean."""
    moment_CC = activity.moment.to(torch.float64, copy=True)
    if isinstance(block.get_submodule(find_mlp(block).output).bias, Tensor):
        moment_CC -= activity.mean.double()[:, None] * activity.mean.double()
    return moment_CC
