"""One model shared by many requests: one answer at a time, a bounded queue, and an end for what nobody reads.

The event loop stays free: everything that touches the model or the tokenizer runs in one worker thread,
a token at a time, so that between two tokens a client that left, or a server that stops, is noticed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread

from offsite.errors import DataError
from offsite.modelling.steps import cache_is_right
from offsite.text.calls import quietly
from offsite.text.prompts import prompt_ids
from server.serving.generate import (
    Piece,
    Settings,
    context_length,
    embedding_table,
    end_of_turn_tokens,
    end_tokens,
    generate,
)
from server.serving.protocol import ApiError, Ask, ChatAsk, CompletionAsk, Message, Prompt, Usage

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


@dataclass(frozen=True)
class Job:
    """An admitted request: its prompts as tokens, and how each answer is drawn."""

    prompts: tuple[tuple[int, ...], ...]
    settings: tuple[Settings, ...]
    end_ids: frozenset[int]
    continues: bool

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    def usage(self, num_answer: int) -> Usage:
        """Return the usage after `num_answer` generated tokens, of all answers together."""
        return Usage(self.num_prompt_tokens, num_answer)


class Engine:
    """A model, its tokenizer, and the queue before them.

    Args:
        model: a causal language model in eval mode, or a PEFT model around one.
        tokenizer: its own.
        context: tokens of prompt and answer together; 0 for what the model was made for.
        limit_tokens: most tokens in one answer.
        limit_waiting: requests that may wait behind the one being answered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int = 0,
        limit_tokens: int = 1024,
        limit_waiting: int = 8,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._context = context_length(model, tokenizer, context)
        self._limit_tokens, self._limit_waiting = limit_tokens, limit_waiting
        self._cached = cache_is_right(model)
        self._num_vocabulary = int(embedding_table(model).shape[0])
        self._end_ids = end_tokens(model, tokenizer)
        self._turn_ids = end_of_turn_tokens(tokenizer) if tokenizer.chat_template else frozenset()
        self._lock, self._worker = asyncio.Lock(), anyio.CapacityLimiter(1)
        self._stopping = False
        self.num_inside = 0  # requests being answered or waiting
        self.counts = Counts()

    def stop(self) -> None:
        """Answers under way break off after their next token; may be called from a signal handler."""
        self._stopping = True

    @asynccontextmanager
    async def admitted(self, ask: CompletionAsk | ChatAsk) -> AsyncIterator[Job]:
        """Hold a place in the queue for `ask`, its prompts turned into tokens.

        Raises:
            ApiError: 429 when the queue is full; 400 when a prompt does not fit, holds unknown tokens, or the
                chat template refuses the messages.
        """
        with self._place():
            yield await self._in_thread(lambda: self._job(ask))

    async def answer(self, job: Job, gone: Callable[[], Awaitable[bool]]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Wait for the turn, then yield (number of the prompt, piece) in order.

        Args:
            job: an admitted request.
            gone: tells whether the client left; asked before every token.

        Raises:
            ClientGone: the client left.
            ApiError: 503; the server is stopping.
            RunFailed: the model's scores hold NaN.
        """
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
                )
                while piece := await self._next(pieces, gone):
                    self.counts.num_completion_tokens += 1
                    yield index, piece

    async def _next(self, pieces: Iterator[Piece], gone: Callable[[], Awaitable[bool]]) -> Piece | None:
        if self._stopping:
            raise ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")
        if await gone():
            raise ClientGone
        return await self._in_thread(lambda: next(pieces, None))

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await anyio.to_thread.run_sync(work, limiter=self._worker)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.num_inside > self._limit_waiting:
            message = f"{self.num_inside - 1} requests are waiting already; try again later"
            raise ApiError(429, message, kind="rate_limit_error", code="queue_full", headers={"Retry-After": "1"})
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1

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

    def _job(self, ask: CompletionAsk | ChatAsk) -> Job:
        if isinstance(ask, ChatAsk):
            prompts: tuple[tuple[int, ...], ...] = (self._chat_ids(ask.messages),)
        else:
            prompts = tuple(map(self._prompt_ids, ask.prompt))
        settings = tuple(self._settings(ask, len(prompt_ids), ask.num_tokens) for prompt_ids in prompts)
        is_chat = isinstance(ask, ChatAsk)
        return Job(prompts, settings, self._end_ids | (self._turn_ids if is_chat else frozenset()), not is_chat)

    def _settings(self, ask: Ask, num_prompt: int, num_wanted: int | None) -> Settings:
        if any(token >= self._num_vocabulary for token, _ in ask.logit_bias):
            raise ApiError(400, f"logit_bias: token ids are 0 to {self._num_vocabulary - 1}", param="logit_bias")
        room = self._context - num_prompt
        if room < 1:
            message = f"the prompt has {num_prompt} tokens; the context is {self._context}, the answer's first included"
            raise ApiError(
                400, message, param="messages" if isinstance(ask, ChatAsk) else "prompt", code="context_length_exceeded"
            )
        return Settings(
            limit_tokens=min(num_wanted or room, room, self._limit_tokens),
            temperature=1.0 if ask.temperature is None else ask.temperature,
            top_k=max(ask.top_k or 0, 0),
            top_p=1.0 if ask.top_p is None else ask.top_p,
            min_p=ask.min_p or 0.0,
            repetition_penalty=1.0 if ask.repetition_penalty is None else ask.repetition_penalty,
            presence_penalty=ask.presence_penalty or 0.0,
            frequency_penalty=ask.frequency_penalty or 0.0,
            logit_bias=ask.logit_bias,
            seed=ask.seed,
            stop=ask.stop,
        )

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            if not all(0 <= token < self._num_vocabulary for token in prompt):
                raise ApiError(400, f"prompt: token ids are 0 to {self._num_vocabulary - 1}", param="prompt")
            return prompt
        try:
            ids = tuple(prompt_ids(self._tokenizer, prompt))
        except DataError as error:
            raise ApiError(400, str(error), param="prompt", code="tokenizer_failed") from None
        if ids:
            return ids
        start = next((token for token in self._starts() if token is not None), None)
        if start is None:
            raise ApiError(400, "prompt: is empty, and the model has no token to begin with", param="prompt")
        return (start,)

    def _starts(self) -> Sequence[int | None]:
        return self._tokenizer.bos_token_id, self._tokenizer.eos_token_id

    def _chat_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            message = "the model has no chat template; use /v1/completions, or add chat_template.jinja to its folder"
            raise ApiError(400, message, param="messages", code="no_chat_template")
        chat = [message.for_template for message in messages]

        def render() -> Any:
            # tokens that close a turn are plain text when a message holds them: a user cannot forge a turn
            return self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, sanitize_control_tokens=True)

        def refusal(_: str) -> ApiError:  # what was raised may quote the request, and is not told
            message = "the model's chat template refuses these messages; roles that it knows may have to alternate"
            return ApiError(400, message, param="messages", code="chat_template_refused")

        return tuple(quietly(render, refusal, compiled=True)["input_ids"])
