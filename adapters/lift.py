"""Lift a low-rank adapter from a shrunk feed-forward part onto the full one.

Where the package kept some channels of an MLP, the adapter's factor on the channel side has one row (or column) per
kept channel. In the full model the other channels get zeros: their weights stay the owner's. DoRA's magnitudes cannot
be lifted, so DoRA is never placed there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from offsite.errors import WrongShape


def lift(
    tensors: Mapping[str, torch.Tensor],
    channels: Mapping[str, Sequence[int]],
    full_dims: Mapping[str, tuple[int, int]],
) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors with the full model's shapes; those that already fit are the same objects.

    Args:
        tensors: canonical names to tensors, as a bundle holds them.
        channels: canonical block -> ascending numbers of its kept MLP channels, for blocks that were shrunk.
        full_dims: canonical linear module -> (inputs, outputs) in the full model.

    Raises:
        WrongShape: when a tensor's size is neither the full model's nor that of the kept channels (twice that, where
            gate and up are one module).
    """
    lifted = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        block = ".".join(name.split(".")[:2])
        if part not in {"lora_A", "lora_B"} or block not in channels:
            lifted[name] = tensor
            continue
        axis, full = (1, full_dims[module][0]) if part == "lora_A" else (0, full_dims[module][1])
        lifted[name] = tensor if tensor.shape[axis] == full else spread(name, tensor, axis, full, channels[block])
    return lifted


def spread(name: str, tensor: torch.Tensor, axis: int, full: int, kept: Sequence[int]) -> torch.Tensor:
    """Return the tensor with `full` entries on `axis`: its own at the kept channels, zeros at the others.

    Raises:
        WrongShape: when it does not have one entry per kept channel, or two where gate and up are one module.
    """
    index = torch.tensor(list(kept), dtype=torch.long)
    if tensor.shape[axis] == 2 * len(index):  # gate and up in one module: the same channels in both halves
        index = torch.cat([index, index + full // 2])
    if tensor.shape[axis] != len(index) or (len(index) and int(index.max()) >= full):
        raise WrongShape(
            f"tensor {name!r} has {tensor.shape[axis]} channels, the owner's record says {len(kept)} were kept"
        )
    shape = list(tensor.shape)
    shape[axis] = full
    return torch.zeros(shape, dtype=tensor.dtype).index_copy_(axis, index, tensor)
