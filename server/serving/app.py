"""The OpenAI interface over one engine: routes, the bearer key, streams, and errors in OpenAI's shape.

GET /v1/models, POST /v1/completions, POST /v1/chat/completions, each with the key; GET /health without.
The key, prompts and answers are never logged.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from offsite.errors import OffsiteError
from server.serving.engine import ClientGone, Engine
from server.serving.protocol import ApiError, ChatAsk, CompletionAsk, Reply, parse, sse

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DRAIN = 16  # a body over the limit is read and dropped up to this many limits, so that its sender hears why


class Stream(Response):
    """Server-sent events whose whole life, from the queue to the last byte, lies inside one call.

    Events are pulled from an async generator that is closed on every way out. The status is sent with the
    first event, so an error before it is an ordinary reply.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, one body chunk each."""
        started = False
        async with aclosing(self._events) as events:
            async for event in events:
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    started = True
                if event:
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class App:
    """The routes over one engine."""

    def __init__(self, engine: Engine, *, model_id: str, key: str | None, limit_bytes: int) -> None:
        self._engine, self._model_id, self._key, self._limit_bytes = engine, model_id, key, limit_bytes
        self._created = int(time.time())

    def add_routes(self, app: FastAPI) -> None:
        """The routes and the error replies are part of `app`."""
        router = APIRouter(prefix="/v1", dependencies=[Depends(self.authorise)])
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models/{model_id:path}", self.model, methods=["GET"])
        router.add_api_route("/completions", self.completions, methods=["POST"], response_model=None)
        router.add_api_route("/chat/completions", self.chat, methods=["POST"], response_model=None)
        app.include_router(router)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_exception_handler(ApiError, self.refuse)
        app.add_exception_handler(HTTPException, self.refuse)
        app.add_exception_handler(OffsiteError, self.refuse)
        app.add_exception_handler(ClientGone, self.give_up)
        app.add_exception_handler(ClientDisconnect, self.give_up)
        app.add_exception_handler(Exception, self.refuse)

    async def authorise(self, request: Request) -> None:
        """Return when the request bears the key. Comparing takes the same time wherever the keys differ."""
        self._engine.counts.num_requests += 1
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key.encode()):
            return
        message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def health(self) -> dict[str, str]:
        """Tell that the server answers."""
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, model_id: str) -> dict[str, Any]:
        """Describe the one model."""
        self._check_model(model_id)
        return self._card()

    async def completions(self, request: Request) -> Response:
        """Continue one or more prompts."""
        ask = parse(await self._body(request), CompletionAsk)
        self._engine.counts.num_completions += 1
        return await self._answer(request, ask)

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        ask = parse(await self._body(request), ChatAsk)
        self._engine.counts.num_chat_completions += 1
        return await self._answer(request, ask)

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Turn an error into an OpenAI-shaped reply."""
        self._engine.counts.num_refused += 1
        told = _as_api_error(error)
        return JSONResponse(told.body, status_code=told.status, headers=told.headers)

    async def give_up(self, request: Request, error: Exception) -> Response:
        """End a request whose client left; nobody reads this."""
        self._engine.counts.num_broken_off += 1
        return Response(status_code=499)

    async def _answer(self, request: Request, ask: CompletionAsk | ChatAsk) -> Response:
        self._check_model(ask.model)
        reply = Reply(self._model_id, is_chat=isinstance(ask, ChatAsk), wants_usage=ask.wants_usage)
        if ask.stream:
            return Stream(self._events(request, ask, reply))
        async with self._engine.admitted(ask) as job:
            texts, finishes, num_tokens = [""] * len(job.prompts), [""] * len(job.prompts), 0
            async with aclosing(self._engine.answer(job, request.is_disconnected)) as pieces:
                async for index, piece in pieces:
                    texts[index] += piece.text
                    finishes[index] = piece.finish or ""
                    num_tokens += 1
        return JSONResponse(reply.whole(list(zip(texts, finishes, strict=True)), job.usage(num_tokens)))

    async def _events(self, request: Request, ask: CompletionAsk | ChatAsk, reply: Reply) -> AsyncGenerator[str, None]:
        num_tokens = 0
        async with self._engine.admitted(ask) as job:
            yield reply.opening()
            try:
                async with aclosing(self._engine.answer(job, request.is_disconnected)) as pieces:
                    async for index, piece in pieces:
                        num_tokens += 1
                        yield reply.part(index, piece.text, piece.finish)
            except ClientGone:
                self._engine.counts.num_broken_off += 1
                return
            except (ApiError, OffsiteError) as error:  # the status is sent already: the error is an event
                self._engine.counts.num_broken_off += 1
                yield sse(_as_api_error(error).body)
                return
        yield reply.closing(job.usage(num_tokens))

    async def _body(self, request: Request) -> bytes:
        body, num_bytes = bytearray(), 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes <= self._limit_bytes:
                body += chunk
            elif num_bytes > _DRAIN * self._limit_bytes:
                break
        if num_bytes > self._limit_bytes:
            raise ApiError(413, f"the body is over {self._limit_bytes} bytes", code="request_too_large")
        return bytes(body)

    def _check_model(self, model_id: str) -> None:
        if model_id != self._model_id:
            message = f"there is no model of this name here; the one served is {self._model_id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _card(self) -> dict[str, Any]:
        return {"id": self._model_id, "object": "model", "created": self._created, "owned_by": "offsite"}


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        known = {404: "there is nothing at this address", 405: "this address does not answer to this method"}
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = known.get(error.status_code, error.detail)
        return ApiError(error.status_code, message, code=code, headers=error.headers)
    # an OffsiteError is written for people; anything else is a bug, shown on the server's own stderr
    message = str(error) if isinstance(error, OffsiteError) else "the server failed at this request"
    return ApiError(500, message, kind="server_error", code="internal_error")


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_id: str,
    key: str | None,
    context: int = 0,
    limit_tokens: int = 1024,
    limit_waiting: int = 8,
    limit_bytes: int = 1_048_576,
) -> FastAPI:
    """Return the application that serves `model`; its engine is ``app.state.engine``.

    Args:
        model: a causal language model in eval mode, or a PEFT model around one.
        tokenizer: its own.
        model_id: the name clients ask for.
        key: the bearer key under /v1; None leaves it open, for an embedder with its own checks.
        context: tokens of prompt and answer together; 0 for what the model was made for.
        limit_tokens: most tokens in one answer.
        limit_waiting: requests that may wait behind the one being answered; more get 429.
        limit_bytes: largest request body; larger gets 413.
    """
    engine = Engine(model, tokenizer, context=context, limit_tokens=limit_tokens, limit_waiting=limit_waiting)
    app = FastAPI(title="offsite", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.engine = engine
    App(engine, model_id=model_id, key=key, limit_bytes=limit_bytes).add_routes(app)
    return app
