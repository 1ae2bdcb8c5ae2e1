from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite.errors import BadDigest, BadSchema, ConfigError, RunFailed
from offsite.secagg import shamir
from offsite.secagg.shamir import PRIME, SHARE_BYTES, recover_secret, split_secret

SECRET = bytes(range(32))
TOP = b"\xff" * 32


def probably_prime(number, rounds=24):
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    source = random.Random(0)
    for _ in range(rounds):
        power = pow(source.randrange(2, number - 1), odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def test_the_modulus_is_the_smallest_prime_above_every_secret():
    assert probably_prime(PRIME)
    assert not any(probably_prime(2**256 + offset) for offset in range(1, 297, 2))


@pytest.mark.parametrize(("num", "threshold"), [(1, 1), (2, 2), (5, 3), (6, 6), (7, 1)])
@pytest.mark.parametrize("secret", [SECRET, TOP, bytes(32)])
def test_any_threshold_of_the_shares_give_the_secret_back(num, threshold, secret):
    places = [3 * place + 2 for place in range(num)]
    shares = split_secret(secret, threshold, places)
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    for size in range(threshold, num + 1):
        for chosen in itertools.combinations(places, size):
            assert recover_secret({place: shares[place] for place in reversed(chosen)}, threshold) == secret


def test_fewer_are_refused():
    shares = split_secret(SECRET, 3, [1, 2, 3, 4])
    for size in range(3):
        with pytest.raises(RunFailed, match=f"{size} shares of the secret of one party, 3 are needed"):
            recover_secret(dict(itertools.islice(shares.items(), size)), 3)


def with_share(places, share):
    shares = split_secret(SECRET, 3, [1, 2, 3, 4, 5])
    return {**shares, **dict.fromkeys(places, share)}


@pytest.mark.parametrize(
    ("shares", "error"),
    [
        (with_share([2], PRIME.to_bytes(33, "big")), BadSchema),
        (with_share([2], b"\xff" * 33), BadSchema),
        (with_share([2], b"\0" * 32), BadSchema),
        (with_share([2], b"\0" * 34), BadSchema),
        (with_share([2], b""), BadSchema),
        (with_share([0], b"\0" * 33), BadSchema),
        (with_share([-1], b"\0" * 33), BadSchema),
        (with_share([2**16 + 1], b"\0" * 33), BadSchema),
        (with_share([1], b"\0" * 33), BadDigest),
        (with_share([5], b"\0" * 33), BadDigest),
    ],
)
def test_unsound_shares(shares, error):
    with pytest.raises(error):
        recover_secret(shares, 3)


def test_what_is_larger_than_a_secret_is_refused():
    value = (2**256 + 1).to_bytes(33, "big")
    with pytest.raises(BadDigest, match="what is not a secret"):
        recover_secret({1: value}, 1)


@pytest.mark.parametrize(
    ("threshold", "places"), [(0, [1]), (3, [1, 2]), (1, [1, 1]), (1, [0]), (1, [-1]), (1, [2**16 + 1]), (1, [])]
)
def test_wrong_settings(threshold, places):
    with pytest.raises(ConfigError, match=r"^secret sharing: "):
        split_secret(SECRET, threshold, places)


def test_a_secret_has_32_bytes():
    with pytest.raises(ValueError, match="another length"):
        split_secret(b"short", 1, [1])


@settings(deadline=None, max_examples=40)
@given(st.binary(min_size=32, max_size=32), st.integers(2, 6))
def test_one_share_fewer_than_the_threshold_fits_every_secret(other, threshold):
    """Whatever t - 1 shares are known, there is one last share for each secret: none is ruled out."""
    shares = split_secret(SECRET, threshold, range(1, threshold + 1))
    known = {place: shares[place] for place in range(1, threshold)}
    points = {place: int.from_bytes(share, "big") for place, share in known.items()}
    points[0] = int.from_bytes(other, "big")
    last = shamir._interpolate(points, tuple(points), threshold)
    assert recover_secret({**known, threshold: last.to_bytes(33, "big")}, threshold) == other


def test_shares_below_the_threshold_are_distributed_alike_whatever_the_secret(monkeypatch):
    """Fixed source of coefficients, so this passes or fails for good: chi-square on 255 degrees, p = 0.001 at 330.5."""
    monkeypatch.setattr(shamir, "randbelow", random.Random(7).randrange)
    counts = []
    for secret in (bytes(32), TOP):
        joined = b""
        for _ in range(200):
            shares = split_secret(secret, 3, [1, 2, 3, 4, 5])
            joined += shares[2][1:] + shares[5][1:]  # the first byte is all but always zero
        counts.append(Counter(joined))
        expected = len(joined) / 256
        assert sum((counts[-1][byte] - expected) ** 2 / expected for byte in range(256)) < 330.5
    first, second = counts
    assert sum((first[byte] - second[byte]) ** 2 / (first[byte] + second[byte]) for byte in range(256)) < 330.5


def test_coefficients_are_drawn_anew(monkeypatch):
    one, two = (split_secret(SECRET, 2, [1, 2]) for _ in range(2))
    assert one[1] != two[1]
    drawn = []
    monkeypatch.setattr(shamir, "randbelow", lambda below: drawn.append(below) or 5)
    split_secret(SECRET, 3, [1, 2, 3])
    assert drawn == [PRIME, PRIME]
