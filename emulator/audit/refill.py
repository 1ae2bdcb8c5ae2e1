"""Where an attack starts from: the package's model as it is, or given the full model's size again, by guesswork.

All that is used is the package and what is public about the full model: how many blocks it has. How wide its MLPs are,
the package shows itself, for its ends are whole. Which blocks are missing is guessed: evenly spaced ones.

Shapes: D hidden, C channels of the full MLP, K of the package's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.choose import uniform
from offsite.artefacts.layout import Layout
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.blocks import block_list, decoder_stack
from offsite.modelling.depth import build_empty, source_name
from offsite.modelling.mlps import Part, find_mlps, incoming, outgoing_weight, resize_mlp, resized

Refill = Callable[[PreTrainedModel, Layout, int, int], PreTrainedModel]
"""From a model of its own (changed or used up), its layout, the full model's number of blocks, and a seed."""

_NOISE = 0.02
"""By how much copies of a channel differ, of their standard deviation: alike, they would stay alike for ever."""


def missing(model: PreTrainedModel, layout: Layout, num_blocks: int) -> tuple[str, ...]:
    """Return the starts that give this package's model its full size: none where nothing is missing.

    Args:
        model: the package's.
        num_blocks: of the full model.
    """
    found: tuple[str, ...] = ()
    if len(layout.blocks) < num_blocks:
        found = ("duplicate", "interpolate")
    elif _narrow_mlps(model, layout):
        found = ("regrow", "split")
    return found


def refilled(name: str, model: PreTrainedModel, layout: Layout, num_blocks: int, *, seed: int) -> PreTrainedModel:
    """Return the model as the start called `name` has it; `model` is changed or used up.

    Raises:
        ConfigError: when there is no such start, or it has nothing to do for this package.
        UnsupportedModel: when the architecture's blocks depend on their depth.
    """
    require_start(name, model, layout, num_blocks)
    return model if name == "as_is" else _REFILLS[name](model, layout, num_blocks, seed)


def require_start(name: str, model: PreTrainedModel, layout: Layout, num_blocks: int) -> None:
    """Return only if there is such a start for this package.

    Raises:
        ConfigError: naming those that there are.
    """
    possible = ("as_is", *missing(model, layout, num_blocks))
    if name not in possible:
        hint = f"it can start from: {', '.join(possible)}"
        raise ConfigError(f"start {name!r} has nothing to do for this package", hint=hint)


# --- blocks that were dropped


def duplicate(model: PreTrainedModel, layout: Layout, num_blocks: int, _seed: int) -> PreTrainedModel:
    """Return a model of full depth whose holes are filled with copies of the nearest kept block of the middle."""
    return _deepened(model, [_nearest(place) for place in _places(layout, num_blocks)])


def interpolate(model: PreTrainedModel, layout: Layout, num_blocks: int, _seed: int) -> PreTrainedModel:
    """Return a model of full depth whose holes are filled with the weighted means of the kept blocks on either side."""
    places = _places(layout, num_blocks)
    source = decoder_stack(model)
    kept = block_list(model, source)
    deep = _deepened(model, [_nearest(place) for place in places])
    with torch.no_grad():
        for place, block in zip(places, block_list(deep, decoder_stack(deep)), strict=True):
            below = int(place)
            if place == below:
                continue
            above = dict(kept[below + 1].named_parameters())
            for (name, parameter), under in zip(block.named_parameters(), kept[below].parameters(), strict=True):
                if name in above and above[name].shape == under.shape == parameter.shape:
                    parameter.copy_(torch.lerp(under, above[name], place - below))
    return deep


def _nearest(place: float) -> int:
    """Return the nearest whole number, of two the lower."""
    return math.ceil(place - 0.5)


def _places(layout: Layout, num_blocks: int) -> list[float]:
    """Return, for every block of the full model, where it lies among the package's: 3.5 is halfway from 3 to 4.

    The kept blocks of the middle are taken to be evenly spaced, as they are unless the owner chose otherwise.
    """
    num_middle = num_blocks - layout.num_bottom - layout.num_top
    kept = uniform(num_middle, layout.num_middle) if layout.num_middle > 1 else (0,)
    middle = np.interp(range(num_middle), kept, range(layout.num_middle)).tolist()
    first_top = layout.num_bottom + layout.num_middle
    return [
        *map(float, range(layout.num_bottom)),
        *(layout.num_bottom + place for place in middle),
        *map(float, range(first_top, first_top + layout.num_top)),
    ]


def _deepened(model: PreTrainedModel, sources: list[int]) -> PreTrainedModel:
    """Return a model whose block i is a copy of block ``sources[i]``, in evaluation mode; nothing is shared."""
    keep = {decoder_stack(model): sources}
    deep = build_empty(model, keep)
    state = model.state_dict()
    copies = {name: state[source_name(name, keep)].clone() for name in deep.state_dict()}
    deep.load_state_dict(copies, assign=True)
    deep.tie_weights()
    for place, part in deep.named_modules():
        old = model.get_submodule(source_name(place, keep))
        for key, value in [*part.named_buffers(recurse=False), *vars(part).items()]:
            if isinstance(value, Tensor) and value.is_meta:  # what no checkpoint holds, such as rotary frequencies
                setattr(part, key, getattr(old, key))
    deep.eval()
    return deep


# --- channels that were left out


def regrow(model: PreTrainedModel, layout: Layout, _num_blocks: int, seed: int) -> PreTrainedModel:
    """Give every MLP its full width by channels with small random weights in and zero out: the function is the same."""
    return _widened(model, layout, seed, split_kept=False)


def split(model: PreTrainedModel, layout: Layout, _num_blocks: int, seed: int) -> PreTrainedModel:
    """Give every MLP its full width by nearly equal copies of its channels, which share the outgoing weights."""
    return _widened(model, layout, seed, split_kept=True)


@torch.no_grad()
def _widened(model: PreTrainedModel, layout: Layout, seed: int, *, split_kept: bool) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for block, part, num_channels in _narrow_mlps(model, layout):
        _widen(block, part, num_channels, generator, split_kept)
    return model


def _widen(block: nn.Module, part: Part, num_channels: int, generator: torch.Generator, split_kept: bool) -> None:
    num_kept = part.num_channels
    source = torch.arange(num_channels) % num_kept
    share_C = 1 / torch.bincount(source)[source] if split_kept else (torch.arange(num_channels) < num_kept).float()
    before = [(incoming(block, part, e), outgoing_weight(block, part, e)) for e in range(part.num_experts)]
    resize_mlp(block, part, num_channels)
    wide = resized(part, num_channels)
    for number, (old_in, old_out_DK) in enumerate(before):
        for (weight, bias), (new_weight, new_bias) in zip(old_in, incoming(block, wide, number), strict=True):
            new = torch.randn(num_channels, weight.shape[-1], generator=generator).to(weight) * weight.std()
            grown = weight[source] + _NOISE * new if split_kept else new
            grown[:num_kept] = weight
            new_weight.copy_(grown)
            if bias is not None and new_bias is not None:
                new_bias.copy_(bias[source])
                if not split_kept:
                    new_bias[num_kept:] = 0
        outgoing_weight(block, wide, number).copy_(old_out_DK[:, source] * share_C.to(old_out_DK))


def _narrow_mlps(model: PreTrainedModel, layout: Layout) -> list[tuple[nn.Module, Part, int]]:
    """Return the middle's MLPs that are narrower than those of the ends, and the width that these have.

    An MLP of the same place and kind in a block of the ends says how wide it was: the nearest end's that has one.
    """
    ends = [name for name in reversed(layout.blocks) if not name.startswith("middle.")]
    wide: dict[str, int] = {}
    for canonical in ends:
        for part in _parts(model.get_submodule(layout.blocks[canonical])):
            wide.setdefault(_kind(part), part.num_channels)
    found = []
    for canonical, module in layout.blocks.items():
        if canonical.startswith("middle."):
            block = model.get_submodule(module)
            for part in _parts(block):
                if part.num_channels < wide.get(_kind(part), 0):
                    found.append((block, part, wide[_kind(part)]))
    return found


def _parts(block: nn.Module) -> tuple[Part, ...]:
    """Return the MLPs of a block; none where it has none that could have been narrowed."""
    try:
        return find_mlps(block)
    except UnsupportedModel:
        return ()


def _kind(part: Part) -> str:
    return f"{type(part).__name__} {part.place}"


_REFILLS: dict[str, Refill] = {
    "duplicate": duplicate,
    "interpolate": interpolate,
    "regrow": regrow,
    "split": split,
}
