"""A narrower middle: which MLP channels it keeps, and how the kept ones make up for the others.

Every block stays, so an adapter on any of its linears lifts into the full model one to one: on attention as it
is, on the MLP with zero rows and columns for the channels that were left out. A mixture of experts keeps all its
experts and its router, and equally many channels of each.

Shapes: B rows, T tokens, N tokens that are text, C channels, K of them kept, D hidden, S eliminated together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.activations import Batch, real_tokens, seen_by
from emulator.compression.passage import Passage
from offsite.console import Progress, progress
from offsite.errors import ConfigError
from offsite.modelling.blocks import hidden_of
from offsite.modelling.experts import require_understood, routed
from offsite.modelling.mlps import (
    Experts,
    Part,
    find_mlps,
    outgoing_bias,
    outgoing_weight,
    own_bias,
    resized,
    slice_mlp,
)

MULTIPLE = 8
"""Widths are multiples of this where the MLP is wide enough: matrix units work on tiles."""

RIDGE = 0.01
"""Weight of staying at the old outgoing weights in `refit`, as a share of the median channel's square activation.

Not of the mean: where one channel carries a massive activation, that is a thousand times what the others do.
"""

ELIMINATED_TOGETHER = 32
"""Rank-one updates that `eliminate` gathers before it applies them to its matrices: it does not change the result."""

MOMENTS_LIMIT_BYTES = 2 * 2**30
"""What the matrices of one pass for gradients may take; more blocks than fit make more passes."""


_TINY = 1e-12  # keeps a hidden state of zeros from dividing by zero


@dataclass(frozen=True)
class Unit:
    """One MLP whose channels are chosen: a block's own, or one expert of a mixture.

    Attributes:
        block: the block that holds it.
        part: one of ``find_mlps(block)``.
        number: which expert.
    """

    block: nn.Module
    part: Part
    number: int = 0

    @property
    def outgoing(self) -> Tensor:
        """Weight (D, C) by which each channel reaches the hidden state; storage is shared."""
        return outgoing_weight(self.block, self.part, self.number)

    @property
    def bias(self) -> Tensor | None:
        """Bias (D,) of the output, or None; storage is shared."""
        return outgoing_bias(self.block, self.part, self.number)


@dataclass(frozen=True)
class Activity:
    """What the MLP channels of one unit did on public text, padding apart.

    Means are over tokens, each weighing as one over its squared hidden state after the block: what the MLP adds
    counts against the size of what it is added to, and few tokens of massive activation do not count for all. An
    expert's tokens are those the router sent to it, and weigh the router's weight squared besides; experts in a list
    of modules do not show which tokens they read, and count them all alike.

    Attributes:
        mean: (C,) float32, mean activation.
        moment: mean product of activations, float32: (C, C), or its diagonal (C,) where that is enough.
        metric: (D, D) float32, in which `eliminate` counts what is lost of the output; None: all directions alike.
        favour: (C,), what the cost of leaving out each channel is multiplied by; None: nothing.
        sensitivity: (C,) float32, what leaving out each channel costs by a measure of its own; None: not measured.
    """

    mean: Tensor
    moment: Tensor
    metric: Tensor | None = None
    favour: Tensor | None = None
    sensitivity: Tensor | None = None

    @property
    def square(self) -> Tensor:
        """Mean square activation, (C,) float32."""
        return self.moment if self.moment.dim() == 1 else self.moment.diagonal()


def units(block: nn.Module) -> tuple[Unit, ...]:
    """Return every MLP of `block` whose channels are chosen, the experts of a mixture one by one.

    Raises:
        UnsupportedModel: see ``find_mlps``.
    """
    return tuple(Unit(block, part, number) for part in find_mlps(block) for number in range(part.num_experts))


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
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    products: bool,
    passage: Passage | None = None,
) -> Iterator[Activity]:
    """Yield, unit by unit of every block, what the MLP channels of `blocks` do when `model` reads `batches`.

    Args:
        blocks: blocks of `model`, in any number.
        products: measure how every two channels go together, not only each alone.
        passage: of these batches through `model`; default: one in memory.

    Raises:
        UnsupportedModel: when a block has no MLP that can be narrowed.
        ConfigError: when there is no text.
    """
    if not batches:
        raise ConfigError("choosing MLP channels needs public text, found none")
    total = len(blocks) * len(batches)
    with (
        closing(passage or Passage(model, batches)) as way,
        progress(total, f"reading calibration text for {len(blocks)} blocks, batches") as bar,
    ):
        for number, block in enumerate(blocks):
            found = _activities(block, way, products, bar, number * len(batches))
            while found:  # each is let go of as it is taken
                yield found.pop(0)


class _Sums:
    """Sums over tokens of one unit's activations and their products, each token weighed."""

    def __init__(self, num_channels: int, products: bool, device: torch.device) -> None:
        self.total = torch.zeros((), device=device)
        self.sum_C = torch.zeros(num_channels, device=device)
        self.moment = torch.zeros([num_channels] * (2 if products else 1), device=device)

    def add(self, found_NC: Tensor, weight_N: Tensor) -> None:
        """Count these tokens too."""
        found_NC = found_NC.float()
        self.total += weight_N.sum()
        self.sum_C += weight_N @ found_NC
        scaled_NC = found_NC * weight_N.sqrt()[:, None]
        if self.moment.dim() == 2:
            self.moment.addmm_(scaled_NC.T, scaled_NC)
        else:
            self.moment += scaled_NC.square().sum(0)

    def finish(self) -> Activity:
        """Return the means, in the memory of the sums; of an expert that read nothing, zeros."""
        total = self.total.clamp(min=torch.finfo(torch.float32).tiny)
        return Activity(self.sum_C.div_(total), self.moment.div_(total))


@torch.no_grad()
def _activities(block: nn.Module, passage: Passage, products: bool, bar: Progress, read: int) -> list[Activity]:
    wanted = units(block)
    device = next(block.parameters()).device
    sums = [_Sums(unit.part.num_channels, products, device) for unit in wanted]
    seen = _Seen(wanted)

    @contextmanager
    def watching(batch: Batch) -> Iterator[None]:
        nonlocal read
        real_BT = real_tokens(batch)

        def add(_number: int, _before: Tensor, output: Any) -> None:
            weight_BT = real_BT / (hidden_of(output).float().square().sum(-1) + _TINY)
            for unit, into in zip(wanted, sums, strict=True):
                for found_NC, rows_N, share_N in seen.take(unit):
                    if rows_N is None:  # nothing says which tokens these are: padding is among them
                        into.add(found_NC, torch.ones(len(found_NC), device=device))
                        continue
                    weight_N = weight_BT.reshape(-1)[rows_N % weight_BT.numel()]
                    is_text = weight_N > 0
                    share_N = share_N.float().square()[is_text]
                    into.add(found_NC[is_text], weight_N[is_text] * share_N)

        with seen.watching(), seen_by([block], add):
            yield
        read += 1
        bar.update(read)

    passage.run(block, watching)
    return [one.finish() for one in sums]


Rows = tuple[Tensor, Tensor | None, Tensor]
"""Activations (N, C), the numbers of their tokens (N,) in the batch where that shows, and what each counts (N,)."""


class _Seen:
    """What went through the units in a forward pass, until it is taken."""

    def __init__(self, wanted: Sequence[Unit]) -> None:
        self._units = wanted
        self._found: dict[Unit, list[Rows]] = {}
        self._understood: set[Unit] = set()

    def take(self, unit: Unit) -> list[Rows]:
        """Return what went through the unit since it was last asked for."""
        return self._found.pop(unit, [])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every forward pass is seen."""
        handles = []
        for unit in self._units:
            part = unit.part
            if isinstance(part, Experts) and not part.members:
                if unit.number == 0:
                    module = unit.block.get_submodule(part.place)
                    handles.append(module.register_forward_hook(self._of_module(unit.block, part), with_kwargs=True))
            else:
                mlp = part.members[unit.number] if isinstance(part, Experts) else part
                handles.append(unit.block.get_submodule(mlp.output).register_forward_hook(self._of_linear(unit)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _of_linear(self, unit: Unit) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            found_NC = args[0].reshape(-1, args[0].shape[-1])
            rows_N = None
            if not isinstance(unit.part, Experts):
                rows_N = torch.arange(len(found_NC), device=found_NC.device)
            self._found.setdefault(unit, []).append((found_NC, rows_N, torch.ones_like(found_NC[:, 0])))

        return hook

    def _of_module(self, block: nn.Module, part: Experts) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = [*args, *kwargs.values()]
            if (first := Unit(block, part)) not in self._understood:
                require_understood(block, part, inputs, hidden_of(output))
                self._understood.add(first)
            for number, one in enumerate(routed(block, part, inputs)):
                rows = (one.active, one.rows, one.shares)
                self._found.setdefault(Unit(block, part, number), []).append(rows)

        return hook


def score(unit: Unit, activity: Activity) -> Tensor:
    """Return (C,) float32: how much each channel adds to the hidden state, root mean square over the text.

    That is its root mean square activation times the norm of its outgoing weights: what leaving out this channel
    alone would cost. Source: saliency of FFN neurons in FedPFT, arXiv:2404.11536 (norms of attached weights),
    weighted by activation as in Wanda, arXiv:2306.11695.
    """
    norm_C: Tensor = unit.outgoing.float().norm(dim=0)
    return activity.square.sqrt() * norm_C


@torch.no_grad()
def eliminate(unit: Unit, activity: Activity, num: int) -> list[int]:
    """Return the numbers, ascending, of the `num` channels left after the others went one by one.

    Each time that channel goes whose loss costs least once the outgoing weights of those that are left make up for
    it: the problem that `refit` solves for the set that remains, so two channels that say the same do not both stay.
    With H the moments of `activity`, of (C, C), plus the ridge, that is the least ``|w_c|^2 / [H^-1]_cc``; then w
    and H^-1 are brought up to date. Under a metric of the output its square root times the weights stands for them.

    Source: optimal brain surgeon (Hassibi and Stork, 1993), by structures as in ZipLM, arXiv:2302.04089.
    """
    weight_DC = unit.outgoing.double()
    if activity.metric is not None:  # |root w|^2 is w^T metric w
        weight_DC = _root(activity.metric) @ weight_DC
    moment_CC = _moment(unit, activity)
    moment_CC.diagonal().add_(RIDGE * moment_CC.diagonal().median() + 1e-12)
    factor_CC = torch.linalg.cholesky(moment_CC)
    del moment_CC  # of a wide MLP each of these is a gigabyte: never more than two at once
    inverse_CC = torch.cholesky_inverse(factor_CC)
    del factor_CC
    left = torch.arange(len(inverse_CC), device=inverse_CC.device)
    favour_C = torch.ones_like(weight_DC[0]) if activity.favour is None else activity.favour.to(weight_DC)
    while len(left) > num:
        some = min(ELIMINATED_TOGETHER, len(left) - num)
        stay, down_CS, out_DS = _eliminate_some(weight_DC, inverse_CC, favour_C[left], some)
        weight_DC = (weight_DC - out_DS @ down_CS.T)[:, stay]
        inverse_CC -= down_CS @ down_CS.T
        inverse_CC = inverse_CC[stay]
        inverse_CC = inverse_CC[:, stay]
        left = left[stay]
    found: list[int] = left.tolist()
    return found


def _eliminate_some(weight_DC: Tensor, inverse_CC: Tensor, favour_C: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return who stays when `num` channels have gone, (C,) bool, and factors of the updates of inverse and weights."""
    down_CS, out_DS = inverse_CC.new_zeros(len(inverse_CC), num), weight_DC.new_zeros(len(weight_DC), num)
    diagonal_C, squares_C = inverse_CC.diagonal().clone(), weight_DC.square().sum(0)
    stay = torch.ones_like(diagonal_C, dtype=torch.bool)
    for done in range(num):
        channel = int(torch.where(stay, favour_C * squares_C / diagonal_C, torch.inf).argmin())
        row_S = down_CS[channel, :done].clone()
        down_C = inverse_CC[:, channel] - down_CS[:, :done] @ row_S
        root = down_C[channel].sqrt()
        down_C, out_D = down_C / root, (weight_DC[:, channel] - out_DS[:, :done] @ row_S) / root
        along_C = weight_DC.T @ out_D - down_CS[:, :done] @ (out_DS[:, :done].T @ out_D)
        squares_C += down_C * (down_C * out_D.square().sum() - 2 * along_C)
        diagonal_C -= down_C.square()
        down_CS[:, done], out_DS[:, done], stay[channel] = down_C, out_D, False
    return stay, down_CS, out_DS


def strongest(unit: Unit, activity: Activity, num: int) -> list[int]:
    """Return the numbers, ascending, of the `num` channels of the largest `score`, favoured ones for more."""
    found_C = score(unit, activity)
    return best(found_C if activity.favour is None else found_C * activity.favour.to(found_C), num)


def best(scores: Tensor, num: int) -> list[int]:
    """Return the numbers of the `num` largest scores, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:num]
    return sorted(order.tolist())


def narrow(block: nn.Module, part: Part, channels: Sequence[Sequence[int]]) -> Part:
    """Leave only these channels of each expert; return the part as it is then.

    All of it is copies, the output's bias too: what `block` shared with another model is untouched.
    """
    slice_mlp(block, part, torch.tensor(channels))
    own_bias(block, part)
    return resized(part, len(channels[0]))


@torch.no_grad()
def refit(unit: Unit, full: Unit, channels: Sequence[int], activity: Activity) -> None:
    """The outgoing weights of the narrowed `unit`, its own, are those that come nearest to the full MLP's output.

    Least squares over the text of `activity`, of (C, C) moments, with a small pull (`RIDGE`) to the full model's
    weights; where the output has a bias it takes up what the channels left out did on average.

    Source: reconstruction after channel pruning, arXiv:1707.06168.
    """
    kept = torch.tensor(channels, device=activity.mean.device)
    moment_CC, mean_C = _moment(full, activity), activity.mean.double()
    weight_DC = full.outgoing.double()
    gram_KK = moment_CC[kept][:, kept]
    pull = RIDGE * gram_KK.diagonal().median() + 1e-12
    wanted_KD = moment_CC[kept] @ weight_DC.T + pull * weight_DC.T[kept]
    gram_KK.diagonal().add_(pull)
    fitted_DK = torch.linalg.solve(gram_KK, wanted_KD).T
    if full.bias is not None:
        missed_D = weight_DC @ mean_C - fitted_DK @ mean_C[kept]
        if (bias_D := unit.bias) is not None:
            bias_D.copy_(bias_D.double() + missed_D)
    unit.outgoing.copy_(fitted_DK)


def _root(metric_DD: Tensor) -> Tensor:
    """Return the symmetric square root (D, D) float64 of a matrix without negative directions but for rounding."""
    values_D, vectors_DD = torch.linalg.eigh(metric_DD.double())
    root_DD: Tensor = (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    return root_DD


def _moment(unit: Unit, activity: Activity) -> Tensor:
    """Return new (C, C) float64 moments of what the outgoing weights must answer for: a bias takes up the mean."""
    moment_CC = activity.moment.to(torch.float64, copy=True)
    if unit.bias is not None:
        moment_CC -= activity.mean.double()[:, None] * activity.mean.double()
    return moment_CC
