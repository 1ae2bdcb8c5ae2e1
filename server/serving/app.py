"""The OpenAI interface over one engine: routes, bearer keys, streams, and errors in OpenAI's shape.

GET /v1/models, POST /v1/completions, POST /v1/chat/completions, GET /v1/tasks, POST /v1/tasks/NAME, each with the
server's key or a tenant's; GET /metrics with the server's; GET /health without. Keys, prompts and answers are never
logged.
"""

from __future__ import annotations

import hmac
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from offsite.errors import OffsiteError
from offsite.generation.generate import Piece
from offsite.tasks.task import Task
from server.plugging.fit import Fitted
from server.plugging.offset import Offset
from server.serving.catalogue import Bundles, Catalogue, Served
from server.serving.engine import ClientGone, Engine
from server.serving.jobs import Job
from server.serving.metrics import CONTENT_TYPE, Metrics
from server.serving.protocol import ApiError, ChatAsk, CompletionAsk, Reply, TaskAsk, Usage, parse, sse
from server.serving.tasks import NUM_TRIES, Question, ServedTasks
from server.tenants.store import Tenant, Tenants, seconds_of_today, today

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


class Meter:
    """What one request has used so far."""

    def __init__(self) -> None:
        self.began, self.first_seconds, self.num_tokens = time.monotonic(), 0.0, 0

    def count(self) -> None:
        """One token more was written."""
        if not self.num_tokens:
            self.first_seconds = time.monotonic() - self.began
        self.num_tokens += 1


class App:
    """The routes over one engine.

    Args:
        engine: the model.
        catalogue: what is served on it.
        key: the server's own, which opens everything; None leaves all open.
        tenants: whose keys open the models that they may ask for.
        limit_bytes: largest request body.
        tasks: answered at their own addresses.
    """

    def __init__(
        self,
        engine: Engine,
        catalogue: Catalogue,
        *,
        key: str | None,
        tenants: Tenants | None,
        limit_bytes: int,
        tasks: ServedTasks,
    ) -> None:
        self._engine, self._catalogue, self._key, self._tenants = engine, catalogue, key, tenants
        self._tasks = tasks
        self._limit_bytes, self._metrics = limit_bytes, Metrics()
        self._under_way, self._promised = Counter[str](), Counter[str]()  # requests and tokens, by tenant

    def add_routes(self, app: FastAPI) -> None:
        """The routes and the error replies are part of `app`."""
        app.include_router(self.routes())
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"], response_model=None)
        app.add_exception_handler(ApiError, self.refuse)
        app.add_exception_handler(HTTPException, self.refuse)
        app.add_exception_handler(OffsiteError, self.refuse)
        app.add_exception_handler(ClientGone, self.give_up)
        app.add_exception_handler(ClientDisconnect, self.give_up)
        app.add_exception_handler(Exception, self.refuse)

    def routes(self) -> APIRouter:
        """Return the addresses that answer under /v1."""
        router = APIRouter(prefix="/v1", dependencies=[Depends(self.authorise)])
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models/{model_id:path}", self.model, methods=["GET"])
        router.add_api_route("/completions", self.completions, methods=["POST"], response_model=None)
        router.add_api_route("/chat/completions", self.chat, methods=["POST"], response_model=None)
        router.add_api_route("/tasks", self.tasks, methods=["GET"])
        router.add_api_route("/tasks/{name}", self.task, methods=["POST"], response_model=None)
        return router

    async def authorise(self, request: Request) -> None:
        """Return when the request bears the server's key or a tenant's, who is then known.

        Comparing with the server's takes the same time wherever the keys differ.
        """
        self._engine.counts.num_requests += 1
        request.state.tenant = None
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            if hmac.compare_digest(given.strip().encode(), self._key.encode()):
                return
            request.state.tenant = self._tenants.find(given.strip()) if self._tenants is not None else None
            if request.state.tenant is not None:
                return
        message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def health(self) -> dict[str, str]:
        """Tell that the server answers."""
        return {"status": "ok"}

    async def metrics(self, request: Request) -> Response:
        """Tell what was done and is being done, to whoever bears the server's own key."""
        await self.authorise(request)
        if request.state.tenant is not None:
            raise ApiError(403, "metrics are for the server's own key", code="forbidden")
        gauges: dict[str, float] = {
            "offsite_requests_inside": self._engine.num_inside,
            "offsite_models": len(await self._catalogue.names()),
        }
        if self._engine.batch is not None:
            gauges["offsite_rows_inside"] = len(self._engine.batch.inside)
            gauges["offsite_rows_waiting"] = len(self._engine.batch.queue)
            gauges["offsite_cache_bytes"] = self._engine.batch.num_cache_bytes
        return Response(self._metrics.text(gauges), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> dict[str, Any]:
        """List what whoever asks may ask for."""
        named = await self._catalogue.names()
        return {"object": "list", "data": [_card(one) for one in named.values() if _may(request, one.name)]}

    async def model(self, request: Request, model_id: str) -> dict[str, Any]:
        """Describe one of them."""
        return _card(await self._find(request, model_id))

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

    async def tasks(self) -> dict[str, Any]:
        """List the tasks that are served."""
        return {"object": "list", "data": self._tasks.cards()}

    async def task(self, request: Request, name: str) -> Response:
        """Answer an input of a task in its form; what was written twice without it is told as an error."""
        given = parse(await self._body(request), TaskAsk)
        question = self._tasks.question(name, given)
        served = await self._find(request, given.model or await self._only(request))
        spent = Counter[str]()
        for number in range(NUM_TRIES):
            text, usage = await self._written(request, question, served, number)
            spent.update(usage.body)
            answer = question.checked(text)
            if answer is not None:
                stated = {"object": "task.answer", "task": name, "model": served.name, "answer": answer}
                return JSONResponse({**stated, "num_tries": number + 1, "usage": dict(spent)})
        raise question.malformed()

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Turn an error into an OpenAI-shaped reply."""
        self._engine.counts.num_refused += 1
        told = _as_api_error(error)
        self._metrics.add("offsite_refused_total", status=str(told.status))
        return JSONResponse(told.body, status_code=told.status, headers=told.headers)

    async def give_up(self, request: Request, error: Exception) -> Response:
        """End a request whose client left; nobody reads this."""
        self._broke_off()
        return Response(status_code=499)

    def _broke_off(self) -> None:
        self._engine.counts.num_broken_off += 1
        self._metrics.add("offsite_broken_off_total")

    async def _answer(self, request: Request, ask: CompletionAsk | ChatAsk) -> Response:
        served = await self._find(request, ask.model)
        reply = Reply(served.name, is_chat=isinstance(ask, ChatAsk), wants_usage=ask.wants_usage)
        if ask.stream:
            return Stream(self._events(request, ask, served, reply))
        tenant: Tenant | None = request.state.tenant
        with self._at_once(tenant):
            async with self._engine.admitted(ask, served.adapter, _whose(tenant, served)) as job:
                answers: list[list[Piece]] = [[] for _ in job.prompts]
                with self._metered(tenant, served, job) as meter:
                    async with aclosing(self._engine.answer(job, request.is_disconnected)) as pieces:
                        async for index, piece in pieces:
                            answers[index].append(piece)
                            meter.count()
        return JSONResponse(reply.whole(answers, job.usage(meter.num_tokens)))

    async def _written(self, request: Request, question: Question, served: Served, number: int) -> tuple[str, Usage]:
        """Return what the model wrote to a task's input at that try, as far as it counts."""
        tenant: Tenant | None = request.state.tenant
        ask, text = question.ask(served.name, number), ""
        held_to = partial(self._tasks.grammar, question)
        with self._at_once(tenant):
            async with self._engine.admitted(ask, served.adapter, _whose(tenant, served), held_to) as job:
                with self._metered(tenant, served, job) as meter:
                    async with aclosing(self._engine.answer(job, request.is_disconnected)) as pieces:
                        async for _, piece in pieces:
                            text += piece.text
                            meter.count()
                            if question.is_whole(text):
                                break
        return text, job.usage(meter.num_tokens)

    async def _only(self, request: Request) -> str:
        """Return the name of the one model that may be asked for."""
        known = [name for name in await self._catalogue.names() if _may(request, name)]
        if len(known) == 1:
            return known[0]
        raise ApiError(400, "model: is missing; GET /v1/models lists what is served", param="model")

    async def _events(
        self, request: Request, ask: CompletionAsk | ChatAsk, served: Served, reply: Reply
    ) -> AsyncGenerator[str, None]:
        tenant: Tenant | None = request.state.tenant
        with self._at_once(tenant):
            async with self._engine.admitted(ask, served.adapter, _whose(tenant, served)) as job:
                with self._metered(tenant, served, job) as meter:
                    yield reply.opening(job.num_answers)
                    try:
                        async with aclosing(self._engine.answer(job, request.is_disconnected)) as pieces:
                            async for index, piece in pieces:
                                meter.count()
                                yield reply.part(index, piece)
                    except ClientGone:
                        self._broke_off()
                        return
                    except (ApiError, OffsiteError) as error:  # the status is sent already: the error is an event
                        self._broke_off()
                        yield sse(_as_api_error(error).body)
                        return
        yield reply.closing(job.usage(meter.num_tokens))

    @contextmanager
    def _at_once(self, tenant: Tenant | None) -> Iterator[None]:
        """The tenant has one request more under way inside; 429 when that would be too many."""
        if tenant is None:
            yield
            return
        if tenant.requests_at_once and self._under_way[tenant.name] >= tenant.requests_at_once:
            message = f"{self._under_way[tenant.name]} requests of this key are under way, the most it may have"
            raise _too_much(message, "requests_at_once", 1)
        self._under_way[tenant.name] += 1
        try:
            yield
        finally:
            self._under_way[tenant.name] -= 1

    @contextmanager
    def _metered(self, tenant: Tenant | None, served: Served, job: Job) -> Iterator[Meter]:
        """What is written inside is charged, also when it is broken off; 429 when the day's tokens could be passed."""
        meter, name = Meter(), tenant.name if tenant is not None else ""
        if tenant is not None and tenant.tokens_per_day and self._tenants is not None:
            gone = self._tenants.used(name, day=today()).num_tokens + self._promised[name]
            if gone + job.most_tokens > tenant.tokens_per_day:
                left = max(tenant.tokens_per_day - gone, 0)
                message = f"prompt and answer may take {job.most_tokens} tokens, this key has {left} left today"
                raise _too_much(message, "tokens_per_day", seconds_of_today())
        self._promised[name] += job.most_tokens
        try:
            yield meter
        finally:
            self._promised[name] -= job.most_tokens
            if tenant is not None and self._tenants is not None:
                counts = {"num_prompt_tokens": job.num_prompt_tokens, "num_answer_tokens": meter.num_tokens}
                self._tenants.charge(name, **counts)
            self._measure(name, served, job, meter)

    def _measure(self, tenant: str, served: Served, job: Job, meter: Meter) -> None:
        for name, amount in (
            ("offsite_requests_total", 1.0),
            ("offsite_prompt_tokens_total", job.num_prompt_tokens),
            ("offsite_answer_tokens_total", meter.num_tokens),
            ("offsite_request_seconds_total", time.monotonic() - meter.began),
            ("offsite_first_token_seconds_total", meter.first_seconds),
        ):
            self._metrics.add(name, amount, model=served.name, tenant=tenant)

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

    async def _find(self, request: Request, model_id: str) -> Served:
        named = await self._catalogue.names()
        found = named.get(model_id)
        if found is not None and _may(request, model_id):
            return found
        known = sorted(name for name in named if _may(request, name))  # another tenant's is not even told
        served = f"the one served is {known[0]!r}" if len(known) == 1 else "GET /v1/models lists what is served"
        message = f"there is no model of this name here; {served}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _may(request: Request, model_id: str) -> bool:
    tenant: Tenant | None = request.state.tenant
    return tenant is None or tenant.may_ask(model_id)


def _whose(tenant: Tenant | None, served: Served) -> str:
    """Return between whom turns are taken: tenants; without them, the names that are asked for."""
    return f"model {served.name}" if tenant is None else f"tenant {tenant.name}"


def _card(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "offsite"}


def _too_much(message: str, code: str, wait_seconds: int) -> ApiError:
    headers = {"Retry-After": str(wait_seconds)}
    return ApiError(429, message, kind="rate_limit_error", code=code, headers=headers)


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
    limit_rows: int = 16,
    limit_cache_bytes: int = 0,
    prefill_tokens: int = 128,
    adapters: Mapping[str, Fitted] | None = None,
    bundles: Bundles | None = None,
    tenants: Tenants | None = None,
    offset: Offset | None = None,
    stands: Callable[[], bool] | None = None,
    each_stands: Mapping[str, Callable[[], bool]] | None = None,
    tasks: Sequence[Task] = (),
) -> FastAPI:
    """Return the application that serves `model`; its engine is ``app.state.engine``.

    Args:
        model: a causal language model in eval mode, or a PEFT model around one.
        tokenizer: its own.
        model_id: the name clients ask for.
        key: the bearer key under /v1; None leaves it open, for an embedder with its own checks.
        context: tokens of prompt and answer together; 0 for what the model was made for.
        limit_tokens: most tokens in one answer.
        limit_waiting: requests that may wait behind those being answered; more get 429.
        limit_bytes: largest request body; larger gets 413.
        limit_rows: answers that are written together.
        limit_cache_bytes: keys and values of all answers under way; 0 as `Engine` has it.
        prefill_tokens: of prompts in one forward pass.
        adapters: more names, each the model with that adapter; it must carry none then.
        bundles: of a registry, served beside them as they come and go.
        tenants: whose keys are taken beside `key`.
        offset: an emulator and its adapter that move the model's scores in every answer.
        stands: tells, whenever somebody asks, whether the model may still be served; None, and it always may.
        each_stands: the same of adapters, by their names in `adapters`.
        tasks: answered at ``/v1/tasks/NAME``.

    Raises:
        ConfigError: when the emulator is of another architecture, or scores other tokens.
        WrongNames, WrongShape: when an adapter does not fit the model.
    """
    engine = Engine(
        model,
        tokenizer,
        context=context,
        limit_tokens=limit_tokens,
        limit_waiting=limit_waiting,
        limit_rows=limit_rows,
        limit_cache_bytes=limit_cache_bytes,
        prefill_tokens=prefill_tokens,
        offset=offset,
    )
    fixed = {model_id: Served(model_id)}
    for name, adapter in (adapters or {}).items():
        fixed[name] = Served(name, engine.rows.put_on(adapter))
    app = FastAPI(title="offsite", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.engine = engine
    catalogue = Catalogue(engine, fixed, bundles, stands, each_stands)
    served = ServedTasks(tasks)
    App(engine, catalogue, key=key, tenants=tenants, limit_bytes=limit_bytes, tasks=served).add_routes(app)
    return app
