"""Coins and Gaussian noise drawn from the operating system: there is no seed that would lead to them.

Whoever knows the noise of a private release can take it off again, so nothing here can be reproduced, stored or
resumed. Tests that need one outcome replace `_entropy`.

Source: noise in float64 before rounding, against arXiv:2112.05307.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

_MANTISSA = 53
_NOISE_AT_ONCE = 1 << 20


def uniform(num: int) -> Tensor:
    """Return numbers of [0, 1) from the operating system, (num,) float64, each a multiple of 2^-53."""
    if num == 0:
        return torch.zeros(0, dtype=torch.float64)
    raw = torch.frombuffer(bytearray(_entropy(8 * num)), dtype=torch.int64)
    return ((raw >> (64 - _MANTISSA)) & ((1 << _MANTISSA) - 1)).double() * 2.0**-_MANTISSA


def gaussian(num: int) -> Tensor:
    """Return standard normal numbers from the operating system, (num,) float64 on the CPU, by Box and Muller."""
    parts = [_gaussian(min(_NOISE_AT_ONCE, num - first)) for first in range(0, num, _NOISE_AT_ONCE)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def unknown_seed() -> int:
    """Return 63 bits from the operating system, for a generator whose draws are to be known to nobody."""
    return int.from_bytes(_entropy(8), "big") >> 1


def _gaussian(num: int) -> Tensor:
    half = (num + 1) // 2
    radius = (-2 * (1 - uniform(half)).log()).sqrt()  # 1 - [0, 1) is never zero
    angle = 2 * math.pi * uniform(half)
    return torch.cat((radius * angle.cos(), radius * angle.sin()))[:num]


def _entropy(num_bytes: int) -> bytes:
    return os.urandom(num_bytes)
