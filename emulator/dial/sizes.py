"""The sizes that a method can make: shares of the middle that it keeps, and how each is typed. Imports no torch.

A method that is to be explored needs a line here; the others are made by ``--method`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

SIZES = (0.2, 0.33, 0.5, 0.67, 0.85)
"""Shares that are tried where none are named."""

FEWEST_BLOCKS = 2

METHOD_OF = {"choice": "drop", "channels": "width", "refit": "width"}
"""Settings of ``distill`` that one method alone takes."""


@dataclass(frozen=True)
class Shape:
    """What of the full model sizes follow from: the middle's blocks, and the channels of its first MLP."""

    num_middle: int
    num_channels: int
    multiple: int


@dataclass(frozen=True)
class Ladder:
    """How sizes of one method are made.

    Attributes:
        shares: every share that the method can make of a model, ascending.
        words: flags of ``distill`` that make one of them.
        carries_everywhere: whether every block can carry an adapter; otherwise the ends alone can.
    """

    shares: Callable[[Shape], Sequence[float]]
    words: Callable[[float, Shape], list[str]]
    carries_everywhere: bool


def _channels(shape: Shape) -> list[float]:
    step = shape.multiple if shape.num_channels >= shape.multiple else 1
    numbers = range(step, shape.num_channels, step)
    return [number / shape.num_channels for number in numbers] + [1.0]


def _blocks(shape: Shape) -> list[float]:
    return [number / shape.num_middle for number in range(FEWEST_BLOCKS, shape.num_middle + 1)]


LADDERS: Mapping[str, Ladder] = {
    "width": Ladder(_channels, lambda size, _: ["--method", "width", "--width", f"{size:.6g}"], True),
    "drop": Ladder(
        _blocks,
        lambda size, shape: ["--method", "drop", "--blocks", str(round(size * shape.num_middle))],
        False,
    ),
}


def nearest(method: str, wanted: Sequence[float], shape: Shape) -> list[float]:
    """Return the sizes that the method can make nearest to the wanted ones, ascending, each once."""
    shares = LADDERS[method].shares(shape)
    return sorted({min(shares, key=lambda share: (abs(share - size), share)) for size in wanted})


def between(method: str, low: float, high: float, shape: Shape) -> list[float]:
    """Return every size from `low` to `high` that the method can make, ascending."""
    return [share for share in LADDERS[method].shares(shape) if low <= share <= high]


def halfway(method: str, sizes: Sequence[float], shape: Shape) -> list[float]:
    """Return a size between every two neighbours of `sizes`, as near to their middle as the method can make one."""
    found = []
    for low, high in pairwise(sizes):
        inner = [share for share in between(method, low, high, shape) if low < share < high]
        if inner:
            found.append(min(inner, key=lambda share: (abs(share - (low + high) / 2), share)))
    return found
