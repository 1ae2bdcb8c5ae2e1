"""Shamir's secret sharing of 32-byte secrets: any `threshold` shares give the secret back, fewer say nothing of it.

The secret is the value at zero of a polynomial of degree ``threshold - 1`` over the integers modulo 2**256 + 297, the
smallest prime above every secret. The other coefficients come from the operating system. A share is the value at the
holder's place, a whole number from 1 on. Arithmetic is Python's and takes time that depends on the numbers: who can
time this process to the microsecond is not kept out.

Source: Shamir 1979, https://doi.org/10.1145/359168.359176.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from secrets import randbelow
from typing import Final

from offsite.errors import BadDigest, BadSchema, ConfigError, RunFailed

PRIME: Final = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
MAX_PLACE = 2**16


def split_secret(secret: bytes, threshold: int, places: Sequence[int]) -> dict[int, bytes]:
    """Return the share of each place, `SHARE_BYTES` long, big end first.

    Raises:
        ConfigError: when places repeat or are out of 1 to `MAX_PLACE`, or the threshold is not 1 to their number.
        ValueError: when the secret is not `SECRET_BYTES` long.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError("a secret of another length")
    if len(set(places)) != len(places) or not all(1 <= place <= MAX_PLACE for place in places):
        raise ConfigError("secret sharing: places repeat or are out of range")
    if not 1 <= threshold <= len(places):
        raise ConfigError(f"secret sharing: threshold {threshold} for {len(places)} places")
    coefficients = [int.from_bytes(secret, "big"), *(randbelow(PRIME) for _ in range(threshold - 1))]
    return {place: _value_at(coefficients, place).to_bytes(SHARE_BYTES, "big") for place in places}


def recover_secret(shares: Mapping[int, bytes], threshold: int, whose: str = "one party") -> bytes:
    """Return the secret that the shares, by place, agree upon.

    Args:
        whose: secret it is; named in an error.

    Raises:
        RunFailed: when there are fewer than `threshold`.
        BadSchema: when a place or a share is out of range.
        BadDigest: when shares beyond the threshold lie off the polynomial of the others, or it holds no secret.
            With exactly `threshold` shares a false one goes unseen unless the caller knows a commitment.
    """
    if len(shares) < max(threshold, 1):
        raise RunFailed(f"{len(shares)} shares of the secret of {whose}, {threshold} are needed")
    points = {place: read_share(share) for place, share in shares.items()}
    if not all(1 <= place <= MAX_PLACE for place in points):
        raise BadSchema(f"a share of {whose} stands at a place that is out of range")
    places = tuple(sorted(points))
    base, others = places[:threshold], places[threshold:]
    for place in others:
        if _interpolate(points, base, place) != points[place]:
            raise BadDigest(f"the shares of {whose} do not agree with each other")
    secret = _interpolate(points, base, 0)
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise BadDigest(f"the shares of {whose} agree upon what is not a secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def read_share(share: bytes) -> int:
    """Return the number of a share.

    Raises:
        BadSchema: when it has another length or is not below the prime.
    """
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise BadSchema("a share of a secret is out of range")
    return value


def _value_at(coefficients: Sequence[int], place: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % PRIME
    return value


def _interpolate(points: Mapping[int, int], places: tuple[int, ...], at: int) -> int:
    weights = _weights(places, at)
    return sum(weight * points[place] for weight, place in zip(weights, places, strict=True)) % PRIME


@lru_cache(maxsize=2048)  # the same places hold shares of every secret of a round; places are public
def _weights(places: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Return Lagrange's weights: what the value at each place counts for in the value at `at`."""
    found = []
    for place in places:
        above = below = 1
        for other in places:
            if other != place:
                above = above * (at - other) % PRIME
                below = below * (place - other) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(found)
