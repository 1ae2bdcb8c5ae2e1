"""The owner's Flower app: the rounds that are left, the two Grids, and what it asks of Flower."""

from __future__ import annotations

import time

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

import server.federation.flower as module
from offsite.errors import ConfigError, RunFailed
from offsite.exchange.packing import pack
from server.federation.flower import OffsiteStrategy, main, run
from server.federation.grids import ExchangeGrid, InProcessGrid, in_process


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
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    with federated.opened() as federation:
        answer_all(federated, federation, 1)
        strategy, grid = OffsiteStrategy(federation), ExchangeGrid(federation)
        strategy.start(grid, ArrayRecord(), num_rounds=1, timeout=5.0)
        assert sorted(federation.finished[0].content["used"]) == sorted(map(federated.key, federated.NAMES))


def test_over_the_exchange_the_deadline_passes(federated, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
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


class LateGrid(InProcessGrid):
    """Stands for Flower's own Grid: nodes turn up when they like, and answer when they like.

    Args:
        after: by node, the question after how many nodes there are at which it is first there.
        lose: messages to these nodes, so many of them, cannot be sent.
    """

    is_whole = False

    def __init__(self, inner, *, after=(), silent=(), lose=None):
        super().__init__(inner._app, inner._contexts)
        self.after, self.silent, self.lose, self.questions, self.trained = dict(after), silent, lose or {}, 0, []

    def get_node_ids(self):
        self.questions += 1
        return [node for node in super().get_node_ids() if self.questions > self.after.get(node, 0)]

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            node = message.metadata.dst_node_id
            if self.lose.get(node, 0):
                self.lose[node] -= 1
                continue
            if message.metadata.message_type == "train":
                self.trained.append(node)
            if node in self.silent:
                self._number += 1
                numbers.append(str(self._number))
                continue
            numbers += super().push_messages([message])
        return numbers

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("how long is waited is the strategy's to say")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "_LONGEST_POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "_LINE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(module, "_GREET_AGAIN_SECONDS", 0.0)


def test_nodes_that_come_late_are_waited_for(federated, quick, capsys):
    grid = LateGrid(grid_of(federated), after={2: 3, 4: 8})
    with federated.opened() as federation:
        OffsiteStrategy(federation).start(grid, ArrayRecord(), num_rounds=1, timeout=300.0)
        (finished,) = federation.finished
        assert sorted(finished.content["used"]) == sorted(map(federated.key, federated.NAMES))
        assert finished.content["left_out"] == {}
    assert grid.trained == [3, 2, 4]  # each was asked as soon as it was there, and once
    told = capsys.readouterr().err
    first, third = federated.NAMES[0], federated.NAMES[2]
    assert f"waiting for a node of {first}, {third}; 5 min left" in told
    assert f"waiting for a node of {third}; " in told


def test_no_node_at_all_is_waited_for_until_the_deadline_and_no_longer(federated, quick, capsys):
    grid = LateGrid(grid_of(federated), after=dict.fromkeys((2, 3, 4), 10**9))
    with federated.opened() as federation:
        strategy = OffsiteStrategy(federation)
        with pytest.raises(RunFailed, match="0 sound answer"):
            strategy.start(grid, ArrayRecord(), num_rounds=1, timeout=0.5)
        assert 0.5 <= time.monotonic() - strategy._began < 20
    assert "left out: no node of it came in time" in capsys.readouterr().err


def test_a_late_node_leaves_less_time_for_its_answer(federated, quick, capsys):
    class Timed(LateGrid):
        """The last node is there after a second, says whose it is, and then nothing more."""

        began, last = None, 0.0

        def get_node_ids(self):
            self.began = self.began or time.monotonic()
            return [4] if time.monotonic() - self.began > 1 else []

        def pull_messages(self, numbers):
            self.last = time.monotonic()
            return super().pull_messages(numbers)

        def push_messages(self, messages):
            self.silent = (4,) if messages[0].metadata.message_type == "train" else ()
            return super().push_messages(messages)

    with federated.opened() as federation:
        answer_all(federated, federation, 1, names=federated.NAMES[:2])
        strategy, grid = OffsiteStrategy(federation), Timed(grid_of(federated))
        strategy.start(grid, ArrayRecord(), num_rounds=1, timeout=3.0)
        (finished,) = federation.finished
        assert finished.content["left_out"] == {federated.key(federated.NAMES[2]): "no answer in time"}
        assert 2.5 <= grid.last - strategy._began < 3.9  # one deadline, not one after another
    told = capsys.readouterr().err
    assert f"waiting for a node of {federated.NAMES[2]}; 3 s left" in told
    assert f"waiting for an answer of {federated.NAMES[2]}; " in told


def test_a_message_that_could_not_be_sent_is_sent_again(federated, quick):
    grid = LateGrid(grid_of(federated), lose={3: 2})
    with federated.opened() as federation:
        OffsiteStrategy(federation).start(grid, ArrayRecord(), num_rounds=1, timeout=300.0)
        assert federation.finished[0].content["left_out"] == {}
    assert sorted(grid.trained) == [2, 3, 4]


def test_whose_answer_is_here_already_is_not_waited_for(federated, quick):
    with federated.opened() as federation:
        answer_all(federated, federation, 1)
        grid = LateGrid(grid_of(federated), after=dict.fromkeys((2, 3, 4), 10**9))
        OffsiteStrategy(federation).start(grid, ArrayRecord(), num_rounds=1, timeout=300.0)
        assert len(federation.finished[0].content["used"]) == 3


def test_a_node_that_goes_away_is_looked_for_anew(federated, quick):
    grid = LateGrid(grid_of(federated))
    with federated.opened() as federation:
        strategy = OffsiteStrategy(federation)
        strategy.start(grid, ArrayRecord(), num_rounds=1, timeout=300.0)
        grid._contexts[9] = grid._contexts.pop(2)  # its node came back under another number
        strategy._before = 1
        strategy.start(grid, ArrayRecord(), num_rounds=1, timeout=300.0)
        assert [len(one.content["used"]) for one in federation.finished] == [3, 3]
    assert sorted(grid.trained[3:]) == [3, 4, 9]


def test_a_node_with_another_package_is_told_once_and_asked_again(federated, quick, capsys):
    whole = grid_of(federated)
    app, hellos = whole._app, []

    def updating(message, context):
        if message.metadata.message_type == "query.hello" and message.metadata.dst_node_id == 3:
            hellos.append(message)
            if len(hellos) < 3:
                said = {"client": federated.key(federated.NAMES[1]), "package": "sha256:another"}
                return Message(RecordDict({"hello": ConfigRecord(said)}), reply_to=message)
        return app(message, context)

    whole._app = updating
    with federated.opened() as federation:
        OffsiteStrategy(federation).start(LateGrid(whole), ArrayRecord(), num_rounds=1, timeout=300.0)
        assert federation.finished[0].content["left_out"] == {}
    assert capsys.readouterr().err.count("has another package") == 1
    assert len(hellos) == 3
