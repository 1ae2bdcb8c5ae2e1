"""Chance from the operating system: of the stated distribution, and led to by no seed."""

from __future__ import annotations

import itertools
import os
import random

import pytest
import torch
from scipy import stats

from offsite.audits import noise
from offsite.audits.noise import gaussian, uniform, unknown_seed


def test_the_noise_is_gaussian_by_kolmogorov_and_smirnov(monkeypatch):
    monkeypatch.setattr(noise, "_entropy", random.Random(1).randbytes)
    drawn = gaussian(200_001)
    assert drawn.shape == (200_001,)
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3
    assert float(drawn[:100_000].dot(drawn[100_000:200_000])) / 100_000 == pytest.approx(0, abs=0.02)  # pairs
    assert stats.kstest(uniform(100_000).numpy(), "uniform").pvalue > 1e-3
    assert gaussian(0).shape == uniform(0).shape == (0,)


def test_long_noise_is_drawn_in_pieces_that_differ(monkeypatch):
    monkeypatch.setattr(noise, "_NOISE_AT_ONCE", 100)
    drawn = gaussian(250)
    assert drawn.shape == (250,)
    assert len(set(drawn.tolist())) == 250


def test_the_smallest_and_largest_bytes_give_numbers(monkeypatch):
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr(noise, "_entropy", lambda num, byte=byte: byte * num)
        assert bool((uniform(3) < 1).all())
        assert bool((uniform(3) >= 0).all())
        assert bool(torch.isfinite(gaussian(3)).all())


def test_entropy_is_the_operating_systems():
    assert len(noise._entropy(5)) == 5
    assert noise._entropy(16) != noise._entropy(16)
    torch.manual_seed(0)
    random.seed(0)
    first = gaussian(3)
    torch.manual_seed(0)
    random.seed(0)
    assert not torch.equal(first, gaussian(3))
    assert os.urandom.__module__ == "posix"
    assert len(set(itertools.chain(first.tolist(), gaussian(3).tolist()))) == 6
    assert 0 <= unknown_seed() < 2**63
    assert unknown_seed() != unknown_seed()
