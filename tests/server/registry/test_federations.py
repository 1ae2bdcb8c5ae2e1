"""What the registry knows of federations: begun once, asked in one piece, finished once."""

from __future__ import annotations

import pytest

from offsite.errors import ConfigError, Replayed
from server.registry.federations import FederationStore, first_asked, known_id

SETTINGS = {"rounds": 3, "steps": 40, "jobs": ["1", "2"]}
ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64


@pytest.fixture
def jobs(exchange):
    return {name: exchange.job().job_id for name in ("anna", "bert")}


@pytest.fixture
def begin(exchange):
    def begin(name="federation", **changes):
        return FederationStore(exchange.registry, name, {**SETTINGS, **changes})

    return begin


def test_begun_once(begin, exchange):
    assert known_id(exchange.registry, "federation") is None
    first = begin()
    assert begin().id == first.id == known_id(exchange.registry, "federation")
    assert begin("another").id != first.id


def test_other_settings_are_another_run(begin):
    begin()
    with pytest.raises(ConfigError, match="begun with other settings: rounds, steps differ"):
        begin(rounds=4, steps=41)
    with pytest.raises(ConfigError, match="begun with other settings: jobs differ"):
        begin(jobs=["1", "2", "3"])
    with pytest.raises(ConfigError, match="begun with other settings: mu differ"):
        begin(mu=1)


def test_a_client_may_leave(begin):
    first = begin()
    assert begin(jobs=["2"]).id == first.id
    assert begin().id == first.id


def test_a_round_is_asked_of_all_or_of_none(begin, jobs, exchange):
    store = begin()
    assert store.asked(jobs, 1) == {}
    assert first_asked(exchange.registry, jobs["anna"]) is None
    store.ask(jobs, {"anna": ONE}, 1)
    store.ask(jobs, {"anna": ONE}, 1)
    with pytest.raises(Replayed, match="round 1 was asked of client anna with another content"):
        store.ask(jobs, {"bert": ONE, "anna": TWO}, 1)
    assert store.asked(jobs, 1) == {"anna": ONE}
    assert store.asked({"bert": jobs["bert"]}, 1) == {}
    store.ask(jobs, {"bert": TWO, "anna": TWO}, 2)
    assert store.asked(jobs, 2) == {"anna": TWO, "bert": TWO}
    assert first_asked(exchange.registry, jobs["anna"]) == ONE
    assert exchange.registry.asked(jobs["bert"], 2) == TWO
    assert exchange.registry.asked(jobs["bert"], 1) is None


def test_a_round_is_finished_once(begin):
    store = begin()
    assert store.finished() == []
    store.finish(1, {"used": ["anna"]})
    store.finish(1, {"used": ["anna"]})
    with pytest.raises(Replayed, match="was finished otherwise"):
        store.finish(1, {"used": ["bert"]})
    with pytest.raises(ValueError, match="JSON"):
        store.finish(2, {"norm": float("nan")})
    store.finish(2, {"used": []})
    assert [(one.round, one.content) for one in begin().finished()] == [(1, {"used": ["anna"]}), (2, {"used": []})]
    assert begin("another").finished() == []


def test_every_step_is_in_the_log(begin, jobs, exchange):
    store = begin()
    store.ask(jobs, {"anna": ONE}, 1)
    store.finish(1, {})
    exchange.registry.verify_log()
    log = (exchange.registry_folder / "registry.log").read_text()
    assert [event in log for event in ("federation-begun", "round-asked", "round-finished")] == [True] * 3


def test_a_registry_that_was_opened_before_goes_on(begin, exchange):
    first = begin().id
    exchange.registry.close()
    with exchange.opened() as registry:
        assert FederationStore(registry, "federation", SETTINGS).id == first


def test_one_federation_at_a_time(exchange):
    with exchange.registry.one_federation() as mine:
        assert mine
        with exchange.opened() as other, other.one_federation() as also:
            assert not also
    with exchange.registry.one_federation() as again:
        assert again
