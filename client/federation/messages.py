"""Messages that Flower's SuperNode received, answered in this process by the app as it is installed here.

It stands where Flower has ``flower-superexec`` and ``flwr-clientapp``, and does less. It imports flwr, outside
``client/federation/flower.py``, because taking a message from a SuperNode has no public interface. What is used of
Flower's inside (1.41) is in the imports below: a Flower that moved it breaks ``offsite federate node`` alone, and with
a clear error.
"""

from __future__ import annotations

from pathlib import Path

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from client.federation.flower import SETTINGS, app, tell
from client.federation.pinned import require_pinned
from offsite.console import say
from offsite.errors import PolicyError

SUPERNODE = """
import sys
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supernode.cli import flower_supernode
start_parent_process_monitor(int(sys.argv.pop(1)))
flower_supernode()
"""
"""Program that is Flower's SuperNode and ends with the process whose number is its first word."""


class MessageHandler:
    """Answers what a SuperNode on this machine received, one message after another, in this process.

    It hashes the app that came with a message and refuses all but the pinned one. It installs, opens and imports none:
    what it runs is the app that is installed here. Of an answer that fails, the SuperLink hears the class of the reason
    and not its text.

    Args:
        address: of the SuperNode's Runtime API, on loopback.
        secret: which the SuperNode asks of whoever takes messages from it.
        pin: SHA-256 of the app to answer, in hex.
        settings: this client's settings file; what the SuperNode's own configuration says is not looked at.
    """

    def __init__(self, address: str, *, secret: bytes, pin: str, settings: Path) -> None:
        self._address, self._pin, self._settings = address, pin, settings
        signed = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
        )
        self._tasks = self._client(signed)
        self.num_answered = self.num_refused = 0

    def close(self) -> None:
        """The connection is closed."""
        self._tasks.close()

    def answer_next(self) -> bool:
        """The message that waits longest is answered; return whether there was one, and the SuperNode to be reached."""
        try:
            # Of every kind, although one is answered: the SuperNode would wait for the others' answers for ever.
            found = self._tasks.AcquireTask(AcquireTaskRequest(supported_task_types=list(TaskType)))
        except httpx.TransportError:
            return False
        if not found.HasField("task") or not found.token:
            return False
        client = self._client(RuntimeTokenHttpInterceptor(found.token))
        beating = HeartbeatSender(lambda: _beat(client))
        beating.start()
        try:
            self._answer(client, is_ours=found.task.type == TaskType.CLIENT_APP)
        except (httpx.HTTPError, RuntimeError) as error:
            say(f"a message could not be taken or answered: {type(error).__name__}")
        finally:
            beating.stop()
            client.close()
        return True

    def _answer(self, client: RuntimeHttpClient, *, is_ours: bool) -> None:
        """The message is answered; where that breaks off, the SuperNode says so after half a minute by itself."""
        message, context, _, fab = pull_task_input(client)
        try:
            require_pinned(fab.content, self._pin)
            if not is_ours:
                raise PolicyError("refused: a message for another kind of app than a client's")
        except PolicyError as error:
            self.num_refused += 1
            tell(error)
            reply = Message(Error(code=ErrorCode.INVALID_FAB, reason=type(error).__name__), reply_to=message)
        else:
            context.node_config = {SETTINGS: str(self._settings)}
            reply = self._replied(message, context)
        push_message(client, reply, context)
        push_task_output(client, context, SubStatus.COMPLETED, "")

    def _replied(self, message: Message, context: Context) -> Message:
        self.num_answered += 1
        try:
            return app(message, context)
        except Exception as error:  # noqa: BLE001 - whatever failed, the owner hears that it did and nothing of it
            say(f"offsite: error: a message was not answered: {type(error).__name__}: {error}")
            reason = type(error).__name__
            return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)

    def _client(self, signed: RuntimeTokenHttpInterceptor | SuperExecAuthHttpInterceptor) -> RuntimeHttpClient:
        """Return a connection over loopback; without Flower's retries, which interrupt the process they run in."""
        return RuntimeHttpClient.from_server_address(
            self._address,
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), signed],
        )


def _beat(client: RuntimeHttpClient) -> bool:
    """Tell the SuperNode that its message is worked on; should it not hear, the message is answered all the same."""
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.HTTPError:
        return False
    return True
