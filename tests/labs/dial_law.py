"""A made-up world for the dial: what emulators of any size come to, by a law that tests can work out."""

from __future__ import annotations

import math

from offsite.digests import sha256_bytes

ZERO_SHOT, LORA_FULL = 13.0, 8.5
BASE = sha256_bytes(b"base")


def kl_of(size: float) -> float:
    """The law of the made-up world: how far an emulator is from the model."""
    return 2 * (1 - size) ** 2


def tuned_of(size: float) -> float:
    """Its perplexity once it is tuned: the logarithm is straight in the distance."""
    return ZERO_SHOT * math.exp(0.05 + 0.5 * kl_of(size))


def recovery_of(size: float, bend: float = 0.0) -> float:
    """The prototypes' line, and a bend away from it."""
    return 0.82 - 0.36 * math.log(tuned_of(size) / ZERO_SHOT) + bend


def plugged_of(size: float, bend: float = 0.0) -> float:
    return ZERO_SHOT - recovery_of(size, bend) * (ZERO_SHOT - LORA_FULL)


def bytes_of(size: float) -> int:
    return round(50e6 + 200e6 * size)
