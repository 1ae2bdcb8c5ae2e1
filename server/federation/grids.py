"""Grids: what carries Flower's messages between the owner and the nodes, and the message that a sealed folder makes.

- `InProcessGrid` calls a ClientApp in this process.
- `ExchangeGrid` puts messages into the exchange's outbox, and finds the answers in the registry.
- Flower's own Grid, of its deployment engine or its simulation, is the third.

`PatientGrid` is any of them with another way to wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from offsite.console import say
from offsite.exchange.packing import RAW, pack
from server.federation.federation import Federation
from server.registry.messages import MessageStore

HELLO, SECAGG = "query.hello", "query.secagg"
POLL_SECONDS = 0.5

Waiter = Callable[[Iterable[Message], float | None], Iterable[Message]]
"""Sends messages and returns the answers that came until the deadline, in seconds."""


def arrays_of(parts: Mapping[str, bytes]) -> ArrayRecord:
    """Return a sealed folder's files as a message holds them."""
    return ArrayRecord(array_dict={name: Array("uint8", (len(data),), RAW, data) for name, data in parts.items()})


class PatientGrid(Grid):
    """Another Grid, but for how it waits: that is the waiter's."""

    def __init__(self, grid: Grid, waiter: Waiter) -> None:
        self._grid, self._waiter = grid, waiter
        self.is_whole = getattr(grid, "is_whole", False)

    def set_run(self, run: Any) -> None:
        """The run is known."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to that node."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are there now."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return a number for each."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that are there, each once."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return what the waiter gathers."""
        return self._waiter(messages, timeout)


class OwnGrid(Grid):
    """What our two Grids share: replies are kept until they are asked for, and no node comes later than the others."""

    is_whole = True

    def __init__(self) -> None:
        self._replies: dict[str, Message] = {}
        self._number, self._run = 0, None
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # messages outside Flower's runtime

    def set_run(self, run: Any) -> None:
        """The run is known."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to that node."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def _keep(self, reply: Message) -> str:
        self._number += 1
        self._replies[str(self._number)] = reply
        return str(self._number)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, each once."""
        return [self._replies.pop(number) for number in message_ids if number in self._replies]


class InProcessGrid(OwnGrid):
    """Calls a ClientApp in this process, one message after another: for tests, trials and benchmarks.

    Args:
        contexts: by node, as Flower would give them to the app.
    """

    def __init__(self, client_app: ClientApp, contexts: Mapping[int, Context]) -> None:
        super().__init__()
        self._app, self._contexts = client_app, dict(contexts)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Every message is answered; an error of a client's is its answer, as with Flower."""
        return [self._keep(self._answer(message)) for message in messages]

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # noqa: BLE001 - stands for a node that failed, whatever the failure
            say(f"a node failed: {type(error).__name__}: {error}")
            return Message(Error(code=0, reason=type(error).__name__), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the answers; those that come after the deadline would be left out, and nothing here is late."""
        began, found = time.monotonic(), []
        for message in messages:
            if timeout is None or time.monotonic() - began < timeout:
                found += self.pull_messages([self._keep(self._answer(message))])
        return found


class ExchangeGrid(OwnGrid):
    """Carries messages over this owner's exchange: rounds lie in its outbox, bundles come through its intake.

    Clients pull. A message of type train is the sealed round that lies in the outbox already, and its reply the verdict
    of the registry; the hello is answered from the job, whose package a client's machine holds its own against.
    """

    def __init__(self, federation: Federation) -> None:
        super().__init__()
        self._federation = federation
        self._clients = dict(enumerate(sorted(federation.participants), start=2))
        self._awaited: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Return a number for each client."""
        return list(self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hellos are answered; of rounds and notes nothing is to be done: their outbox is where clients look."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return an answer, once, for each message whose bundle or note stands in the registry by now."""
        wanted = list(message_ids)
        for number in [each for each in wanted if each in self._awaited]:
            message = self._awaited[number]
            reply = self._arrived(self._clients[message.metadata.dst_node_id], message)
            if reply is not None:
                del self._awaited[number]
                self._replies[number] = reply
        return super().pull_messages(wanted)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the answers that are here before the deadline."""
        numbers = set(self.push_messages(messages))
        found, until = [], time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            found += self.pull_messages(numbers)
            if numbers.isdisjoint(self._awaited) or time.monotonic() > until:
                return found
            time.sleep(POLL_SECONDS)

    def _push(self, message: Message) -> str:
        if message.metadata.message_type == HELLO:
            return self._keep(self._hello(message))
        self._number += 1
        self._awaited[str(self._number)] = message
        return str(self._number)

    def _hello(self, message: Message) -> Message:
        client = self._clients[message.metadata.dst_node_id]
        package = self._federation.participants[client].job.package_digest
        said = ConfigRecord({"client": client, "package": package})
        return self._reply(message, RecordDict({"hello": said}))

    def _arrived(self, client: str, message: Message) -> Message | None:
        """Return the client's answer if it is here."""
        number, participant = int(message.metadata.group_id), self._federation.participants[client]
        if not self._federation.config.secure:
            if client not in self._federation.answers(number):
                return None
            say(f"  {participant.name}: its bundle is here and verified")
            return self._reply(message, RecordDict({"taken": ConfigRecord({"by": "registry"})}))
        awaits = message.content.get("awaits")
        step = awaits.get("note") if isinstance(awaits, ConfigRecord) else 0
        notes = MessageStore(self._federation.registry).of(participant.job.job_id, number)
        if not isinstance(step, int) or len(notes) <= step:
            return None
        return self._reply(message, RecordDict({"sealed": arrays_of(pack(notes[step]))}))

    def _reply(self, message: Message, content: RecordDict) -> Message:
        TaskIdentity.node_id = message.metadata.dst_node_id
        try:
            return Message(content, reply_to=message)
        finally:
            TaskIdentity.node_id = 1


def in_process(contexts: Mapping[int, Mapping[str, str]], client_app: str) -> InProcessGrid:
    """Return a Grid over the ClientApp of that entry string (``client.federation.flower:app``), a node for each
    configuration.

    The string is this program's own and comes from no message.
    """
    import importlib

    module, _, name = client_app.partition(":")
    loaded = getattr(importlib.import_module(module), name)
    made = {
        node: Context(run_id=1, node_id=node, node_config=dict(config), state=RecordDict(), run_config={})
        for node, config in contexts.items()
    }
    return InProcessGrid(loaded, made)
