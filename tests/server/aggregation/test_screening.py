"""The screening signal: what its figures are, whom it flags, and what it can't be used on."""

from __future__ import annotations

import math

import pytest
import torch

from adapters.updates import LowRank, combined, dense, norm
from offsite.errors import ConfigError, NotFinite, WrongNames, WrongShape
from server.aggregation.aggregate import Contribution
from server.aggregation.screening import concentration, robust_scores, screen


def update(seed, *, own=0.3):
    draws = [torch.Generator().manual_seed(number) for number in (99, seed)]
    common, other = ((torch.randn(4, 24, generator=draw), torch.randn(16, 4, generator=draw)) for draw in draws)
    low = LowRank(torch.cat([common[0], other[0]]), torch.cat([common[1], own * other[1]], dim=1))
    vectors = [torch.randn(12, generator=draw) for draw in draws]
    return {"top.0.q.weight": low, "top.0.norm.weight": vectors[0] + own * vectors[1]}


def contributions(**changed):
    found = {f"client-{number}": update(number) for number in range(8)}
    return [Contribution(client, one) for client, one in {**found, **changed}.items()]


def flat(one):
    return torch.cat([dense(part).double().flatten() for part in one.values()])


def test_the_figures_are_those_of_dense_vectors():
    given = contributions()
    found = screen(given).signals
    vectors = {one.client: flat(one.update) for one in given}
    middle = torch.stack(list(vectors.values())).quantile(0.5, dim=0)
    for one in given:
        vector = vectors[one.client]
        others = torch.stack([other for client, other in vectors.items() if client != one.client]).mean(0)
        figures = found[one.client]
        assert figures["distance"] == pytest.approx(math.log((vector - middle).norm() / middle.norm()), rel=1e-4)
        assert figures["cosine"] == pytest.approx(float(torch.cosine_similarity(vector, others, dim=0)), rel=1e-5)
        assert figures["size"] == pytest.approx(math.log(norm(one.update)), rel=1e-9)
        sizes = torch.linalg.svdvals(dense(one.update["top.0.q.weight"]).double())
        expected = float(sizes[0].square() / sizes.square().sum())
        assert figures["concentration"] == pytest.approx(expected, rel=1e-5)


def test_honest_clients_of_one_kind_are_not_flagged_and_order_does_not_matter():
    given = contributions()
    assert screen(given).flags == {}
    assert screen(given[::-1]) == screen(given)


SPIKE = LowRank(100 * torch.ones(1, 24), torch.ones(16, 1))
BAD = {
    "scaled up": (combined([update(7)], [8.0]), "size"),
    "sign flip": (combined([update(7)], [-1.0]), "cosine"),
    "another direction": (update(7, own=3.0), "distance"),
    "a spike of rank one": ({**update(7), "top.0.q.weight": SPIKE}, "concentration"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_stands_out_is_flagged_with_what_does(name):
    bad, signal = BAD[name]
    found = screen(contributions(**{"client-7": bad}))
    assert found.flags.keys() == {"client-7"}
    assert signal in found.flags["client-7"]
    assert found.scores["client-7"][signal] > 3.5
    assert screen(contributions(**{"client-7": bad}), limit=1e6).flags == {}


def test_what_lies_among_the_others_is_not():
    """Whatever it does: nothing here knows what an update is for."""
    assert screen(contributions(**{"client-7": update(50)})).flags == {}


def test_updates_of_nothing():
    nothing = {"top.0.q.weight": torch.zeros(16, 24), "top.0.norm.weight": torch.zeros(12)}
    assert concentration(nothing) == 0
    assert "cosine" in screen(contributions(**{"client-7": nothing})).flags["client-7"]
    same = screen([Contribution(str(number), nothing) for number in range(5)])
    assert same.flags == {}
    assert all(math.isfinite(score) for one in same.scores.values() for score in one.values())


def test_a_spread_of_next_to_nothing_accuses_nobody():
    values = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.001}
    assert max(robust_scores(values, 0.05).values()) == pytest.approx(0.02)
    values["d"] = 2.0
    assert robust_scores(values, 0.05)["d"] == pytest.approx(20)


def test_what_is_refused():
    given = contributions()
    for wrong in (given[:3], [*given, given[0]]):
        with pytest.raises(ConfigError, match="at least 4, each once"):
            screen(wrong)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="not positive"):
            screen(given, limit=limit)
    q = given[0].update["top.0.q.weight"]
    for change, error in (
        ({"top.0.q.weight": q, "top.0.norm.weight": torch.full((12,), math.nan)}, NotFinite),
        ({"top.0.q.weight": q}, WrongNames),
        ({"top.0.q.weight": q, "top.0.norm.weight": torch.ones(1)}, WrongShape),
    ):
        with pytest.raises(error):
            screen(contributions(**{"client-7": change}))
