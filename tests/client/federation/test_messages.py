"""Flower's own Runtime API of a SuperNode on loopback, with one message in it, and the handler that answers."""

from __future__ import annotations

import hashlib
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _insert_message

from client.federation import messages as handler
from client.federation.messages import MessageHandler

SECRET, FAB = b"a secret", b"bytes that no unzipper has seen"
PIN = hashlib.sha256(FAB).hexdigest()


class SuperNode:
    """The state of one, served as ``flower-supernode --isolation process`` does."""

    def __init__(self) -> None:
        store = ObjectStoreFactory()
        self.states = NodeStateFactory(objectstore_factory=store)
        self.state, self.store = self.states.state(), store.store()
        self.state.set_node_id(5)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        app = create_app(state_factory=self.states, superexec_auth_secret=SECRET)
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=self.port, ws="none"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while self.thread.is_alive() and not self.server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def receive(self, *, fab: bytes = FAB, kind: TaskType = TaskType.CLIENT_APP) -> None:
        """Put a message in as if it had come from a SuperLink with that app."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
        message = Message(RecordDict(), dst_node_id=5, message_type="query.hello")
        run = Run.create_empty(7)
        run.fab_hash = self.state.store_fab(Fab("", fab, {}))
        self.state.store_run(run)
        self.state.set_run_series_context(
            run.series_id,
            Context(run_id=7, node_id=5, node_config={"client": "/elsewhere"}, state=RecordDict(), run_config={}),
        )
        _insert_message(message, self.state, self.store)
        assert self.state.create_task(task_type=kind, run_id=7, fab_hash=run.fab_hash)

    def reply(self) -> Message:
        (found,) = self.state.get_messages_legacy(is_reply=True)
        return found


@pytest.fixture
def supernode():
    kept = {name: getattr(TaskIdentity, name) for name in ("_task_id", "_run_id", "_node_id")}
    made = SuperNode()
    yield made
    made.close()
    for name, value in kept.items():
        setattr(TaskIdentity, name, value)


@pytest.fixture
def make_desk(supernode, tmp_path, monkeypatch):
    """A handler before a stand-in for the app, which notes where its settings are said to be."""
    seen, made = [], []
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        seen.append(context.node_config)
        if len(seen) > 1:
            raise ValueError("red apple")
        return Message(RecordDict({"hello": ConfigRecord({"client": "anna"})}), reply_to=message)

    monkeypatch.setattr(handler, "app", app)

    def make(secret: bytes = SECRET) -> MessageHandler:
        made.append(
            MessageHandler(f"127.0.0.1:{supernode.port}", secret=secret, pin=PIN, settings=tmp_path / "member.json")
        )
        made[-1].seen = seen
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_pinned_app_is_answered_with_the_settings_of_this_machine(supernode, make_desk, tmp_path):
    found = make_desk()
    assert not found.answer_next()
    supernode.receive()
    assert found.answer_next()
    assert found.seen == [{"client": str(tmp_path / "member.json")}]
    reply = supernode.reply()
    assert reply.metadata.message_type == "query.hello"
    assert not reply.has_error()
    assert (found.num_answered, found.num_refused) == (1, 0)
    assert not found.answer_next()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"fab": FAB + b" "}, "is pinned; nothing of it was installed or run"),
        ({"fab": b""}, "is pinned; nothing of it was installed or run"),
        ({"kind": TaskType.AGENT_APP}, "another kind of app"),
    ],
)
def test_another_app_is_refused_and_its_bytes_are_only_hashed(changes, why, supernode, make_desk, capsys):
    found = make_desk()
    supernode.receive(**changes)
    assert found.answer_next()
    assert found.seen == []
    assert supernode.reply().error.reason == "PolicyError"
    assert why in capsys.readouterr().err
    assert (found.num_answered, found.num_refused) == (0, 1)


def test_of_a_failure_the_owner_hears_the_class_alone(supernode, make_desk, capsys):
    found = make_desk()
    supernode.receive()
    assert found.answer_next()
    supernode.reply()
    supernode.receive()
    assert found.answer_next()
    reply = supernode.reply()
    assert reply.error.reason == "ValueError"
    assert "red apple" not in str(reply.error)


def test_who_does_not_have_the_secret_gets_no_message(supernode, make_desk):
    supernode.receive()
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        make_desk(b"another").answer_next()
    assert make_desk().answer_next()


def test_a_supernode_that_is_not_there_yet_is_waited_for(make_desk, supernode):
    supernode.close()
    assert not make_desk().answer_next()
