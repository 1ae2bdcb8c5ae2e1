"""Channels by what their going does to gradients: the smallest change of them, and for the same change more loss.

With l the mean loss of the next token and w a weight that changes by d, the score is
``|H d|_1 - lambda (dl/dw . d)``: how much the gradient changes, less what the change adds to the loss, for an emulator
should teach like the full model and be worth less. The Hessian H is the Fisher information by KFAC, for a linear with
inputs a and gradients g at its output ``E[a a^T] x E[g g^T]``. Leaving out channel c takes a row u of the up projection
and a column w of the down projection, and with d = -u and d = -w

    |H d|_1 = |E[g g^T]_c|_1 |E[x x^T] u|_1  and  |E[a a^T]_c|_1 |E[g g^T] w|_1.

Source: the gradient-preserving compression score (GCS) and "selective channel pruning" of GradOT, arXiv:2507.04455. Its
values of lambda are not known here: the two terms are counted in their mean sizes over the channels of an MLP, so that
lambda is a plain number. The paper's other half, ranks of the attention's matrices, is not here.

Shapes: N tokens in a row, C channels, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from emulator.compression.activations import Batch, on_device
from emulator.compression.gradients import push_back
from emulator.compression.width import MOMENTS_LIMIT_BYTES, Activity, Unit, best
from offsite.console import progress
from offsite.errors import ConfigError
from offsite.modelling.mlps import find_mlp, incoming, outgoing_weight


def gradient_keeping(_unit: Unit, activity: Activity, num: int) -> list[int]:
    """Return the numbers, ascending, of the `num` channels whose going would cost most by their sensitivity.

    Raises:
        ConfigError: when it was not measured.
    """
    if activity.sensitivity is None:
        raise ConfigError("choosing channels by gradot needs what gradients say of them")
    favour = activity.favour
    return best(activity.sensitivity if favour is None else activity.sensitivity * favour.to(activity.sensitivity), num)


def scored(found: Iterator[Activity], scores: Iterator[Tensor]) -> Iterator[Activity]:
    """Yield what each MLP did with its channels' scores."""
    for activity, sensitivity in zip(found, scores, strict=True):
        yield replace(activity, sensitivity=sensitivity)


def sensitivities(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch], loss_share: float
) -> Iterator[Tensor]:
    """Yield for each of `blocks` the score (C,) float32 of leaving out each of its MLP's channels.

    `model` is as it was afterwards.

    Args:
        blocks: blocks of `model` with one MLP each, in any number.
        batches: public text, ``input_ids`` and ``attention_mask`` of (batch, tokens) int64 each.
        loss_share: lambda.

    Raises:
        UnsupportedModel: a mixture of experts.
    """
    sizes = [outgoing_weight(block, find_mlp(block)).shape for block in blocks]
    at_once = max(1, MOMENTS_LIMIT_BYTES // (8 * max(hidden**2 + channels**2 for hidden, channels in sizes)))
    for first in range(0, len(blocks), at_once):
        group = [_Sums(block) for block in blocks[first : first + at_once]]
        watched = [pair for one in group for pair in one.watched]
        with progress(len(batches), f"reading gradients for {len(group)} blocks, batches") as bar:
            for number, batch in enumerate(batches, start=1):
                here = on_device(batch, next(model.parameters()).device)
                push_back(model, here, watched)
                bar.update(number)
        yield from (one.scores(loss_share) for one in group)


class _Sums:
    """Sums over tokens of what KFAC takes of one MLP's up and down projections, and of the loss that channels bear."""

    def __init__(self, block: nn.Module) -> None:
        self._block, self._mlp = block, find_mlp(block)
        self._up: list[Tensor | float] = [0.0, 0.0, 0.0]
        self._down: list[Tensor | float] = [0.0, 0.0, 0.0]
        self.watched = [
            (block.get_submodule(self._mlp.inputs[-1]), self._see_up),
            (block.get_submodule(self._mlp.output), self._see_down),
        ]

    def _see_up(self, read_ND: Tensor, _given: Tensor, gradient: Tensor) -> None:
        gradient_NC = gradient[:, -self._mlp.num_channels :]  # of gate and up in one, up is the second
        text_ND = read_ND * gradient.any(dim=1, keepdim=True)
        weight_CD = incoming(self._block, self._mlp)[-1][0].float()
        borne_C = ((read_ND @ weight_CD.T) * gradient_NC).sum(0)
        self._add(self._up, text_ND.T @ text_ND, gradient_NC.T @ gradient_NC, borne_C)

    def _see_down(self, active_NC: Tensor, _given: Tensor, gradient_ND: Tensor) -> None:
        text_NC = active_NC * gradient_ND.any(dim=1, keepdim=True)
        weight_DC = outgoing_weight(self._block, self._mlp).float()
        borne_C = ((gradient_ND @ weight_DC) * active_NC).sum(0)
        self._add(self._down, text_NC.T @ text_NC, gradient_ND.T @ gradient_ND, borne_C)

    @staticmethod
    def _add(sums: list[Tensor | float], *more: Tensor) -> None:
        sums[:] = [one + other for one, other in zip(sums, more, strict=True)]

    def scores(self, loss_share: float) -> Tensor:
        """Return the score of every channel's going, (C,): up and down together."""
        read_DD, up_CC, up_C = (torch.as_tensor(one) for one in self._up)
        active_CC, down_DD, down_C = (torch.as_tensor(one) for one in self._down)
        up_CD = incoming(self._block, self._mlp)[-1][0].float()
        down_DC = outgoing_weight(self._block, self._mlp).float()
        change_C = up_CC.abs().sum(0) * (up_CD @ read_DD).abs().sum(1)
        change_C = change_C + active_CC.abs().sum(0) * (down_DD @ down_DC).abs().sum(0)
        added_C = -(up_C + down_C)  # dl/dw . d, with d = -w
        size = added_C.abs().mean()
        return change_C / change_C.mean() - (loss_share * added_C / size if size > 0 else 0.0)
