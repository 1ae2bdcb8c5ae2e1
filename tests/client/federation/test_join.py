"""Taking part over an exchange: the newest round, once, until the last; here over the outbox, without a network."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

import client.federation.join as module
from client.federation.config import JoinConfig
from offsite.config import build
from offsite.errors import ArtefactError, PolicyError, RunFailed, WrongBinding
from offsite.exchange.packing import pack
from offsite.exchange.wire import Offers
from offsite.keys.trust import TrustStore
from server.exchange.outbox import Outbox


class Line:
    """An exchange without a network: what lies in the outbox is offered, what is handed in is taken in at once."""

    def __init__(self, federated, federation, monkeypatch):
        self.federated, self.federation = federated, federation
        self.key, self.number, self.handed, self.fetched = federated.key("anna"), 1, [], 0
        self.before_fetch = lambda: None
        self.outbox = Outbox(federated.outbox, federated.member("anna").job.owner)
        monkeypatch.setattr(module, "fetch_offer", self.fetch)
        monkeypatch.setattr(module, "hand_in", self.hand_in)
        federation.ask(1)

    def ask(self, _method, _path, _cls):
        return Offers(offers=tuple(offer.summary() for offer in self.outbox.offers(self.key)))

    def fetch(self, _exchange, offer, out, *, trust, own, limit_bytes):
        assert own == self.key
        self.before_fetch()
        found = [one for one in self.outbox.offers(self.key) if one.digest == offer.digest]
        if not found:
            raise ArtefactError("the exchange refuses: not found")
        self.fetched += 1
        shutil.copytree(found[0].folder, out)

    def hand_in(self, _exchange, sealed, *, verdict_seconds):
        verdict = self.federation.take_in(pack(sealed))
        self.handed.append(sealed.parent.name)
        if self.key in self.federation.answers(self.number):
            self.federation.close_round(self.number, {})
            self.number += 1
            if self.number <= self.federation.config.rounds:
                self.federation.ask(self.number)
            else:
                self.federation.say_finished()
        return SimpleNamespace(state=verdict.state), 0

    def loop(self, **changes):
        config = self.config(**changes)
        return module._Loop(config, self.federated.member("anna"), self, TrustStore(config.keys))

    def config(self, **changes):
        stated = json.loads(self.federated.settings["anna"].read_text())
        quick = {"url": "http://127.0.0.1:1", "poll_seconds": 0.01, "idle_seconds": 0.3}
        return build(JoinConfig, flags={**stated, **quick, **changes})


@pytest.fixture
def line(make_federated, monkeypatch):
    federated = make_federated(min_clients=1)
    with federated.opened() as federation:
        yield Line(federated, federation, monkeypatch)


def test_every_round_is_answered_once_until_the_last(line):
    assert line.loop().run() == {1, 2, 3}
    assert line.handed == ["round-0001", "round-0002", "round-0003"]
    work = line.federated.member("anna").config.work
    assert list((work / "pulled").iterdir()) == []
    assert [one.content["used"] for one in line.federation.finished] == [[line.key]] * 3


def test_a_round_that_is_taken_back_while_it_is_fetched(line):
    def close_without_her():
        line.before_fetch = lambda: None
        asked = line.federation.ask(1)
        line.federation.take_in(pack(line.federated.answer("bert", asked[line.federated.key("bert")])))
        line.federation.close_round(1, {})
        line.number = 2
        line.federation.ask(2)

    line.before_fetch = close_without_her
    assert line.loop().run() == {2, 3}


def test_what_the_exchange_refuses_while_it_offers_it(line, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise WrongBinding("sealed by another party")

    monkeypatch.setattr(module, "fetch_offer", refuse)
    with pytest.raises(WrongBinding):
        line.loop().run()


def test_an_owner_who_asks_nothing(line):
    for path in line.federated.outbox.iterdir():
        shutil.rmtree(path)
    with pytest.raises(RunFailed, match="asked nothing for too long"):
        line.loop(idle_seconds=0.05).run()


def test_an_exchange_that_is_away_is_tried_again(line, monkeypatch, capsys):
    fetch, failures = line.fetch, iter([RunFailed("the exchange cannot be reached")] * 3)

    def flaky(*args, **kwargs):
        for failure in failures:
            raise failure
        return fetch(*args, **kwargs)

    monkeypatch.setattr(module, "fetch_offer", flaky)
    assert line.loop(idle_seconds=5.0).run() == {1, 2, 3}
    assert capsys.readouterr().err.count("trying again") == 1


def test_started_again_it_goes_on(line, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "hand_in", stop)
        with pytest.raises(KeyboardInterrupt):
            line.loop().run()
    assert line.loop().run() == {1, 2, 3}
    assert line.fetched == 4  # the first round lay in the work folder, the last offer is the end


def test_its_own_rules_end_its_part(line):
    member = line.federated.member("anna", limit_steps=1)
    config = line.config(limit_steps=1)
    with pytest.raises(PolicyError, match="--limit-steps 1"):
        module._Loop(config, member, line, TrustStore(config.keys)).run()
