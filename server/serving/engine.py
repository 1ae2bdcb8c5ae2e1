"""One model shared by many requests: answers that are written together, a bounded queue, an end for what nobody reads.

The event loop stays free: everything that touches the model or the tokenizer runs in one worker thread,
a token at a time, so that between two tokens a client that left, or a server that stops, is noticed. A model whose
rows cannot be computed together (`server.batching.batches`) answers one request at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from offsite.console import say
from offsite.generation.generate import Answer, Piece, generate
from offsite.modelling.steps import cache_is_right
from server.batching.batch import Batch, Row, Told
from server.batching.batches import beside, cost_of
from server.batching.cache import padded
from server.batching.rows import RowAdapter, Rows
from server.plugging.offset import Offset, require_alike, stay_offset
from server.serving.grammar import Grammar, Grammars
from server.serving.jobs import Job, Jobs
from server.serving.protocol import ApiError, ChatAsk, CompletionAsk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOOK_SECONDS = 0.25  # how often a waiting request looks whether its client is still there

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed its connection; nobody reads the rest."""


@dataclass
class Counts:
    """What was done since the start."""

    num_requests: int = 0
    num_completions: int = 0
    num_chat_completions: int = 0
    num_refused: int = 0
    num_broken_off: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts as JSON."""
        return asdict(self)


class Engine:
    """A model, its tokenizer, the adapters on it, and the queue before them.

    Args:
        model: a causal language model in eval mode, or a PEFT model around one.
        tokenizer: its own.
        context: tokens of prompt and answer together; 0 for what the model was made for.
        limit_tokens: most tokens in one answer.
        limit_waiting: requests that may wait behind those being answered.
        limit_rows: answers that are written together; 1 writes one at a time.
        limit_cache_bytes: keys and values of all answers under way; 0 for 2 GiB, or for one answer of the whole context
            needs where that is more.
        prefill_tokens: of prompts in one forward pass.
        offset: what moves the scores of every answer; the model must carry no adapter then.

    Raises:
        ConfigError: when the emulator is of another architecture, or scores other tokens.
        WrongNames, WrongShape, UnsupportedModel: when the adapter does not fit the emulator.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int = 0,
        limit_tokens: int = 1024,
        limit_waiting: int = 8,
        limit_rows: int = 16,
        limit_cache_bytes: int = 0,
        prefill_tokens: int = 128,
        offset: Offset | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._jobs = Jobs(model, tokenizer, context=context, limit_tokens=limit_tokens)
        self._limit_waiting = limit_waiting
        self._limit_cache_bytes, self._bytes_per_token = limit_cache_bytes, 0
        self._cached = cache_is_right(model)
        self._lock, self._worker = asyncio.Lock(), anyio.CapacityLimiter(1)
        self._stopping = False
        self.num_inside = 0  # requests being answered or waiting
        self._inside_bytes = 0  # of the caches that they may come to need
        self._num_crowded = 0  # of them, those that came when the cache had no room for them
        self._uses, self._retired = dict[RowAdapter, int](), set[RowAdapter]()
        self.counts = Counts()
        plain: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.rows = Rows(plain)
        if offset is not None:
            require_alike(plain, offset.emulator)
        self.batch = self._batch_of(plain, offset, limit_rows, prefill_tokens) if limit_rows > 1 else None
        if offset is not None and self.batch is None:
            stay_offset(plain, offset)
            self._cached = self._cached and cache_is_right(plain)
        self._limit_rows = limit_rows if self.batch is not None else 1
        self._steps: asyncio.Task[None] | None = None

    def _batch_of(
        self, model: PreTrainedModel, offset: Offset | None, limit_rows: int, prefill_tokens: int
    ) -> Batch | None:
        if not self._cached:  # that was said
            return None
        cost = cost_of(model)
        emulator = beside(offset) if offset is not None and not isinstance(cost, str) else None
        for reason in (cost, emulator):
            if isinstance(reason, str):
                say(f"answers are written one at a time: {reason}")
        if isinstance(cost, str) or isinstance(emulator, str):
            return None
        num_layers, self._bytes_per_token = cost
        if emulator is not None:  # two rows of its cache for each answer
            self._bytes_per_token += 2 * emulator.bytes_per_token
        if not self._limit_cache_bytes:
            self._limit_cache_bytes = max(2**31, padded(self._jobs.context) * self._bytes_per_token)
        return Batch(
            model,
            self.rows,
            num_layers=num_layers,
            bytes_per_token=self._bytes_per_token,
            limit_rows=limit_rows,
            limit_bytes=self._limit_cache_bytes,
            prefill_tokens=prefill_tokens,
            beside=emulator,
        )

    def stop(self) -> None:
        """Answers under way break off after their next token; may be called from a signal handler."""
        self._stopping = True

    @asynccontextmanager
    async def admitted(
        self,
        ask: CompletionAsk | ChatAsk,
        adapter: RowAdapter | None = None,
        tenant: str = "",
        held_to: Callable[[Grammars], Grammar | None] | None = None,
    ) -> AsyncIterator[Job]:
        """Hold a place in the queue for `ask`, its prompts turned into tokens.

        Args:
            adapter: what `rows` put on the model, for this request; None for the model alone.
            tenant: whose request it is: tenants are answered in turn.
            held_to: makes what the answers are held to, where the request itself does not say; in a thread of its own.

        Raises:
            ApiError: 429 when the queue is full; 404 when the adapter was taken off meanwhile; 400 when a prompt does
                not fit, holds unknown tokens, or the chat template refuses the messages.
        """
        with self._place(), self._used(adapter):
            if self._retired:
                await self.in_thread(self._take_off_unused)
            schema = ask.schema_asked if isinstance(ask, ChatAsk) else None
            grammar = None if schema is None else await asyncio.to_thread(self._jobs.grammars.of, schema)
            grammar = grammar if held_to is None else await asyncio.to_thread(held_to, self._jobs.grammars)
            job = replace(await self.in_thread(lambda: self._jobs.of(ask, adapter, tenant)), grammar=grammar)
            if adapter is not None and not adapter.is_on:  # it was taken off before it was in use here
                raise ApiError(404, "this model is served no longer", code="model_not_found")
            with self._cache_place(job):
                yield job

    async def answer(self, job: Job, gone: Callable[[], Awaitable[bool]]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Wait for the turn, then yield (number of the prompt, piece), each answer's pieces in order.

        Args:
            job: an admitted request.
            gone: tells whether the client left; asked before every token.

        Raises:
            ClientGone: the client left.
            ApiError: 503; the server is stopping.
            RunFailed: the model's scores hold NaN.
        """
        pieces = self._one_by_one(job, gone) if self.batch is None else self._together(self.batch, job, gone)
        async with aclosing(pieces):
            async for index, piece in pieces:
                self.counts.num_completion_tokens += 1
                yield index, piece

    async def retire(self, adapter: RowAdapter) -> None:
        """The adapter is off the model, now or when the last answer with it is written."""
        self._retired.add(adapter)
        await self.in_thread(self._take_off_unused)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns, from the one thread that touches the model and the tokenizer."""
        return await anyio.to_thread.run_sync(work, limiter=self._worker)

    async def _one_by_one(
        self, job: Job, gone: Callable[[], Awaitable[bool]]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        async with self._turn(gone):
            self.counts.num_prompt_tokens += job.num_prompt_tokens
            for index, (prompt_ids, settings) in enumerate(zip(job.prompts, job.settings, strict=True)):
                pieces = generate(
                    self._model,
                    self._tokenizer,
                    prompt_ids,
                    settings,
                    end_ids=job.end_ids,
                    continues=job.continues,
                    cached=self._cached,
                    grammar=job.grammar.copy() if job.grammar is not None else None,
                )
                while piece := await self._next(pieces, job.adapter, gone):
                    yield index, piece

    async def _next(
        self, pieces: Iterator[Piece], adapter: RowAdapter | None, gone: Callable[[], Awaitable[bool]]
    ) -> Piece | None:
        await self._look(gone)

        def next_piece() -> Piece | None:
            with self.rows.of([adapter]):
                return next(pieces, None)

        return await self.in_thread(next_piece)

    async def _together(
        self, batch: Batch, job: Job, gone: Callable[[], Awaitable[bool]]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        loop, told = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Told]]()

        def hear(index: int, what: Told) -> None:
            loop.call_soon_threadsafe(told.put_nowait, (index, what))

        def rows_of() -> list[Row]:
            return [
                Row(
                    prompt_ids,
                    settings,
                    Answer(self._tokenizer, prompt_ids, settings, end_ids=job.end_ids, continues=job.continues),
                    partial(hear, index),
                    job.adapter,
                    job.tenant,
                    job.grammar.copy() if job.grammar is not None else None,
                )
                for index, (prompt_ids, settings) in enumerate(zip(job.prompts, job.settings, strict=True))
            ]

        rows = await self.in_thread(rows_of)
        try:
            self.counts.num_prompt_tokens += job.num_prompt_tokens
            for row in rows:
                batch.submit(row)
            self._keep_stepping(batch)
            num_open = len(rows)
            while num_open:
                await self._look(gone)
                try:
                    index, what = await asyncio.wait_for(told.get(), _LOOK_SECONDS)
                except TimeoutError:
                    continue
                if isinstance(what, Exception):
                    raise what
                num_open -= what.finish is not None
                yield index, what
        finally:
            for row in rows:
                row.leave()

    def _keep_stepping(self, batch: Batch) -> None:
        """The batch steps until it is idle."""
        if self._steps is None or self._steps.done():
            self._steps = asyncio.ensure_future(self._step(batch))
            self._steps.add_done_callback(partial(self._stepped, batch))

    async def _step(self, batch: Batch) -> None:
        while not batch.is_idle:
            if self._stopping:
                batch.end(_shutting_down())
            else:
                await self.in_thread(batch.step)

    def _stepped(self, batch: Batch, done: asyncio.Task[None]) -> None:
        """Nobody waits for answers that a bug has ended; it is shown by whoever asked."""
        error = None if done.cancelled() else done.exception()
        if isinstance(error, Exception):
            batch.end(error)
        elif not batch.is_idle and not done.cancelled():
            self._keep_stepping(batch)

    async def _look(self, gone: Callable[[], Awaitable[bool]]) -> None:
        if self._stopping:
            raise _shutting_down()
        if await gone():
            raise ClientGone

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.num_inside >= self._limit_rows + self._limit_waiting:
            raise _busy(f"{self.num_inside - self._limit_rows} requests are waiting already", "queue_full")
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1

    @contextmanager
    def _cache_place(self, job: Job) -> Iterator[None]:
        if self.batch is None:
            yield
            return
        sizes = [
            len(prompt) + settings.limit_tokens - 1 for prompt, settings in zip(job.prompts, job.settings, strict=True)
        ]
        if not all(map(self.batch.fits, sizes)):
            most = self._limit_cache_bytes // self._bytes_per_token
            message = f"prompt and answer have {max(sizes)} tokens together; the server's cache holds {most}"
            raise ApiError(400, f"{message}; ask for fewer max_tokens", code="context_length_exceeded")
        num_bytes = sum(map(padded, sizes)) * self._bytes_per_token
        is_crowded = self._inside_bytes > 0 and self._inside_bytes + num_bytes > self._limit_cache_bytes
        if is_crowded and self._num_crowded >= self._limit_waiting:
            raise _busy(f"the cache is full, and {self._num_crowded} requests are waiting for it", "cache_full")
        self._inside_bytes += num_bytes
        self._num_crowded += is_crowded
        try:
            yield
        finally:
            self._inside_bytes -= num_bytes
            self._num_crowded -= is_crowded

    @contextmanager
    def _used(self, adapter: RowAdapter | None) -> Iterator[None]:
        if adapter is None:
            yield
            return
        self._uses[adapter] = self._uses.get(adapter, 0) + 1
        try:
            yield
        finally:
            self._uses[adapter] -= 1
            if not self._uses[adapter]:
                del self._uses[adapter]

    def _take_off_unused(self) -> None:
        for adapter in [one for one in list(self._retired) if one not in self._uses]:
            self._retired.discard(adapter)
            self.rows.take_off(adapter)

    @asynccontextmanager
    async def _turn(self, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[None]:
        taking = asyncio.ensure_future(self._lock.acquire())
        try:
            while not (await asyncio.wait({taking}, timeout=_LOOK_SECONDS))[0]:
                if await gone():
                    raise ClientGone
            yield
        finally:
            if not taking.cancel():  # too late to cancel: the lock is ours
                self._lock.release()


def _busy(reason: str, code: str) -> ApiError:
    return ApiError(429, f"{reason}; try again later", kind="rate_limit_error", code=code, headers={"Retry-After": "1"})


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")
