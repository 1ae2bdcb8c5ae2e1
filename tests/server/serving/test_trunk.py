"""One model, many adapters, many clients: over HTTP, with the official client."""

from __future__ import annotations

import copy
import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
from row_adapters import adapters_of
from served import KEY, calling, serving, wait_for

from offsite.generation.generate import generate
from offsite.generation.sampling import Settings
from server.plugging.fit import plugged
from server.tenants.store import Tenants

NAMES = ("lora", "lora of rank 7", "half of rslora", "bitfit", "blocks")
ENDS = frozenset({2})


@pytest.fixture(scope="module")
def trunk(full_llama):
    model = copy.deepcopy(full_llama)
    known = adapters_of(model)
    return model, {name: known[name] for name in NAMES}


@pytest.fixture(scope="module")
def expected(trunk, full_llama, letters_tokenizer):
    """What every adapter answers alone, by name and prompt."""
    model, known = copy.deepcopy(full_llama), {"tiny": None, **trunk[1]}
    found = {}

    def answer(name, prompt, num):
        key = (name, tuple(prompt), num)
        if key not in found:
            settings = Settings(limit_tokens=num, temperature=0.0)
            if known[name] is None:
                pieces = list(generate(model, letters_tokenizer, prompt, settings, end_ids=ENDS))
            else:
                with plugged(model, known[name]) as one:
                    pieces = list(generate(one, letters_tokenizer, prompt, settings, end_ids=ENDS))
            found[key] = "".join(piece.text for piece in pieces)
        return found[key]

    return answer


@contextmanager
def serving_all(trunk, tokenizer, **options):
    model, adapters = trunk
    with serving(copy.deepcopy(model), tokenizer, adapters=adapters, **options) as found:
        yield found


def prompts(number):
    drawn = random.Random(number)
    return [drawn.randrange(3, 250) for _ in range(1 + number * 7 % 30)]


def storm(address, expected, *, num_requests, num_clients, seed=0):
    """Many clients at once: whole answers, streams, streams that are closed early, and bad requests."""
    drawn = random.Random(seed)
    plans = [
        (drawn.choice(["whole", "whole", "stream", "left", "bad"]), drawn.choice(["tiny", *NAMES]), drawn.randrange(40))
        for _ in range(num_requests)
    ]
    wanted = {plan: expected(plan[1], prompts(plan[2]), 1 + plan[2] % 9) for plan in plans}
    outcomes, lock, waiting = [], threading.Lock(), list(plans)

    def one(client, plan):
        kind, name, number = plan
        ask = {"model": name, "prompt": prompts(number), "max_tokens": 1 + number % 9, "temperature": 0}
        if kind == "whole":
            return client.completions.create(**ask).choices[0].text == wanted[plan]
        if kind == "stream":
            said = client.completions.create(**ask, stream=True)
            return "".join(chunk.choices[0].text for chunk in said if chunk.choices) == wanted[plan]
        if kind == "left":
            with client.completions.create(**{**ask, "max_tokens": 60}, stream=True) as said:
                return next(iter(said)).model == name
        bad = {"prompt": [10**9]} if number % 2 else {"model": "nobody"}
        try:
            client.completions.create(**{**ask, **bad})
        except (openai.BadRequestError, openai.NotFoundError):
            return True
        return False

    def work(_):
        with calling(address) as client:
            while True:
                with lock:
                    if not waiting:
                        return
                    plan = waiting.pop()
                found = one(client.with_options(max_retries=1000), plan)
                with lock:
                    outcomes.append((plan, found))

    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(work, range(num_clients)))
    assert len(outcomes) == num_requests
    assert [plan for plan, found in outcomes if not found] == []
    return [kind for (kind, *_), _ in outcomes]


def test_every_name_answers_as_its_adapter_alone(trunk, letters_tokenizer, expected):
    with serving_all(trunk, letters_tokenizer) as (address, engine), calling(address) as client:
        assert {model.id for model in client.models.list()} == {"tiny", *NAMES}
        with pytest.raises(openai.NotFoundError, match="/v1/models"):
            client.completions.create(model="nobody", prompt="x")
        kinds = storm(address, expected, num_requests=20, num_clients=6)
        assert {"whole", "stream", "left", "bad"} == set(kinds)
        wait_for(lambda: engine.num_inside == 0 and engine.batch.is_idle)
        assert engine.batch.num_cache_bytes == 0
        assert len({expected(name, prompts(3), 4) for name in ("tiny", *NAMES)}) == 1 + len(NAMES)


@pytest.mark.slow
def test_a_storm_of_requests_loses_none_and_mixes_none_up(trunk, letters_tokenizer, expected):
    limits = {"limit_waiting": 16, "limit_rows": 8, "prefill_tokens": 16}  # so that 429 and its retries are among it
    with serving_all(trunk, letters_tokenizer, **limits) as (address, engine):
        kinds = storm(address, expected, num_requests=1000, num_clients=32, seed=1)
        assert engine.counts.num_refused > kinds.count("bad") > 100
        wait_for(lambda: engine.num_inside == 0 and engine.batch.is_idle)
        assert engine.batch.num_cache_bytes == 0


def test_a_client_that_leaves_frees_its_row(trunk, letters_tokenizer):
    with serving_all(trunk, letters_tokenizer, limit_rows=2) as (address, engine):
        body = {"model": "lora", "prompt": [9] * 5, "max_tokens": 100, "stream": True, "logit_bias": {"2": -100}}
        sent = json.dumps(body).encode()
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
                % (KEY.encode(), len(sent), sent)
            )
            wait_for(lambda: engine.counts.num_completion_tokens > 2)
        wait_for(lambda: engine.num_inside == 0 and engine.batch.is_idle)
        assert engine.counts.num_completion_tokens < 100


def test_a_full_cache_makes_requests_wait_and_then_refuses(trunk, letters_tokenizer):
    cost = 8 * 2 * 2 * 8 * 4
    limits = {"limit_cache_bytes": 128 * cost, "limit_waiting": 1}
    with serving_all(trunk, letters_tokenizer, **limits) as (address, engine), calling(address) as client:
        ask = {"model": "tiny", "prompt": [9] * 60, "logit_bias": {"2": -100}}
        first = client.completions.create(**ask, max_tokens=60, stream=True)
        next(iter(first))
        heard = []
        thread = threading.Thread(target=lambda: heard.append(client.completions.create(**ask, max_tokens=60)))
        thread.start()
        wait_for(lambda: engine.num_inside == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**ask, max_tokens=60)
        assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("cache_full", "1")
        list(first)
        thread.join()
        assert heard[0].usage.completion_tokens == 60
    with (
        serving_all(trunk, letters_tokenizer, limit_cache_bytes=64 * cost) as (address, _),
        calling(address) as client,
        pytest.raises(openai.BadRequestError, match="cache holds 64") as caught,
    ):
        client.completions.create(**ask, max_tokens=60)
    assert caught.value.code == "context_length_exceeded"


def test_tenants_ask_for_their_own_models_within_their_limits(trunk, letters_tokenizer, tmp_path):
    with Tenants.open(tmp_path / "tenants.db", create=True) as tenants:
        anna = tenants.add("anna", models=("lora",), tokens_per_day=30)
        bert = tenants.add("bert", requests_at_once=1)
        with serving_all(trunk, letters_tokenizer, tenants=tenants) as (address, _):
            with calling(address, anna) as client:
                assert [model.id for model in client.models.list()] == ["lora"]
                for other in ("tiny", "blocks", "nobody"):
                    with pytest.raises(openai.NotFoundError) as caught:
                        client.completions.create(model=other, prompt="x")
                    assert "'lora'" in str(caught.value)
                    assert "blocks" not in str(caught.value)
                ask = {"model": "lora", "prompt": [9] * 4, "logit_bias": {"2": -100}}
                assert client.completions.create(**ask, max_tokens=20).usage.total_tokens == 24
                with pytest.raises(openai.RateLimitError) as caught:
                    client.completions.create(**ask, max_tokens=3)
                assert caught.value.code == "tokens_per_day"
                assert int(caught.value.response.headers["retry-after"]) <= 86_400
                assert client.completions.create(**ask, max_tokens=2).usage.total_tokens == 6
                assert httpx.get(f"{address}/metrics", headers={"Authorization": f"Bearer {anna}"}).status_code == 403
            with calling(address, bert) as client:
                ask = {"model": "tiny", "prompt": [9], "max_tokens": 100, "logit_bias": {"2": -100}}
                said = client.completions.create(**ask, stream=True)
                next(iter(said))
                with pytest.raises(openai.RateLimitError) as caught:
                    client.completions.create(**ask)
                assert caught.value.code == "requests_at_once"
                said.close()
                wait_for(lambda: tenants.used("bert").num_requests == 1)
            assert tenants.used("anna").num_tokens == 30
            assert 1 < tenants.used("bert").num_tokens <= 101
            assert httpx.get(f"{address}/metrics").status_code == 401
            page = httpx.get(f"{address}/metrics", headers={"Authorization": f"Bearer {KEY}"})
            assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert 'offsite_answer_tokens_total{model="lora",tenant="anna"} 22' in page.text.splitlines()
            assert 'offsite_refused_total{status="404"} 3' in page.text.splitlines()
            tenants.revoke("anna")
            with calling(address, anna) as client, pytest.raises(openai.AuthenticationError):
                client.models.list()


def test_without_batching_every_name_still_answers(trunk, letters_tokenizer, expected):
    with serving_all(trunk, letters_tokenizer, limit_rows=1) as (address, engine), calling(address) as client:
        assert engine.batch is None
        for name in ("tiny", *NAMES):
            ask = {"model": name, "prompt": prompts(3), "max_tokens": 4, "temperature": 0}
            assert client.completions.create(**ask).choices[0].text == expected(name, prompts(3), 4)
