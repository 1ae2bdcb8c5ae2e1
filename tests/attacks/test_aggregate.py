"""One bad client of eight, and what becomes of the round under every rule."""

from __future__ import annotations

import math

import pytest
import torch

from adapters.updates import LowRank, combined, norm, squared_distance
from server.aggregation.aggregate import Contribution, Rule, aggregate

SHAPES = {"top.0.q.weight": (16, 24), "top.0.up.weight": (20, 24), "top.0.norm.weight": (24,)}
Q, UP, NORM = SHAPES
RULES = {
    "mean": Rule(),
    "mean, clipped": Rule(max_norm=20.0),
    "trimmed mean": Rule(name="trimmed-mean", num_byzantine=1),
    "median": Rule(name="median", num_byzantine=1),
    "krum": Rule(name="krum", num_byzantine=1),
    "multi-krum": Rule(name="multi-krum", num_byzantine=1, keep=5),
}


def update(seed, *, shared=1.0, own=0.05):
    """What an honest client finds: the same direction for all, and a little of its own."""
    parts = {}
    for name, shape in SHAPES.items():
        draws = [torch.Generator().manual_seed(number) for number in (99, seed)]
        if len(shape) == 1:
            common, other = (torch.randn(shape, generator=draw) for draw in draws)
            parts[name] = 0.3 * (shared * common + own * other)
        else:
            common, other = (
                (torch.randn(2, shape[1], generator=d), 0.3 * torch.randn(shape[0], 2, generator=d)) for d in draws
            )
            parts[name] = LowRank(
                torch.cat([common[0], other[0]]), torch.cat([shared * common[1], own * other[1]], dim=1)
            )
    return parts


def multiplied(parts, factor):
    return combined([parts], [factor])


HONEST = [Contribution(f"client-{number}", update(number)) for number in range(7)]
CENTRE = combined([one.update for one in HONEST], [1 / 7] * 7)
OWN = update(7)
BAD = {
    "NaN": {**OWN, NORM: torch.full((24,), math.nan)},
    "one NaN in a factor": {**OWN, Q: LowRank(OWN[Q].a.index_fill(0, torch.tensor([1]), math.nan), OWN[Q].b)},
    "infinity": {**OWN, NORM: torch.full((24,), math.inf)},
    "an infinite product": {**OWN, Q: LowRank(OWN[Q].a * 1e30, OWN[Q].b * 1e30)},
    "1e30": {**OWN, NORM: torch.full((24,), 1e30)},
    "1e30 in a factor": {**OWN, Q: LowRank(OWN[Q].a * 1e30, OWN[Q].b)},
    "scaled by 100": multiplied(OWN, 100.0),
    "sign flip": multiplied(OWN, -1.0),
    "noise of the same size": multiplied(update(7, shared=0.0, own=1.0), 1.0),
    "a shape that would be broadcast": {**OWN, NORM: torch.ones(1)},
    "a turned matrix": {**OWN, Q: LowRank(OWN[Q].b.T.contiguous(), OWN[Q].a.T.contiguous())},
    "a missing name": {name: part for name, part in OWN.items() if name != UP},
    "one name more": {**OWN, "top.1.q.weight": OWN[Q]},
    "nothing": {},
    "another dtype": {**OWN, NORM: torch.ones(24).double()},
}
REFUSED = {
    "NaN", "one NaN in a factor", "infinity", "an infinite product", "a shape that would be broadcast",
    "a turned matrix", "a missing name", "one name more", "nothing", "another dtype",
}  # fmt: skip
# What becomes of the mean, and of the mean of clipped updates; every other rule stays among the honest updates.
DRAGGED = {
    "1e30": ("lost", "moved"),
    "1e30 in a factor": ("lost", "moved"),
    "scaled by 100": ("lost", "kept"),
    "sign flip": ("moved", "moved"),
    "noise of the same size": ("moved", "moved"),
}


def outcome(attack, rule, **more):
    given = [*HONEST[:3], Contribution("client-7", BAD[attack]), *HONEST[3:]]
    found = aggregate(given, RULES[rule], min_survivors=7, **more)
    distance = math.sqrt(squared_distance(found.update, CENTRE)) / norm(CENTRE)
    return found, "kept" if distance < 0.1 else "moved" if distance < 0.35 else "lost"


@pytest.mark.parametrize("attack", BAD)
@pytest.mark.parametrize("rule", RULES)
def test_one_bad_client_of_eight(attack, rule):
    found, verdict = outcome(attack, rule)
    if attack in REFUSED:
        assert "client-7" in found.left_out
        expected = "kept"
    elif rule.startswith("mean"):
        expected = DRAGGED[attack][rule == "mean, clipped"]
    else:
        expected = "kept"
    assert verdict == expected
    assert "client-7" not in found.used or "krum" not in rule
    for part in found.update.values():
        tensors = (part.a, part.b) if isinstance(part, LowRank) else (part,)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize("attack", sorted(REFUSED))
def test_the_reason_is_given_and_shapes_that_the_owner_states_say_the_same(attack):
    found, _ = outcome(attack, "mean")
    stated, _ = outcome(attack, "mean", shapes=SHAPES)
    assert found.left_out == stated.left_out
    assert found.left_out.keys() == {"client-7"}
    assert len(found.left_out["client-7"]) > 10


def test_what_lies_among_the_others_passes_every_rule():
    """No rule is a judge: an update like the honest ones is used, whatever it was made for."""
    given = [*HONEST, Contribution("client-7", OWN)]
    for name in ("mean", "trimmed mean", "median"):
        assert "client-7" in aggregate(given, RULES[name], min_survivors=8).used


def test_more_bad_clients_than_a_rule_was_told_of_can_win():
    given = [*HONEST[:4], *(Contribution(f"x-{number}", multiplied(update(50), 100.0)) for number in range(5))]
    found = aggregate(given, Rule(name="krum", num_byzantine=3), min_survivors=9)
    assert found.used[0].startswith("x-")
