"""Request bodies, read within limits of size and time, and only in the one form that this protocol has."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from server.http.refusals import Refusal, busy

_DIGITS = 18
_SLOT_SECONDS = 10.0


class Bodies:
    """Reads bodies, so many at a time that they fit into memory, and not many of one client.

    Args:
        num_slots: bodies being read at once; more wait for a while, then hear that they should come again.
        grace_seconds: every body has so long, and a second more for each `bytes_per_second` of it.
    """

    def __init__(self, *, num_slots: int, grace_seconds: float, bytes_per_second: float) -> None:
        self._slots = asyncio.Semaphore(num_slots)
        self._num_client_slots = max(1, num_slots // 4)
        self._clients: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(self._num_client_slots)
        )
        self._grace_seconds, self._bytes_per_second = grace_seconds, bytes_per_second

    async def read(self, request: Request, *, client: str, limit_bytes: int, digest: str) -> bytes:
        """Return the body, whose SHA-256 is `digest` in hex.

        Args:
            client: who signed the request; trusted, so that there are few.

        Raises:
            Refusal: 411 without a length, 415 with an encoding, 413 over the limit, 408 too slow, 429 when no slot
                becomes free, 400 when it breaks off.
            BodyChanged: when it has another digest.
        """
        num_bytes = declared_bytes(request)
        if num_bytes > limit_bytes:
            raise Refusal(413, "TooLarge", f"the body has {num_bytes} bytes, limit {limit_bytes}")
        async with self._slot(client):
            try:
                async with asyncio.timeout(self._grace_seconds + num_bytes / self._bytes_per_second):
                    body = await _all(request)
            except TimeoutError:
                raise Refusal(408, "TooLarge", "the body came too slowly") from None
            except ClientDisconnect:
                raise Refusal(400, "BadSchema", "the body broke off") from None
        request.state.is_read = True
        if not hmac.compare_digest(hashlib.sha256(body).hexdigest(), digest):
            raise BodyChanged
        return body

    @asynccontextmanager
    async def _slot(self, client: str) -> AsyncIterator[None]:
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(_SLOT_SECONDS):
                    await held.enter_async_context(self._clients[client])
                    await held.enter_async_context(self._slots)
            except TimeoutError:
                raise busy("too many uploads at once") from None
            yield


class BodyChanged(Exception):
    """The body is not the one that was signed."""


def declared_bytes(request: Request) -> int:
    """Return the body's length as its head declares it.

    Raises:
        Refusal: 411 without a length, 415 with a content encoding.
    """
    headers = request.headers
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "BadSchema", "bodies are taken as they are, without content encoding")
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not length.isascii() or not length.isdigit() or len(length) > _DIGITS:
        raise Refusal(411, "BadSchema", "the body's length must be declared")
    return int(length)


def refuse_body(request: Request) -> None:
    """Return only if the request declares no body.

    Raises:
        Refusal: 413.
    """
    if "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0":
        raise Refusal(413, "TooLarge", "this request takes no body")
    request.state.is_read = True


async def _all(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk  # no longer than declared: the HTTP parser sees to that
    return bytes(body)
