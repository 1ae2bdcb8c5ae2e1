"""What the experts of one module do: which tokens they read, and their channels' activations.

Worked out beside the model's own code, and held against what that computed before anything is made of it.

Shape letters: N tokens in a row, D hidden, C MLP channels, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite.errors import UnsupportedModel
from offsite.modelling.mlps import Experts, bias_of, outgoing_bias, outgoing_weight, weight_of


@dataclass(frozen=True)
class Routed:
    """What one expert of one module did: the tokens it read, how much each counts, its channels' activations.

    Attributes:
        rows: number of each token among those that came in, (N,).
        shares: the router's weight, (N,).
        active: activations (N, C), as they meet the outgoing weights.
    """

    rows: Tensor
    shares: Tensor
    active: Tensor


def routed(block: nn.Module, part: Experts, inputs: Sequence[object]) -> tuple[Routed, ...]:
    """Return for each expert of one module what it does with what the module was given.

    Args:
        inputs: as the module's forward takes them: hidden states, numbers of the experts chosen for each token and
            their weights; or only hidden states that already stand expert by expert.
    """
    module = block.get_submodule(part.place)
    tensors = [one for one in inputs if isinstance(one, Tensor)]
    hidden_ND = tensors[0].reshape(-1, tensors[0].shape[-1])
    chosen = next((one for one in tensors[1:] if not one.is_floating_point()), None)
    shares = next((one for one in tensors[1:] if one.is_floating_point()), None)
    found = []
    for number in range(part.num_experts):
        if chosen is None or shares is None:
            rows = torch.arange(len(hidden_ND), device=hidden_ND.device).reshape(part.num_experts, -1)[number]
            share = torch.ones_like(rows, dtype=hidden_ND.dtype)
        else:
            rows, places = torch.where(chosen == number)
            share = shares[rows, places]
        found.append(Routed(rows, share, _through(module, part, number, hidden_ND[rows])))
    return tuple(found)


@torch.no_grad()
def require_understood(block: nn.Module, part: Experts, inputs: Sequence[object], output: Tensor) -> None:
    """Return only if the module computed what this module takes it to compute, and each channel is where it is thought.

    Raises:
        UnsupportedModel: naming the experts.
    """
    tensors = [one for one in inputs if isinstance(one, Tensor)]
    wanted = output.reshape(-1, output.shape[-1]).float()
    found = torch.zeros_like(wanted)
    for number, one in enumerate(routed(block, part, inputs)):
        out = one.active.float() @ outgoing_weight(block, part, number).float().T
        bias = outgoing_bias(block, part, number)
        out = out if bias is None else out + bias.float()
        found.index_add_(0, one.rows, out * one.shares[:, None].float())
    close = 1e-3 if tensors[0].dtype == torch.float32 else 5e-2
    is_alike = float((found - wanted).abs().max()) <= close * float(wanted.abs().max()) + 1e-6
    if not is_alike or not _is_by_channel(block.get_submodule(part.place), part):
        raise UnsupportedModel(
            f"the experts {part.place} of {type(block).__name__} compute something that no width method knows"
        )


def _is_by_channel(module: nn.Module, part: Experts) -> bool:
    """Say whether the channels' activations change places as their gates and ups do."""
    weight = weight_of(module, part.output)
    order = torch.arange(part.num_channels - 1, -1, -1, device=weight.device)
    rows = torch.stack([order + half * part.num_channels for half in range(part.halves)])
    if part.interleaved:
        rows = torch.stack([part.halves * order + half for half in range(part.halves)], dim=1)
    size = part.halves * part.num_channels
    probe = torch.sin(torch.arange(3 * size, device=weight.device).reshape(3, size).float()).to(weight.dtype)
    before, after = (_activated(module, part, one) for one in (probe, probe[:, rows.reshape(-1)]))
    return before.shape[-1] == part.num_channels and torch.allclose(after, before[:, order], rtol=1e-2, atol=1e-3)


def _through(module: nn.Module, part: Experts, number: int, hidden_ND: Tensor) -> Tensor:
    weight = weight_of(module, part.inputs)[number]
    bias = bias_of(module, f"{part.inputs}_bias")
    into = hidden_ND @ (weight if part.turned else weight.T)
    return _activated(module, part, into if bias is None else into + bias[number])


def _activated(module: nn.Module, part: Experts, into: Tensor) -> Tensor:
    gate = getattr(module, "_apply_gate", None)
    if part.halves == 2 and callable(gate):
        return gate(into)  # type: ignore[no-any-return]
    activation = next((getattr(module, name) for name in ("act_fn", "activation_fn") if hasattr(module, name)), None)
    if not callable(activation):
        raise UnsupportedModel(f"the experts {part.place} have no activation that a width method knows")
    if part.halves == 1:
        return activation(into)  # type: ignore[no-any-return]
    first, second = into.chunk(2, dim=-1)
    return activation(first) * second  # type: ignore[no-any-return]
