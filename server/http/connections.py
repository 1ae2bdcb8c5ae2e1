"""Limits on connections: uvicorn's HTTP/1.1 protocol, with bounds on time and number that it does not have.

A connection is broken off when a request's head does not arrive in time, when bytes keep coming that belong to no
request, when the other side does not take what is sent to it, and when there are too many connections. How long a body
may take is for whoever reads it (``server/http/bodies.py``).
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class GuardedProtocol(H11Protocol):
    """One connection. Subclasses made by `guarded` set the limits."""

    limit_connections = 256
    head_seconds = 10.0
    stall_seconds = 30.0

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or break it off when there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limit_connections:
            transport.abort()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection and its timers."""
        self._head_timer = _cancelled(self._head_timer)
        self._stall_timer = _cancelled(self._stall_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on; outside a request they must make up its head in time."""
        super().data_received(data)
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """End the connection over what is no HTTP; a request under way gets no other answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        super().send_400_response(msg)

    def pause_writing(self) -> None:
        """Start counting the time in which the other side takes nothing."""
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The other side took enough."""
        self._stall_timer = _cancelled(self._stall_timer)
        super().resume_writing()

    def _watch(self) -> None:
        is_busy = self.cycle is not None and not self.cycle.response_complete
        if is_busy:
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._head_late)

    def _head_late(self) -> None:
        self._head_timer = None
        is_busy = self.cycle is not None and not self.cycle.response_complete
        if not is_busy and not self.transport.is_closing():
            self.transport.abort()


def guarded(*, limit_connections: int, head_seconds: float, stall_seconds: float) -> type[GuardedProtocol]:
    """Return the protocol with these limits, for ``uvicorn.Config(http=...)``."""
    limits = {"limit_connections": limit_connections, "head_seconds": head_seconds, "stall_seconds": stall_seconds}
    return type("Guarded", (GuardedProtocol,), limits)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Return None, what a timer is after it was cancelled."""
    if timer is not None:
        timer.cancel()
    return None
