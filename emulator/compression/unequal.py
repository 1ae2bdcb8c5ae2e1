"""Widths that differ from block to block, and choices of channels that differ from package to package.

Imports no torch before it is needed, so that settings are checked before anything loads.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_STATED = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?:([0-9]*\.?[0-9]+)", re.ASCII)


def wider_blocks(stated: Sequence[str]) -> dict[int, float]:
    """Return the share of MLP channels by number of the full model's block, from ``2-8:0.67`` and the like.

    Raises:
        ValueError: what is not of that form, a range that runs backwards, a share that is not above 0 and at most 1,
            or a block that is named twice.
    """
    found: dict[int, float] = {}
    for one in stated:
        match = _STATED.fullmatch(one)
        if match is None:
            raise ValueError(f"{one[:40]!r} is not of the form FIRST-LAST:SHARE, as 2-8:0.67")
        first, share = int(match[1]), float(match[3])
        last = first if match[2] is None else int(match[2])
        if last < first or not 0 < share <= 1:
            raise ValueError(f"{one!r}: expected FIRST at most LAST and a share above 0 and at most 1")
        if repeated := sorted(found.keys() & range(first, last + 1)):
            raise ValueError(f"{one!r}: block {repeated[0]} is named already")
        found.update(dict.fromkeys(range(first, last + 1), share))
    return found


def favour(variant: int, noise: float, place: str, num_channels: int) -> Tensor:
    """Return (C,) float64, what the cost of leaving out each channel is multiplied by in this variant.

    The logarithms are normal with a standard deviation of `noise`, drawn anew for every MLP: by the variant's number
    and the MLP's `place` alone, so that the same ones come again after a broken run.
    """
    import torch

    digest = hashlib.sha256(f"offsite/v1/variant/{variant}/{place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return (noise * torch.randn(num_channels, dtype=torch.float64, generator=generator)).exp()
