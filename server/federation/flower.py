"""The owner's Flower app: strategy and two Grids. On the owner's side only this file imports flwr.

Flower drives the rounds: `Strategy.start` asks, waits and hands over the replies. What it carries is sealed, and what
comes back goes through the registry, as a bundle that came by hand does; the strategy sees nothing before that. Numbers
that a client states about itself are not part of any message, so none weighs anything.

- `InProcessGrid` calls a ClientApp in this process.
- `ExchangeGrid` puts messages into the exchange's outbox, and finds the answers in the registry.
- Flower's own Grid, of its deployment engine, carries the same app (``app``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity

from offsite import errors
from offsite.config import build
from offsite.console import say
from offsite.errors import ArtefactError, ConfigError, Expired, OffsiteError, RunFailed, Untrusted
from offsite.exchange.packing import RAW, pack
from offsite.keys.identity import open_identity
from server.aggregation.secagg import ServerRound
from server.federation.config import FederationConfig
from server.federation.federation import Federation, opened_federation
from server.federation.results import finish, require_output, require_own, watch_of
from server.federation.securerounds import SecureRounds
from server.registry.federations import Finished
from server.registry.messages import MessageStore

SETTINGS = "federation"
"""Key of the run's configuration under which the owner's settings file is named."""

HELLO, SECAGG = "query.hello", "query.secagg"

_POLL_SECONDS = 0.5
_HELLO_SECONDS = 120.0
_NODES_SECONDS = 60.0

Watcher = Callable[[int], Mapping[str, float]]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run's configuration names, under Flower's deployment engine.

    A path in it counts from the folder in which the SuperLink was started. Every SuperNode hears the run's
    configuration, so that nothing but the name of the file belongs there.

    Raises:
        ConfigError: when it names no settings file, or its settings name no file with the passphrase.
        RunFailed: as `run`.
    """
    path = context.run_config.get(SETTINGS)
    if not isinstance(path, str) or not Path(path).is_file():
        raise ConfigError(f"the run's configuration names no settings file: {SETTINGS}=FILE")
    config = build(FederationConfig, file=Path(path))
    if config.passphrase_file is None:
        raise ConfigError("nobody can be asked for a passphrase here: passphrase_file is missing in the settings")
    require_output(config)
    outbox = config.registry / "outbox"
    if config.registry.is_dir():
        outbox.mkdir(exist_ok=True)
    with opened_federation(config, open_identity(config), outbox=outbox) as federation:
        require_own(federation)
        watch = watch_of(federation)
        _wait_for_nodes(grid, len(federation.participants))
        run(federation, grid, watch=watch)
        finish(federation, watch)


def _wait_for_nodes(grid: Grid, num: int) -> None:
    """As many nodes are there as clients take part, or a minute has passed."""
    until = time.monotonic() + _NODES_SECONDS
    while len(list(grid.get_node_ids())) < num and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)


def run(federation: Federation, grid: Grid, *, watch: Watcher | None = None) -> None:
    """Every round that is not finished is asked and closed, in order, by Flower's own loop.

    Args:
        watch: measures the model after a round; what it returns is shown.

    Raises:
        RunFailed: when a round has too few sound answers; those before it stay.
    """
    getLogger("flwr").setLevel(WARNING)  # its account of every round; ours is below
    if federation.config.secure:
        SecureRounds(federation).void_unfinished()
    strategy = OffsiteStrategy(federation, watch)
    left = federation.config.rounds - federation.num_finished
    if left > 0:
        strategy.start(grid, ArrayRecord(), num_rounds=left, timeout=federation.config.deadline_seconds)
    federation.say_finished()


class OffsiteStrategy(Strategy):
    """Flower's loop over a `Federation`: it asks sealed rounds, and closes them with what the registry verified."""

    def __init__(self, federation: Federation, watch: Watcher | None = None) -> None:
        self._federation, self._watch, self._before = federation, watch, federation.num_finished
        self._nodes: dict[int, str] = {}
        self._asked: set[str] = set()
        self._secure = SecureRounds(federation) if federation.config.secure else None
        self._grid: Grid | None = None
        self._began = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the round's messages, one for each client that is asked and has a node."""
        number, self._grid = self._before + server_round, grid
        sealed = self._federation.ask(number)
        self._began, self._asked = time.monotonic(), set(sealed)
        names = {key: one.name for key, one in self._federation.participants.items()}
        say(f"round {number} of {self._federation.config.rounds}: asked {', '.join(names[key] for key in sealed)}")
        nodes = self._known_nodes(grid)
        messages = []
        for client, folder in sealed.items():
            if client not in nodes:
                say(f"  {names[client]}: no node of it is there")
                continue
            content = RecordDict({"sealed": _arrays(pack(folder))})
            messages.append(Message(content, dst_node_id=nodes[client], message_type="train", group_id=str(number)))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The round is closed with what of the replies was verified.

        Raises:
            RunFailed: with fewer sound answers than a round needs.
        """
        number = self._before + server_round
        finished = self._summed(number, replies) if self._secure is not None else self._closed(number, replies)
        seconds = time.monotonic() - self._began
        self._tell(finished.content, seconds)
        every = self._federation.config.watch_every
        is_due = self._watch is not None and every > 0 and number % every == 0
        shown = dict(self._watch(number)) if self._watch is not None and is_due else {}
        for name, value in shown.items():
            say(f"  plugged in, {name}: perplexity {value:.3f}")
        return None, MetricRecord({"seconds": seconds, **{f"perplexity {name}": v for name, v in shown.items()}})

    def _closed(self, number: int, replies: Iterable[Message]) -> Finished:
        """Close a round whose answers are bundles."""
        left_out = {}
        for reply in replies:
            client, reason = self._take(reply)
            if client and reason:
                left_out[client] = reason
        answered = self._federation.answers(number)
        for client in self._asked - answered.keys() - left_out.keys():
            left_out[client] = "no answer in time"
        return self._federation.close_round(number, left_out)

    def _summed(self, number: int, replies: Iterable[Message]) -> Finished:
        """Carry the messages of a secure round to their end, and close it with the sum."""
        if self._secure is None or self._grid is None:
            raise RunFailed("no secure round is under way")
        part, left_out, step = self._secure.owner_part(number), dict[str, str](), 1
        outgoing = self._advanced(part, number, replies, left_out)
        nodes, seconds = {client: node for node, client in self._nodes.items()}, self._federation.config.stage_seconds
        while outgoing:
            say(f"  secure sum, message {step} of 4: to {len(outgoing)} client(s)")
            messages = []
            for client, raw in sorted(outgoing.items()):
                try:
                    sealed = _arrays(pack(self._secure.note_for(client, number, step, raw)))
                except (Untrusted, Expired) as error:
                    left_out[client] = f"{type(error).__name__}: {error}"
                    continue
                content = RecordDict({"sealed": sealed, "awaits": ConfigRecord({"note": step})})
                found = Message(content, dst_node_id=nodes[client], message_type=SECAGG, group_id=str(number))
                messages.append(found)
            answers = self._grid.send_and_receive(messages, timeout=seconds)
            outgoing, step = self._advanced(part, number, answers, left_out), step + 1
        total = part.total()
        reasons = {client: left_out.get(client, "dropped out") for client in self._asked - set(total.contributors)}
        finished = self._secure.close_sum(number, total, reasons)
        self._secure.clear(number)
        return finished

    def _advanced(
        self, part: ServerRound, number: int, replies: Iterable[Message], left_out: dict[str, str]
    ) -> dict[str, bytes]:
        """Take in the clients' messages, and return what each client left gets; why another's does not count is noted.

        Raises:
            RunFailed: as `ServerRound.close`, once those reasons were shown.
        """
        for reply in replies:
            client, sealed, reason = self._unwrapped(reply)
            if client is None or self._secure is None:
                continue
            try:
                if sealed is not None:
                    part.take(self._secure.read_note(client, number, sealed), sender=client)
            except ArtefactError as error:
                reason = f"{type(error).__name__}: {error}"
            if reason:
                left_out[client] = reason
        try:
            return part.close()
        except RunFailed:
            for client, reason in sorted(left_out.items()):
                say(f"  {self._federation.participants[client].name}: left out: {reason}")
            raise

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing: clients are never asked for figures about their text."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing."""
        return None

    def summary(self) -> None:
        """Nothing to add: every round is told as it happens."""

    def _known_nodes(self, grid: Grid) -> dict[str, int]:
        """Return the node of each client, asked once: it says whose it is and which package it has."""
        participants = self._federation.participants
        fresh = [node for node in grid.get_node_ids() if node not in self._nodes]
        if fresh:
            hello = [Message(RecordDict(), dst_node_id=node, message_type=HELLO) for node in fresh]
            for reply in grid.send_and_receive(hello, timeout=_HELLO_SECONDS):
                said = reply.content.get("hello") if reply.has_content() else None
                client = said.get("client") if isinstance(said, ConfigRecord) else None
                if isinstance(said, ConfigRecord) and isinstance(client, str) and client in participants:
                    if said.get("package") == self._federation.package.digest:
                        self._nodes[reply.metadata.src_node_id] = client
                    else:
                        say(f"a node of {participants[client].name} has another package; it is not asked")
        return {client: node for node, client in self._nodes.items()}

    def _unwrapped(self, reply: Message) -> tuple[str | None, dict[str, bytes] | None, str | None]:
        """Return whose reply it is, the sealed folder in it, if there is one, and otherwise why it does not count."""
        client = self._nodes.get(reply.metadata.src_node_id)
        if reply.has_error() or not reply.has_content():
            return client, None, "its node failed"
        content = reply.content
        if isinstance(said := content.get("declined"), ConfigRecord):
            return client, None, f"declined: {_class_of(said.get('reason'))}"
        if isinstance(content.get("taken"), ConfigRecord):
            return client, None, None
        sealed = content.get("sealed")
        if not isinstance(sealed, ArrayRecord) or any(array.stype != RAW for array in sealed.values()):
            return client, None, "answered with nothing that is sealed"
        return client, {name: array.data for name, array in sealed.items()}, None

    def _take(self, reply: Message) -> tuple[str | None, str | None]:
        """Return whose reply it is, and why it does not count, if so; a sealed bundle in it is in the registry then."""
        client, sealed, reason = self._unwrapped(reply)
        if sealed is None:
            return client, reason
        try:
            verdict = self._federation.take_in(sealed)
        except RunFailed:
            raise
        except OffsiteError as error:
            return client, f"{type(error).__name__}: {error}"
        return client, f"{verdict.reason_class}: {verdict.message}" if verdict.state == "refused" else None

    def _tell(self, content: Mapping[str, Any], seconds: float) -> None:
        names = {key: one.name for key, one in self._federation.participants.items()}
        for client in content["used"]:
            size = content["norms"].get(client)
            shown = "in the sum" if size is None else f"verified, update of norm {size:.4g}"
            say(f"  {names[client]}: {shown}")
        for client, reason in sorted(content["left_out"].items()):
            say(f"  {names.get(client, client[:9])}: left out: {reason}")
        for client, reason in sorted(content["flags"].items()):
            say(f"  {names[client]}: unlike the others: {reason} (a signal; nothing follows from it by itself)")
        figures = "".join(f", {name} {value:.4g}" for name, value in sorted(content["figures"].items()))
        say(f"  {len(content['used'])} of {len(self._asked)} used, {seconds:.1f} s{figures}")


class _OwnGrid(Grid):
    """What the two Grids share: replies are kept until they are asked for."""

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


class InProcessGrid(_OwnGrid):
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


class ExchangeGrid(_OwnGrid):
    """Carries messages over this owner's exchange: rounds lie in its outbox, bundles come through its intake.

    Clients pull. A message of type train is the sealed round that lies in the outbox already, and its reply the verdict
    of the registry; the hello is answered from the job, whose package a client's machine holds its own against.
    """

    def __init__(self, federation: Federation) -> None:
        super().__init__()
        self._federation = federation
        self._clients = dict(enumerate(sorted(federation.participants), start=2))

    def get_node_ids(self) -> Iterable[int]:
        """Return a number for each client."""
        return list(self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hellos are answered; of rounds and notes nothing is to be done: their outbox is where clients look."""
        return [self._keep(self._hello(message)) for message in messages if message.metadata.message_type == HELLO]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return an answer for each client whose bundle stands in the registry before the deadline."""
        waiting = {self._clients[message.metadata.dst_node_id]: message for message in messages}
        found, until = [], time.monotonic() + (float("inf") if timeout is None else timeout)
        while waiting:
            for client, reply in [(client, self._arrived(client, message)) for client, message in waiting.items()]:
                if reply is not None:
                    found.append(reply)
                    del waiting[client]
            if not waiting or time.monotonic() > until:
                break
            time.sleep(_POLL_SECONDS)
        return found

    def _hello(self, message: Message) -> Message:
        client = self._clients[message.metadata.dst_node_id]
        package = self._federation.participants[client].job.package_digest
        said = ConfigRecord({"client": client, "package": package})
        return self._reply(message, RecordDict({"hello": said}))

    def _arrived(self, client: str, message: Message) -> Message | None:
        """Return the client's answer if it is here."""
        if message.metadata.message_type == HELLO:
            return self._hello(message)
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
        return self._reply(message, RecordDict({"sealed": _arrays(pack(notes[step]))}))

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


def _arrays(parts: Mapping[str, bytes]) -> ArrayRecord:
    return ArrayRecord(array_dict={name: Array("uint8", (len(data),), RAW, data) for name, data in parts.items()})


def _class_of(reason: object) -> str:
    """Return the reason if it names a class of our errors: a client's words are not shown on the owner's terminal."""
    known = getattr(errors, reason, None) if isinstance(reason, str) else None
    return known.__name__ if isinstance(known, type) and issubclass(known, OffsiteError) else "no reason known here"
