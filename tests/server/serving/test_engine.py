"""The queue: its bound, its order, and who may leave it when."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from server.serving.engine import ClientGone, Engine
from server.serving.protocol import ApiError, CompletionAsk


def ask(prompt="x", **fields):
    return CompletionAsk(model="m", prompt=prompt, **fields)


async def here():
    return False


async def left():
    return True


async def text_of(engine, asked, gone=here):
    async with engine.admitted(asked) as job, aclosing(engine.answer(job, gone)) as pieces:
        return "".join([piece.text async for _, piece in pieces])


def test_requests_are_answered_whole_and_in_order(parrot, bytes_tokenizer):
    engine, order = Engine(parrot("the cough"), bytes_tokenizer), []

    async def one(number):
        assert await text_of(engine, ask(max_tokens=20)) == "the cough"
        order.append(number)

    async def all_of_them():
        await asyncio.gather(*map(one, range(5)))

    asyncio.run(all_of_them())
    assert order == list(range(5))
    assert engine.counts.num_prompt_tokens == 5


def test_the_queue_is_bounded_and_every_way_out_frees_a_place(parrot, bytes_tokenizer):
    async def run():
        engine = Engine(parrot("the cough"), bytes_tokenizer, limit_waiting=2)
        outcomes = await asyncio.gather(*(text_of(engine, ask()) for _ in range(5)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [str, str, str, ApiError, ApiError]
        assert outcomes[-1].status == 429
        with pytest.raises(ApiError) as caught:
            await text_of(engine, ask(prompt=[10**6]))
        assert caught.value.status == 400
        with pytest.raises(ClientGone):
            await text_of(engine, ask(), gone=left)
        assert engine.num_inside == 0
        assert await text_of(engine, ask()) == "the cough"

    asyncio.run(run())


def test_a_cancelled_request_hands_its_turn_on(parrot, bytes_tokenizer):
    async def run():
        engine = Engine(parrot("the cough " * 50), bytes_tokenizer)
        running, waiting, last = (asyncio.ensure_future(text_of(engine, ask(max_tokens=300))) for _ in range(3))
        while engine.counts.num_completion_tokens < 2:
            await asyncio.sleep(0)
        waiting.cancel()
        running.cancel()
        assert await last == "the cough " * 50
        assert waiting.cancelled()
        assert running.cancelled()
        assert engine.num_inside == 0

    asyncio.run(run())


def test_a_stopping_engine_answers_nobody(parrot, bytes_tokenizer):
    async def run():
        engine = Engine(parrot("the cough"), bytes_tokenizer)
        engine.stop()
        with pytest.raises(ApiError, match="shutting down"):
            await text_of(engine, ask())

    asyncio.run(run())


def test_the_context_may_be_set_smaller(parrot, bytes_tokenizer):
    async def run():
        engine = Engine(parrot("the cough"), bytes_tokenizer, context=5)
        async with engine.admitted(ask(prompt=[4, 4, 4], max_tokens=50)) as job:
            assert [settings.limit_tokens for settings in job.settings] == [2]
        with pytest.raises(ApiError) as caught:
            await text_of(engine, ask(prompt=[4] * 5))
        assert caught.value.body["error"]["code"] == "context_length_exceeded"

    asyncio.run(run())
