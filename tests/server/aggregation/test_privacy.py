"""Private rounds: what one client can change, the noise, the coins, and what rounds spend."""

from __future__ import annotations

import hashlib
import math
import random

import pytest
import torch
from scipy import stats

from adapters.updates import LowRank, dense, norm
from offsite.audits import noise
from offsite.audits.accounting import Mechanism, pld_epsilon
from offsite.errors import ConfigError, RunFailed
from server.aggregation.aggregate import Contribution
from server.aggregation.privacy import (
    CentralPrivacy,
    aggregate_privately,
    calibrate,
    drawn,
    privatise,
    require_delta,
    spent,
)

SHAPES = {"a": (6, 4), "b": (5,)}
CLIP, SIGMA, DIVISOR = 0.5, 1.0, 4.0
SETTINGS = {"clip": CLIP, "sigma": SIGMA, "divisor": DIVISOR}


@pytest.fixture
def repeated(monkeypatch):
    """Start the same noise anew: call it before each of two runs whose difference is of interest."""

    def start():
        asked = []

        def entropy(num_bytes):
            asked.append(num_bytes)
            return hashlib.shake_256(str(len(asked)).encode()).digest(num_bytes)

        monkeypatch.setattr(noise, "_entropy", entropy)
        return asked

    return start


def client(seed, size=1.0):
    draw = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def vector(tensors):
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def changed(**tensors):
    return {**client(0), **tensors}


SENT = {
    "more than the norm": client(1, 100.0),
    "1e30": client(1, 1e30),
    "the norm": {name: tensor * CLIP / vector(client(2)).norm() for name, tensor in client(2).items()},
    "less than the norm": client(3, 0.01),
    "zeros": client(4, 0.0),
    "NaN": changed(b=torch.full((5,), math.nan)),
    "infinity": changed(a=torch.full((6, 4), math.inf)),
    "squares that overflow": changed(b=torch.full((5,), 1e200, dtype=torch.float64)),
    "a shape that would be broadcast": changed(b=torch.ones(1)),
    "whole numbers": changed(b=torch.ones(5, dtype=torch.int64)),
    "one name less": {"a": torch.ones(6, 4)},
    "one name more": changed(c=torch.ones(1)),
    "nothing": {},
}
COUNTED = {"more than the norm", "1e30", "the norm", "less than the norm", "zeros"}


@pytest.mark.parametrize("others", [0, 1, 5])
@pytest.mark.parametrize("sent", SENT)
def test_row_29_one_client_changes_the_sum_by_at_most_the_norm(repeated, sent, others):
    """Whatever it sends. Nothing else differs: not the divisor, the noise, or what is asked of the system."""
    among = [client(10 + number, 3.0) for number in range(others)]
    asked_without = repeated()
    without, zero = privatise(among, SHAPES, **SETTINGS)
    assert zero == {}
    for place in {0, others}:
        asked = repeated()
        found, zero = privatise([*among[:place], SENT[sent], *among[place:]], SHAPES, **SETTINGS)
        assert asked == asked_without
        difference = float((vector(found) - vector(without)).norm()) * DIVISOR
        assert difference <= CLIP * (1 + 1e-5)
        assert zero.keys() == (set() if sent in COUNTED else {place})
        if sent in {"more than the norm", "1e30", "the norm"}:
            assert difference == pytest.approx(CLIP, rel=1e-5)
        elif sent not in COUNTED:
            assert difference == 0


def test_the_mean_is_that_of_clipped_vectors(repeated):
    given = [client(number, size) for number, size in enumerate((0.01, 1.0, 7.0))]
    repeated()
    found, _ = privatise(given, SHAPES, **SETTINGS)
    repeated()
    silence, _ = privatise([], SHAPES, **SETTINGS)
    sums = sum(vector(one) * min(1, CLIP / float(vector(one).norm())) for one in given)
    torch.testing.assert_close(vector(found) - vector(silence), sums / DIVISOR, rtol=1e-4, atol=1e-6)


def test_a_round_that_nobody_came_to_is_noise_of_the_stated_size(monkeypatch):
    monkeypatch.setattr(noise, "_entropy", random.Random(5).randbytes)
    found, _ = privatise([], {"a": (200, 500), "b": (7,)}, clip=0.5, sigma=3.0, divisor=6.0)
    assert found["a"].dtype == torch.float32
    assert stats.kstest(found["a"].flatten().numpy() * 6 / (3 * 0.5), "norm").pvalue > 1e-3
    assert found["a"].std() == pytest.approx(0.25, rel=0.01)
    halves = found["a"].flatten().split(50_000)
    assert stats.pearsonr(*(half.numpy() for half in halves)).statistic == pytest.approx(0, abs=0.02)


def test_no_seed_leads_to_the_noise_and_no_two_rounds_share_it():
    given = [client(1)]
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        runs.append(vector(privatise(given, SHAPES, **SETTINGS)[0]))
    assert not torch.equal(*runs)


def test_clients_are_gone_through_once():
    found, zero = privatise((client(number) for number in range(3)), SHAPES, **SETTINGS)
    assert found.keys() == SHAPES.keys()
    assert zero == {}


@pytest.mark.parametrize(
    "changes",
    [{"clip": 0.0}, {"clip": math.nan}, {"clip": math.inf}, {"sigma": 0.0}, {"sigma": 0.1}, {"sigma": math.nan},
     {"divisor": 0.0}, {"divisor": -1.0}],
)  # fmt: skip
def test_settings_that_give_no_guarantee(changes):
    with pytest.raises(ConfigError, match="a private round needs it"):
        privatise([], SHAPES, **{**SETTINGS, **changes})
    renamed = {"num_clients" if name == "divisor" else name: value for name, value in changes.items()}
    with pytest.raises(ValueError, match="validation error"):
        CentralPrivacy(**{"clip": 1.0, "sigma": 1.0, "num_clients": 8, **renamed})


def test_noise_that_float32_does_not_hold():
    with pytest.raises(RunFailed, match="not finite"):
        privatise([], SHAPES, clip=1e39, sigma=2.0, divisor=1.0)


# Updates, and factors with a frozen A


def contribution(number, *, size=1.0, weight=1.0):
    draw = torch.Generator().manual_seed(number)
    low = LowRank(torch.randn(2, 4, generator=draw), size * torch.randn(6, 2, generator=draw))
    return Contribution(f"client-{number}", {"a": low, "b": torch.randn(5, generator=draw)}, weight)


def test_updates_are_made_dense_and_the_order_does_not_matter(repeated):
    privacy = CentralPrivacy(clip=2.0, sigma=1.0, rate=0.5, num_clients=8)
    assert privacy.divisor == 4
    broken = Contribution("client-1", {"a": torch.full((6, 4), math.nan), "b": torch.ones(5)})
    given = [contribution(2), broken, contribution(0), contribution(3, size=1e-3)]
    repeated()
    found = aggregate_privately(given, privacy, SHAPES)
    repeated()
    again = aggregate_privately(given[::-1], privacy, SHAPES)
    assert torch.equal(vector(found.update), vector(again.update))
    assert found.used == again.used == ("client-0", "client-2", "client-3")
    assert found.left_out == {"client-1": "its norm is not finite"}
    repeated()
    by_name = sorted(given, key=lambda one: one.client)
    whole = [{name: dense(part) for name, part in one.update.items()} for one in by_name]
    plain, _ = privatise(whole, SHAPES, clip=2.0, sigma=1.0, divisor=4.0)
    assert torch.equal(vector(plain), vector(found.update))
    assert found.figures["norm_update"] == pytest.approx(norm(found.update))
    assert set(found.figures) == {"clip", "sigma", "rate", "num_clients", "divisor", "norm_update"}


def test_with_a_frozen_a_the_noise_is_on_b_alone(repeated):
    """All clients share A, so the mean of B @ A is (the mean of B) @ A, and the noise has B's few dimensions."""
    a = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    factors = [torch.randn(6, 2, generator=torch.Generator().manual_seed(10 + number)) for number in range(3)]
    settings = {"clip": 100.0, "sigma": 0.2, "divisor": 3.0}
    repeated()
    found, _ = privatise([{"b": b} for b in factors], {"b": (6, 2)}, **settings)
    repeated()
    silence, _ = privatise([], {"b": (6, 2)}, **settings)
    mean = sum(b @ a for b in factors) / 3
    torch.testing.assert_close((found["b"] - silence["b"]) @ a, mean, rtol=1e-3, atol=1e-4)


def test_contributions_that_are_refused():
    privacy = CentralPrivacy(clip=1.0, sigma=1.0, num_clients=2)
    for given in (
        [contribution(0, weight=0.5), contribution(1, weight=0.5)],
        [contribution(0), contribution(0)],
        [contribution(0), contribution(1), contribution(2)],
    ):
        with pytest.raises(ConfigError):
            aggregate_privately(given, privacy, SHAPES)


# Coins and accounting


def test_every_client_has_a_coin_of_its_own(monkeypatch):
    monkeypatch.setattr(noise, "_entropy", random.Random(2).randbytes)
    clients = [f"c{number}" for number in range(40)]
    rounds = [drawn(clients, 0.25) for _ in range(400)]
    assert stats.kstest([len(one) for one in rounds], stats.binom(40, 0.25).cdf).pvalue > 1e-9
    counts = [sum(client in one for one in rounds) for client in clients]
    assert stats.chisquare(counts).pvalue > 1e-3
    assert drawn(clients, 1.0) == tuple(clients)
    assert drawn([], 0.5) == ()


@pytest.mark.parametrize(("clients", "rate"), [(["a", "a"], 0.5), (["a"], 0.0), (["a"], 1.1), (["a"], math.nan)])
def test_draws_that_are_refused(clients, rate):
    with pytest.raises(ConfigError):
        drawn(clients, rate)


def test_rounds_add_up():
    found = spent(10, 2.0, 1.0, 1e-5)
    mu = math.sqrt(10) / 2.0  # ten rounds that take everybody are one Gaussian mechanism, Balle and Wang 2018
    cdf = stats.norm.cdf
    delta = cdf(mu / 2 - found.epsilon / mu) - math.exp(found.epsilon) * cdf(-mu / 2 - found.epsilon / mu)
    assert delta == pytest.approx(1e-5, rel=0.02)
    sampled = spent(10, 2.0, 0.1, 1e-5)
    assert sampled.epsilon == pld_epsilon([Mechanism(2.0, 0.1, 10)], 1e-5) < found.epsilon / 3
    with pytest.raises(ConfigError, match="at least 1"):
        spent(0, 2.0, 1.0, 1e-5)
    with pytest.raises(ConfigError, match="no meaningful guarantee"):
        spent(1, 0.1, 1.0, 1e-5)


def test_the_noise_for_an_epsilon():
    sigma = calibrate(4.0, 1e-3, rate=1.0, rounds=2)
    assert 3.9 < spent(2, sigma, 1.0, 1e-3).epsilon <= 4.0


def test_delta_is_bounded_by_the_number_of_clients():
    require_delta(0.1, 8)
    for delta in (0.11, 0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="8 clients"):
            require_delta(delta, 8)
