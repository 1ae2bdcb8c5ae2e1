"""The owner's Flower app: the rounds that are left, the two Grids, and what it asks of Flower."""

from __future__ import annotations

import time

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

import server.federation.flower as module
from offsite.errors import ConfigError, RunFailed
from offsite.exchange.packing import pack
from server.federation.flower import ExchangeGrid, InProcessGrid, OffsiteStrategy, in_process, main, run


def grid_of(federated):
    nodes = {node: {"client": str(federated.settings[name])} for node, name in enumerate(federated.NAMES, start=2)}
    return in_process(nodes, "client.federation.flower:app")


def answer_all(federated, federation, number, names=None):
    asked = federation.ask(number)
    for name in names or federated.NAMES:
        federation.take_in(pack(federated.answer(name, asked[federated.key(name)])))


def test_the_rounds_that_are_left_are_run(federated):
    with federated.opened() as federation:
        federated.round(federation, 1)
        watched = []
        run(federation, grid_of(federated), watch=lambda number: watched.append(number) or {"all": 2.0})
        assert [one.round for one in federation.finished] == [1, 2, 3]
        assert watched == [2, 3]
        run(federation, grid_of(federated), watch=watched.append)  # nothing is left
        assert watched == [2, 3]


def test_nothing_is_asked_about_their_text(federated):
    with federated.opened() as federation:
        strategy = OffsiteStrategy(federation)
        assert strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), grid_of(federated)) == []
        assert strategy.aggregate_evaluate(1, []) is None


def test_a_message_holds_the_sealed_round_and_nothing_else(federated):
    with federated.opened() as federation:
        strategy = OffsiteStrategy(federation)
        messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord({"lr": 1.0}), grid_of(federated))
        for message in messages:
            assert list(message.content) == ["sealed"]
            found = {name: array.data for name, array in message.content["sealed"].items()}
            assert found in [pack(path) for path in federated.outbox.iterdir()]


def test_over_the_exchange_what_is_in_the_registry_is_the_answer(federated, monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    with federated.opened() as federation:
        answer_all(federated, federation, 1)
        strategy, grid = OffsiteStrategy(federation), ExchangeGrid(federation)
        strategy.start(grid, ArrayRecord(), num_rounds=1, timeout=5.0)
        assert sorted(federation.finished[0].content["used"]) == sorted(map(federated.key, federated.NAMES))


def test_over_the_exchange_the_deadline_passes(federated, monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    with federated.opened() as federation:
        answer_all(federated, federation, 1, names=("anna", "bert"))
        began = time.monotonic()
        OffsiteStrategy(federation).start(ExchangeGrid(federation), ArrayRecord(), num_rounds=1, timeout=0.2)
        assert 0.2 <= time.monotonic() - began < 20
        assert federation.finished[0].content["left_out"] == {federated.key("cora"): "no answer in time"}
        with pytest.raises(RunFailed, match="0 sound answer"):
            OffsiteStrategy(federation).start(ExchangeGrid(federation), ArrayRecord(), num_rounds=1, timeout=0.1)
        assert federation.num_finished == 1


def test_replies_are_given_once():
    def app(message, context):
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, {2: Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})})
    message = grid.create_message(RecordDict(), "train", 2, "1")
    (number,) = grid.push_messages([message])
    assert len(grid.pull_messages([number, "another"])) == 1
    assert grid.pull_messages([number]) == []
    assert list(grid.get_node_ids()) == [2]
    assert list(grid.send_and_receive([message], timeout=0.0)) == []
    grid.set_run("run")
    assert grid.run == "run"


@pytest.mark.parametrize("settings", [{}, {"federation": 7}, {"federation": "nowhere.yaml"}])
def test_the_app_names_its_settings(settings):
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings)
    with pytest.raises(ConfigError, match="names no settings file"):
        main(None, context)
