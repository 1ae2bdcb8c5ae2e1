"""The exchange's HTTP routes, as ``offsite/exchange/wire.py`` lists them, as an ASGI application.

No name from the wire becomes a path: folders are found by digest among those that are there, files among those that a
signed manifest lists.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offsite.console import say
from offsite.errors import ArtefactError, OffsiteError
from offsite.exchange.requests import PROTOCOL, PROTOCOL_HEADER, SignedRequest
from offsite.exchange.wire import DECLARATION_LIMIT_BYTES, Offers, Part, Status, read_declaration
from offsite.keys.identity import FINGERPRINT_PATTERN
from offsite.sealed.folder import MANIFEST_FILE
from server.exchange.authentication import Authenticator, Denials
from server.exchange.outbox import Outbox
from server.exchange.submissions import Submissions
from server.exchange.uploads import Upload, UploadStore
from server.http.bodies import Bodies, BodyChanged, refuse_body
from server.http.refusals import Refusal, busy, denied, not_found, of_artefact

_PIECE_BYTES = 256 * 2**10
_VERDICT_SECONDS = 1.0
_COLLECT_SECONDS = 60.0
_MAX_RECENT = 10_000
_FINGERPRINT = re.compile(FINGERPRINT_PATTERN)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_OFFSET = re.compile(r"0|[1-9][0-9]{0,17}")
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")
_VERSION = re.compile(r"/v([0-9]{1,6})/")


@dataclass
class Counts:
    """What happened since the start."""

    num_requests: int = 0
    num_denied: int = 0
    num_refused: int = 0
    num_failed: int = 0
    num_bytes_in: int = 0
    num_bytes_out: int = 0
    num_bundles_taken_in: int = 0
    num_bundles_refused: int = 0


class FileReply(Response):
    """Part of an open file, from `start` to before `end`; the handle is closed on every way out."""

    def __init__(self, handle: int, size: int, start: int, end: int, counts: Counts) -> None:
        headers = {"Accept-Ranges": "bytes", "Content-Length": str(end - start), "Cache-Control": "no-store"}
        if (start, end) != (0, size):
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        status = 206 if "Content-Range" in headers else 200
        super().__init__(status_code=status, headers=headers, media_type="application/octet-stream")
        self._handle, self._start, self._end, self._counts = handle, start, end, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the bytes, piece by piece."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            at = self._start
            while at < self._end:
                piece = await asyncio.to_thread(os.pread, self._handle, min(_PIECE_BYTES, self._end - at), at)
                if not piece:
                    raise RuntimeError("a file became shorter while it was sent")
                at += len(piece)
                self._counts.num_bytes_out += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            os.close(self._handle)


class Exchange:
    """The routes over one outbox, one upload store and one registry.

    Args:
        limit_part_bytes: the largest part of an upload.
        limit_waiting: whole bundles that may wait for the intake.
        idle_seconds: after which an upload that stands still is discarded.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        denials: Denials,
        bodies: Bodies,
        outbox: Outbox,
        uploads: UploadStore,
        submissions: Submissions,
        limit_part_bytes: int,
        limit_waiting: int,
        idle_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._authenticator, self._denials, self._bodies = authenticator, denials, bodies
        self._outbox, self._uploads, self._submissions = outbox, uploads, submissions
        self._limit_part_bytes, self._limit_waiting = limit_part_bytes, limit_waiting
        self._idle_seconds, self._clock = idle_seconds, clock
        self._intakes: dict[str, asyncio.Future[Status]] = {}
        self._recent: OrderedDict[tuple[str, str], Status] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="intake")  # the registry takes one at a time anyway
        self.counts = Counts()

    def application(self) -> ASGIApp:
        """Return the ASGI application."""
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=self._life)
        router = APIRouter(prefix=f"/v{PROTOCOL}")
        router.add_api_route("/sealed", self.index, methods=["GET"], response_model=None)
        router.add_api_route("/sealed/{digest}/{name}", self.download, methods=["GET"], response_model=None)
        router.add_api_route("/sealed/{digest}/payload/{name}", self.download, methods=["GET"], response_model=None)
        router.add_api_route("/bundles", self.declare, methods=["POST"], response_model=None)
        router.add_api_route("/bundles/{digest}", self.status, methods=["GET"], response_model=None)
        part = "/bundles/{digest}/payload/{name}/{offset}"
        router.add_api_route(part, self.append, methods=["PUT"], response_model=None)
        router.add_api_route("/bundles/{digest}/complete", self.complete, methods=["POST"], response_model=None)
        app.include_router(router)
        for kind in (Refusal, ArtefactError, BodyChanged, HTTPException, OffsiteError, ClientDisconnect, Exception):
            app.add_exception_handler(kind, self.refuse)
        return _Versioned(app)

    async def index(self, request: Request) -> Response:
        """List what is sealed for the caller."""
        signed = await self._authorise(request, has_body=False)
        found = await asyncio.to_thread(self._outbox.offers, signed.key)
        return _json(Offers(offers=tuple(offer.summary() for offer in found)))

    async def download(self, request: Request, digest: str, name: str) -> Response:
        """Send one file of a sealed folder, from the byte that is asked for."""
        signed = await self._authorise(request, has_body=False)
        handle, size = await asyncio.to_thread(self._outbox.open, signed.key, digest, name)
        try:
            start, end = _range(request.headers.get("range"), size)
            if name == MANIFEST_FILE:
                await self._log("exchange-pulled", digest=digest, client=signed.key)
        except BaseException:
            os.close(handle)
            raise
        return FileReply(handle, size, start, end, self.counts)

    async def declare(self, request: Request) -> Response:
        """Check a sealed bundle's manifest, and take its payload from now on."""
        signed = await self._authorise(request)
        raw = read_declaration(await self._body(request, signed, DECLARATION_LIMIT_BYTES))
        digest = raw.digest.removeprefix("sha256:")
        known = await self._known(digest, signed.key)
        if known is not None and known.state != "receiving":
            return _json(known)
        self._recent.pop((signed.key, digest), None)
        manifest = await asyncio.to_thread(self._submissions.check, raw, signed.key, int(self._clock()))
        parts = (raw.manifest_raw, raw.signatures_raw, raw.keys_raw)
        upload = await asyncio.to_thread(self._uploads.declare, digest, manifest, parts)
        return _json(self._receiving(upload))

    async def status(self, request: Request, digest: str) -> Response:
        """Tell what became of a bundle, or how far it has come."""
        signed = await self._authorise(request, has_body=False)
        found = await self._known(digest, signed.key) or self._recent.get((signed.key, digest))
        if found is None:
            raise not_found()
        return _json(found)

    async def append(self, request: Request, digest: str, name: str, offset: str) -> Response:
        """Take the next bytes of one encrypted file."""
        signed = await self._authorise(request)
        upload = self._uploads.get(digest, signed.key)
        if upload is None or name not in upload.files or not _OFFSET.fullmatch(offset):
            raise not_found()
        left = upload.files[name] - int(offset)
        data = await self._body(request, signed, min(self._limit_part_bytes, max(left, 0)))
        reached = await asyncio.to_thread(self._uploads.append, upload, name, int(offset), data)
        part = Part(offset=reached, bytes=upload.files[name])
        return _json(Status(digest=digest, state="receiving", parts={name: part}, part_bytes=self._limit_part_bytes))

    async def complete(self, request: Request, digest: str) -> Response:
        """Hand a whole upload to the intake; answer with the verdict if it comes soon."""
        signed = await self._authorise(request, has_body=False)
        found = await self._known(digest, signed.key) or self._recent.get((signed.key, digest))
        upload = self._uploads.get(digest, signed.key)
        if found is None:
            raise not_found()
        if found.state == "receiving" and upload is not None:
            if not found.is_whole():
                raise Refusal(409, "WrongOffset", "bytes of this upload are missing")
            if digest not in self._intakes:
                if len(self._intakes) >= self._limit_waiting:
                    raise busy("too many bundles wait to be verified", retry_seconds=2)
                self._begin_intake(upload)
        intake = self._intakes.get(digest)
        if intake is None:
            return _json(found)
        done, _ = await asyncio.wait([intake], timeout=_VERDICT_SECONDS)
        if not done:
            return _json(Status(digest=digest, state="verifying"), status=202)
        return _json(await intake)

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Turn an error into an answer; the connection ends where a body was not read to its end."""
        if isinstance(error, BodyChanged):
            await self._deny(request, "BadDigest", "the body is not the one that was signed")
            error = denied()
        elif isinstance(error, ArtefactError):
            error = of_artefact(error)
        elif isinstance(error, HTTPException):
            error = not_found()
        elif isinstance(error, ClientDisconnect):
            return Response(status_code=400)  # nobody reads this
        if not isinstance(error, Refusal):
            self.counts.num_failed += 1
            if isinstance(error, OffsiteError):
                say(f"error: {error}")
            problem = {"reason": "RunFailed", "message": "the exchange failed at this request"}
            return JSONResponse(problem, status_code=500, headers={"Connection": "close"})
        self.counts.num_refused += 1
        is_read = getattr(request.state, "is_read", False)
        headers = {**error.headers, **({} if is_read else {"Connection": "close"})}
        return JSONResponse(error.body, status_code=error.status, headers=headers)

    async def _authorise(self, request: Request, *, has_body: bool = True) -> SignedRequest:
        """Return who asks for what; whatever is not in order about it has one answer."""
        self.counts.num_requests += 1
        if not has_body:
            refuse_body(request)
        try:
            return self._authenticator.check(request)
        except ArtefactError as error:
            await self._deny(request, type(error).__name__, str(error))
            raise denied() from None

    async def _deny(self, request: Request, check: str, detail: str) -> None:
        self.counts.num_denied += 1
        claimed = request.headers.get("offsite-key", "")
        fields = {
            "check": check,
            "detail": detail,
            "client": claimed if _FINGERPRINT.fullmatch(claimed) else "",
            "address": request.client.host if request.client else "",
        }
        try:
            await asyncio.to_thread(self._denials.note, **fields)
        except OffsiteError as failure:
            say(f"error: {failure}")

    async def _body(self, request: Request, signed: SignedRequest, limit_bytes: int) -> bytes:
        body = await self._bodies.read(request, client=signed.key, limit_bytes=limit_bytes, digest=signed.body_digest)
        self.counts.num_bytes_in += len(body)
        return body

    async def _known(self, digest: str, client: str) -> Status | None:
        """Return the state of a client's bundle: at the intake, decided or on its way; None when none of these."""
        upload = self._uploads.get(digest, client)
        if upload is not None and digest in self._intakes:
            return Status(digest=digest, state="verifying")
        verdict = (
            await asyncio.to_thread(self._submissions.verdict, digest, client) if _DIGEST.fullmatch(digest) else None
        )
        if verdict is not None or upload is None:
            return verdict
        return await asyncio.to_thread(self._receiving, upload)

    def _receiving(self, upload: Upload) -> Status:
        offsets = upload.offsets()
        parts = {name: Part(offset=offsets[name], bytes=size) for name, size in upload.files.items()}
        return Status(digest=upload.digest, state="receiving", parts=parts, part_bytes=self._limit_part_bytes)

    def _begin_intake(self, upload: Upload) -> None:
        loop = asyncio.get_running_loop()
        intake = loop.run_in_executor(self._pool, self._take_in, upload)
        self._intakes[upload.digest] = intake
        intake.add_done_callback(lambda future: self._end_intake(upload, future))

    def _take_in(self, upload: Upload) -> Status:
        """Runs in the pool: nothing is appended meanwhile, and afterwards the upload's room is free."""
        self._uploads.close(upload)
        try:
            found = self._submissions.take_in(upload.folder, upload.digest, int(self._clock()))
        except BaseException:
            self._uploads.reopen(upload)
            raise
        self._uploads.discard(upload)
        return found

    def _end_intake(self, upload: Upload, intake: asyncio.Future[Status]) -> None:
        self._intakes.pop(upload.digest, None)
        if intake.cancelled() or intake.exception() is not None:
            return
        found = intake.result()
        self._recent[(upload.client, upload.digest)] = found
        while len(self._recent) > _MAX_RECENT:
            self._recent.popitem(last=False)
        if found.state == "refused":
            self.counts.num_bundles_refused += 1
        else:
            self.counts.num_bundles_taken_in += 1

    async def _log(self, event: str, **fields: object) -> None:
        await asyncio.to_thread(self._submissions.log, event, **fields)

    @asynccontextmanager
    async def _life(self, _: FastAPI) -> AsyncIterator[None]:
        """Idle uploads are collected while the application runs; an intake under way ends before it does."""
        collector = asyncio.create_task(self._collect())
        try:
            yield
        finally:
            collector.cancel()
            await asyncio.to_thread(self._pool.shutdown, wait=True, cancel_futures=True)
            self._denials.close()

    async def _collect(self) -> None:
        while True:
            await asyncio.to_thread(self._uploads.collect, self._idle_seconds)
            await asyncio.sleep(_COLLECT_SECONDS)


class _Versioned:
    """Every answer states this exchange's protocol, and a request of another protocol hears of both."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stated(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = (PROTOCOL_HEADER.encode("ascii"), str(PROTOCOL).encode("ascii"))
                message = {**message, "headers": [*message.get("headers", ()), own]}
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = _VERSION.match(scope["path"])
        if asked and int(asked[1]) != PROTOCOL:
            text = f"this exchange speaks protocol {PROTOCOL}, the request is of protocol {int(asked[1])}"
            problem = JSONResponse({"reason": "WrongBinding", "message": text}, 400, headers={"Connection": "close"})
            await problem(scope, receive, stated)
            return
        await self._app(scope, receive, stated)


def _json(content: Offers | Status, *, status: int = 200) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(content.model_dump_json(), status, headers=headers, media_type="application/json")


def _range(asked: str | None, size: int) -> tuple[int, int]:
    """Return the first byte to send and the one after the last.

    Raises:
        Refusal: 416 when the file has no such bytes, or several ranges are asked for.
    """
    if asked is None:
        return 0, size
    found = _RANGE.fullmatch(asked)
    start = int(found[1]) if found else size
    end = min(int(found[2]) + 1, size) if found and found[2] else size
    if not found or start >= end:
        raise Refusal(416, "WrongOffset", f"this file has {size} bytes")
    return start, end
