"""The owner's Flower app and its strategy. On the owner's side only this file and ``grids.py`` import flwr.

Flower drives the rounds: `Strategy.start` asks, waits and hands over the replies. What it carries is sealed, and what
comes back goes through the registry, as a bundle that came by hand does; the strategy sees nothing before that. Numbers
that a client states about itself are not part of any message, so none weighs anything.

A Grid that waits by itself asks the nodes that are there at that moment, each for as long as it likes. Here a round has
one deadline, which counts from when it was asked: until then its clients' nodes are looked for, asked when they turn
up, and waited for, and about every ten seconds it is said for whom.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

from flwr.app import DEFAULT_TTL, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy

from offsite import errors
from offsite.config import build
from offsite.console import say
from offsite.errors import ArtefactError, ConfigError, Expired, OffsiteError, RunFailed, Untrusted
from offsite.exchange.packing import RAW, pack
from offsite.keys.identity import open_identity
from server.aggregation.secagg import ServerRound
from server.federation.config import FederationConfig
from server.federation.federation import Federation, opened_federation
from server.federation.grids import HELLO, POLL_SECONDS, SECAGG, PatientGrid, arrays_of
from server.federation.results import finish, require_output, require_own, watch_of
from server.federation.securerounds import SecureRounds
from server.registry.federations import Finished

SETTINGS = "federation"
"""Key of the run's configuration under which the owner's settings file is named."""

_LONGEST_POLL_SECONDS = 3.0
_LINE_EVERY_SECONDS = 10.0
_GREET_AGAIN_SECONDS = 30.0

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
        run(federation, grid, watch=watch)
        finish(federation, watch)


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
        self._greeted: dict[int, str] = {}
        self._not_before: dict[int, float] = {}
        self._told: set[int] = set()
        self._asked: dict[str, Path] = {}
        self._unsent: set[str] = set()
        self._secure = SecureRounds(federation) if federation.config.secure else None
        self._grid: Grid | None = None
        self._number, self._began = 0, 0.0

    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> Result:
        """Run the rounds as Flower does; its ``timeout`` counts from when a round was asked."""

        def waiter(messages: Iterable[Message], timeout: float | None) -> list[Message]:
            return self._exchanged(grid, messages, float("inf") if timeout is None else self._began + timeout)

        return super().start(PatientGrid(grid, waiter), *args, **kwargs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the round's messages for those clients that are asked and whose node is there now."""
        self._number, self._grid = self._before + server_round, grid
        sealed = self._federation.ask(self._number)
        self._began, self._asked, self._unsent = time.monotonic(), sealed, set(sealed)
        names = {key: one.name for key, one in self._federation.participants.items()}
        asked = ", ".join(names[client] for client in sealed)
        say(f"round {self._number} of {self._federation.config.rounds}: asked {asked}")
        self._greeted.clear()  # whoever did not answer in the last round may have begun anew
        self._not_before.clear()
        here = set(grid.get_node_ids())
        self._nodes = {node: client for node, client in self._nodes.items() if node in here}
        messages = self._train_messages(grid)
        if getattr(grid, "is_whole", False):  # no further node will come
            for client in sorted(self._unsent):
                say(f"  {names[client]}: no node of it is there")
            self._unsent.clear()
        elif self._secure is None:  # whose bundle came before a crash is not waited for
            self._unsent -= self._federation.answers(self._number).keys()
        return messages

    def _train_messages(self, grid: Grid) -> list[Message]:
        """Return the messages of clients whose node is there by now, each once."""
        if not self._unsent:
            return []
        nodes, ttl = self._known_nodes(grid), max(DEFAULT_TTL, self._federation.config.deadline_seconds)
        messages = []
        for client in sorted(self._unsent & nodes.keys()):
            self._unsent.remove(client)
            content, group = RecordDict({"sealed": arrays_of(pack(self._asked[client]))}), str(self._number)
            messages.append(Message(content, dst_node_id=nodes[client], message_type="train", group_id=group, ttl=ttl))
        return messages

    def _exchanged(self, grid: Grid, messages: Iterable[Message], until: float) -> list[Message]:
        """Send the messages, and those of a round's clients whose node turns up; return the answers that came by then.

        Args:
            until: as `time.monotonic` counts.
        """
        began = told = time.monotonic()
        ready, sent, found = list(messages), dict[str, int](), list[Message]()
        while True:
            for message in ready:
                if time.monotonic() < until:  # a Grid of ours has the answer made meanwhile
                    sent |= self._sent(grid, message)
            if sent:
                answers = list(grid.pull_messages(list(sent)))
                nodes = {answer.metadata.src_node_id for answer in answers}
                sent, found = {number: node for number, node in sent.items() if node not in nodes}, found + answers
            now = time.monotonic()
            if (not sent and not self._unsent) or now > until:
                return found
            if now - told >= _LINE_EVERY_SECONDS:
                told = now
                self._say_waiting(sent.values(), until - now)
            time.sleep(min(max(POLL_SECONDS, (now - began) / 50), _LONGEST_POLL_SECONDS, max(until - now, 0.001)))
            ready = self._train_messages(grid)

    def _sent(self, grid: Grid, message: Message) -> dict[str, int]:
        """Return the message's number and node; empty when it could not be sent, and its node is gone then."""
        node = message.metadata.dst_node_id
        found = {number: node for number in grid.push_messages([message]) if number}
        if not found and message.metadata.message_type != SECAGG:
            self._unsent |= {client for client in [self._nodes.pop(node, None)] if client in self._asked}
        return found

    def _say_waiting(self, nodes: Iterable[int], left_seconds: float) -> None:
        names = {client: one.name for client, one in self._federation.participants.items()}
        without = sorted(names[client] for client in self._unsent)
        asked = sorted(names[self._nodes[node]] for node in nodes)
        parts = [f"a node of {', '.join(without)}"] if without else []
        parts += [f"an answer of {', '.join(asked)}"] if asked else []
        left = f"{left_seconds:.0f} s" if left_seconds < 120 else f"{left_seconds / 60:.0f} min"
        say(f"  waiting for {' and '.join(parts)}; {left} left")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The round is closed with what of the replies was verified.

        Raises:
            RunFailed: with fewer sound answers than a round needs.
        """
        number, without = self._before + server_round, dict.fromkeys(self._unsent, "no node of it came in time")
        self._unsent.clear()
        close = self._summed if self._secure is not None else self._closed
        finished = close(number, replies, without)
        seconds = time.monotonic() - self._began
        self._tell(finished.content, seconds)
        every = self._federation.config.watch_every
        is_due = self._watch is not None and every > 0 and number % every == 0
        shown = dict(self._watch(number)) if self._watch is not None and is_due else {}
        for name, value in shown.items():
            say(f"  plugged in, {name}: perplexity {value:.3f}")
        return None, MetricRecord({"seconds": seconds, **{f"perplexity {name}": v for name, v in shown.items()}})

    def _closed(self, number: int, replies: Iterable[Message], left_out: dict[str, str]) -> Finished:
        """Close a round whose answers are bundles."""
        for reply in replies:
            client, reason = self._take(reply)
            if client and reason:
                left_out[client] = reason
        answered = self._federation.answers(number)
        for client in self._asked.keys() - answered.keys() - left_out.keys():
            left_out[client] = "no answer in time"
        return self._federation.close_round(number, left_out)

    def _summed(self, number: int, replies: Iterable[Message], left_out: dict[str, str]) -> Finished:
        """Carry the messages of a secure round to their end, and close it with the sum."""
        if self._secure is None or self._grid is None:
            raise RunFailed("no secure round is under way")
        part, step = self._secure.owner_part(number), 1
        outgoing = self._advanced(part, number, replies, left_out)
        nodes, seconds = {client: node for node, client in self._nodes.items()}, self._federation.config.stage_seconds
        while outgoing:
            say(f"  secure sum, message {step} of 4: to {len(outgoing)} client(s)")
            messages = []
            for client, raw in sorted(outgoing.items()):
                try:
                    sealed = arrays_of(pack(self._secure.note_for(client, number, step, raw)))
                except (Untrusted, Expired) as error:
                    left_out[client] = f"{type(error).__name__}: {error}"
                    continue
                content = RecordDict({"sealed": sealed, "awaits": ConfigRecord({"note": step})})
                found = Message(content, dst_node_id=nodes[client], message_type=SECAGG, group_id=str(number))
                messages.append(found)
            answers = self._exchanged(self._grid, messages, time.monotonic() + seconds)
            outgoing, step = self._advanced(part, number, answers, left_out), step + 1
        total = part.total()
        reasons = {
            client: left_out.get(client, "dropped out") for client in self._asked.keys() - set(total.contributors)
        }
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
        """Return the node of each client that has said by now whose it is, and that it has the right package.

        A node is asked that once; one that failed, or has another package, again after a while.
        """
        now = time.monotonic()
        fresh = [node for node in grid.get_node_ids() if self._may_greet(node, now)]
        for node in fresh:
            self._not_before[node] = now + _GREET_AGAIN_SECONDS
            hello = Message(RecordDict(), dst_node_id=node, message_type=HELLO)
            for number in grid.push_messages([hello]):
                if number:  # None stands for one that could not be sent
                    self._greeted[node] = number
        for reply in list(grid.pull_messages(list(self._greeted.values()))) if self._greeted else []:
            node = reply.metadata.src_node_id
            self._greeted.pop(node, None)
            if (client := self._client_of(reply)) is not None:
                self._nodes[node] = client
        return {client: node for node, client in self._nodes.items()}

    def _may_greet(self, node: int, now: float) -> bool:
        return node not in self._nodes and node not in self._greeted and now >= self._not_before.get(node, now)

    def _client_of(self, reply: Message) -> str | None:
        """Return the client whose node answered the hello, None when it is nobody's here or has another package."""
        participants = self._federation.participants
        said = reply.content.get("hello") if reply.has_content() else None
        client = said.get("client") if isinstance(said, ConfigRecord) else None
        if not isinstance(said, ConfigRecord) or not isinstance(client, str) or client not in participants:
            return None
        if said.get("package") == self._federation.package.digest:
            return client
        if reply.metadata.src_node_id not in self._told:
            self._told.add(reply.metadata.src_node_id)
            say(f"a node of {participants[client].name} has another package; it is not asked")
        return None

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


def _class_of(reason: object) -> str:
    """Return the reason if it names a class of our errors: a client's words are not shown on the owner's terminal."""
    known = getattr(errors, reason, None) if isinstance(reason, str) else None
    return known.__name__ if isinstance(known, type) and issubclass(known, OffsiteError) else "no reason known here"
