"""What narrowing an MLP does to the backward pass: how its channels' derivatives go together, and the loss's gradients.

The client learns from gradients that pass through the emulator. An MLP y = W a(h) hands a gradient g on as
``(W G)^T g``, where row c of G is the derivative of channel c towards the hidden state h. With E the change of W that
narrowing makes, what is lost of it is ``|(E G)^T g|^2``, a quadratic in E as the loss of output ``|E a|^2`` is: so one
least squares can answer for both. G is never made: along a random direction v with covariance 1 the mean of
``(E G v)(E G v)^T`` is ``E G G^T E^T``, and G v is one forward-mode derivative.

Source: structures by least squares as in ZipLM, arXiv:2302.04089; the second term was tried by a prototype of this
project, whose figures docs/owner.md gives.

Shapes: B rows, T tokens, N tokens in a row, C channels, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from emulator.compression.activations import Batch, forward, on_device, real_tokens, seen_by
from emulator.compression.gradients import push_back
from emulator.compression.width import MOMENTS_LIMIT_BYTES, Activity
from offsite.console import Progress, progress
from offsite.errors import UnsupportedModel
from offsite.modelling.blocks import hidden_of
from offsite.modelling.mlps import Mlp, find_mlp, outgoing_weight

_TINY = 1e-12  # keeps a hidden state of zeros from dividing by zero


@dataclass(frozen=True)
class Backward:
    """What the backward pass through one MLP asks of its outgoing weights.

    Attributes:
        moment: (C, C) float32, mean product of the channels' derivatives towards the hidden state along one random
            direction for each token, tokens counting as the squared gradient that meets the MLP's output there. In
            the unit of `Activity.moment`: added to it, both terms are relative squared errors, of the output against
            the hidden state after the block and of the gradient handed on against the one that came in, whose
            direction is taken to be any.
        metric: (D, D) float32, mean outer product of the loss's gradients at the MLP's output; its trace is D.
    """

    moment: Tensor
    metric: Tensor


def weighed(found: Iterator[Activity], backward: Iterator[Backward], share: float) -> Iterator[Activity]:
    """Yield what each MLP did with its derivatives' moment times `share` added, and the metric for its outputs.

    The mean stays: a bias of the output takes up what channels did on average, and has no derivative.
    """
    for activity, other in zip(found, backward, strict=True):
        yield Activity(activity.mean, activity.moment + share * other.moment, other.metric)


def directions(seed: int, batch_number: int, shape: torch.Size | Sequence[int]) -> Tensor:
    """Return random directions (B, T, D) float32 of covariance 1: the same for every block, whichever are measured."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + batch_number) % 2**63)
    return torch.randn(tuple(shape), generator=generator)


def backwards(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch], *, seed: int
) -> Iterator[Backward]:
    """Yield for each of `blocks` what the backward pass of the loss on `batches` asks of its MLP.

    The loss is that of the next token, summed over the text. `model` is as it was afterwards.

    Args:
        blocks: blocks of `model` with one MLP each, in any number.
        batches: public text, ``input_ids`` and ``attention_mask`` of (batch, tokens) int64 each.
        seed: of the random directions.

    Raises:
        UnsupportedModel: a mixture of experts, or an activation that has no forward derivative.
    """
    mlps = [find_mlp(block) for block in blocks]
    sizes = [outgoing_weight(block, mlp).shape for block, mlp in zip(blocks, mlps, strict=True)]
    largest = 4 * max(hidden**2 + channels**2 for hidden, channels in sizes)
    at_once = max(1, MOMENTS_LIMIT_BYTES // largest)
    for first in range(0, len(blocks), at_once):
        some = slice(first, first + at_once)
        group = [_Passed(*pair) for pair in zip(blocks[some], mlps[some], strict=True)]
        with progress(len(batches), f"reading gradients for {len(group)} blocks, batches") as bar:
            _read(model, group, batches, seed, bar)
        yield from (one.backward for one in group)


class _Passed:
    """Sums over tokens of what passed one block: gradients at its MLP's output, derivatives of its channels."""

    def __init__(self, block: nn.Module, mlp: Mlp) -> None:
        self.block, self.mlp = block, mlp
        self.moment: Tensor | float = 0.0
        self.metric: Tensor | float = 0.0
        self.squares: list[Tensor] = []
        self.inverse_size: Tensor | float = 0.0
        self.num_tokens = 0

    def see_gradient(self, _read: Tensor, _output: Tensor, gradient_ND: Tensor) -> None:
        """Count the loss's gradient at the MLP's output."""
        self.metric = self.metric + gradient_ND.T @ gradient_ND
        self.squares.append(gradient_ND.square().sum(-1))

    def see_derivative(self, derivative: Tensor) -> None:
        """Count the channels' derivatives of the batch whose gradients were seen last."""
        square_N = torch.cat(self.squares)
        self.squares = []
        scaled_NC = derivative.float().reshape(-1, derivative.shape[-1]) * square_N.sqrt()[:, None]
        self.moment = self.moment + scaled_NC.T @ scaled_NC

    def see_output(self, hidden_BTD: Tensor, real_BT: Tensor) -> None:
        """Count how small the hidden state after the block is."""
        self.inverse_size = self.inverse_size + (real_BT / (hidden_BTD.float().square().sum(-1) + _TINY)).sum()
        self.num_tokens += int(real_BT.sum())

    @property
    def backward(self) -> Backward:
        """The means, in the unit of `Activity.moment`; zeros where no gradient came."""
        moment, metric = torch.as_tensor(self.moment), torch.as_tensor(self.metric)
        tiny = torch.finfo(torch.float32).tiny
        total = metric.diagonal().sum().clamp(min=tiny)
        mean_weight = torch.as_tensor(self.inverse_size) / max(1, self.num_tokens)
        return Backward(moment / total / len(metric) / mean_weight.clamp(min=tiny), metric / total * len(metric))


def _read(model: nn.Module, group: Sequence[_Passed], batches: Sequence[Batch], seed: int, bar: Progress) -> None:
    device = next(model.parameters()).device
    for number, batch in enumerate(batches):
        here = on_device(batch, device)
        real_BT = real_tokens(here)
        push_back(model, here, [(one.block.get_submodule(one.mlp.output), one.see_gradient) for one in group])

        def see(which: int, _before: Tensor, output: Any, real_BT: Tensor = real_BT) -> None:
            group[which].see_output(hidden_of(output), real_BT)

        with torch.no_grad(), forward_ad.dual_level(), _derived(group, seed, number), seen_by(
            [one.block for one in group], see
        ):  # fmt: skip
            try:
                forward(model, here)
            except NotImplementedError:
                raise UnsupportedModel("--refit-jacobian: the MLPs' activation has no forward derivative") from None
        bar.update(number + 1)


@contextmanager
def _derived(group: Sequence[_Passed], seed: int, batch_number: int) -> Iterator[None]:
    """Inside, in forward-mode differentiation, a pass shows every block's channels their derivatives.

    What goes on behind the channels is the plain value: no derivative leaves the MLP.
    """
    with ExitStack() as stack:
        for one in group:
            hooks = _Hooks(one, seed, batch_number)
            for module in one.block.modules():
                if "norm" in type(module).__name__.lower():
                    stack.callback(module.register_forward_hook(hooks.norm).remove)
            for name in one.mlp.inputs:
                stack.callback(one.block.get_submodule(name).register_forward_pre_hook(hooks.enter).remove)
            output = one.block.get_submodule(one.mlp.output)
            stack.callback(output.register_forward_pre_hook(hooks.leave).remove)
        yield


class _Hooks:
    """How one block's MLP is derived: towards what its norm reads, or towards its own input where none is before it."""

    def __init__(self, one: _Passed, seed: int, batch_number: int) -> None:
        self._one, self._seed, self._batch_number = one, seed, batch_number
        self._normed: list[tuple[Tensor, Tensor, nn.Module]] = []
        self._entered: tuple[Tensor, Tensor] | None = None

    def norm(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Remember what a norm made of what: held, so that no other tensor takes its place in memory."""
        if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            self._normed.append((output, args[0], module))

    def enter(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give the MLP's input its derivative, the same for gate and up."""
        inside = args[0]
        if self._entered is None or self._entered[0] is not inside:
            self._entered = inside, self._along(inside)
        return (forward_ad.make_dual(inside, self._entered[1]), *args[1:])

    def leave(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Count the channels' derivatives and let the plain activations go on."""
        active, derivative = forward_ad.unpack_dual(args[0])
        if derivative is None:
            raise UnsupportedModel("--refit-jacobian: the MLPs' activation has no forward derivative")
        self._one.see_derivative(derivative)
        self._normed, self._entered = [], None
        return (active, *args[1:])

    def _along(self, inside: Tensor) -> Tensor:
        """Return how the MLP's input changes along the random direction of the hidden state."""
        direction = directions(self._seed, self._batch_number, (inside.numel() // inside.shape[-1], inside.shape[-1]))
        direction = direction.to(inside.device, inside.dtype)
        for output, before, module in reversed(self._normed):
            if output.data_ptr() == inside.data_ptr() and output.numel() == inside.numel():
                moved = module.forward(forward_ad.make_dual(before, direction.reshape(before.shape)))
                found: Tensor = forward_ad.unpack_dual(moved).tangent
                return found.reshape(inside.shape)
        return direction.reshape(inside.shape)
