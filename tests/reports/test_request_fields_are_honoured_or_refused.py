"""Settings of a request were dropped without a word, and the answer came as if they had been followed.

What people met: `top_k`, `min_p` and penalties that other servers of this interface know, and mistyped names, all with
status 200. What cannot be worked with is said by name; what can is worked out as transformers does.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from itertools import islice

import openai
import pytest
import torch
from transformers import GenerationConfig

from offsite.generation.generate import next_tokens
from offsite.generation.sampling import Sampler, Settings
from server.serving.app import build_app
from server.serving.serve import Process, listen

PROMPT = [5, 9, 9, 30]


def distribution(settings, logits, num):
    """Shares of the first token that is drawn behind the prompt."""
    drawn = [Sampler(Settings(1, seed=seed, **settings), PROMPT).pick(logits) for seed in range(num)]
    return torch.bincount(torch.tensor(drawn), minlength=logits.numel()) / num


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 3},
        {"min_p": 0.3},
        {"top_p": 0.7},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6, "temperature": 0.7},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "temperature": 1.4},
    ],
)
def test_draws_are_those_of_transformers(full_llama, settings):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5
    known = {"do_sample": True, "top_k": 0, **settings}
    processors = full_llama._get_logits_processor(GenerationConfig(**known), input_ids_seq_length=len(PROMPT))
    expected = processors(torch.tensor([PROMPT]), logits[None].clone())[0].softmax(-1)
    num = 4000
    found = distribution(settings, logits, num)
    assert not found[expected == 0].any()
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / num).sqrt() + 1e-9).all()


def test_greedy_answers_under_a_penalty_are_those_of_transformers(full_llama):
    settings = Settings(16, temperature=0, repetition_penalty=1.7)
    ids = torch.tensor([PROMPT])
    whole = full_llama.generate(
        ids, do_sample=False, max_new_tokens=16, eos_token_id=None, repetition_penalty=1.7, pad_token_id=0
    )
    found = list(islice(next_tokens(full_llama, PROMPT, settings), 16))
    assert found == whole[0, len(PROMPT) :].tolist()
    plain = list(islice(next_tokens(full_llama, PROMPT, Settings(16, temperature=0)), 16))
    assert found != plain


def test_presence_and_frequency_are_of_what_was_drawn():
    """OpenAI's formula: less `presence` where a token was drawn, less `frequency` each time; prompts do not count."""
    logits = torch.zeros(3)
    sampler = Sampler(Settings(1, temperature=0, presence_penalty=0.5, frequency_penalty=0.25), [0, 0, 0])
    expected, counts = [], [0, 0, 0]
    for _ in range(9):
        scores = [-0.5 * (count > 0) - 0.25 * count for count in counts]
        expected.append(scores.index(max(scores)))
        counts[expected[-1]] += 1
    assert [sampler.pick(logits) for _ in range(9)] == expected
    assert expected[:3] == [0, 1, 2]


def test_a_bias_is_added_to_the_tokens_it_names():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert Sampler(Settings(1, temperature=0, logit_bias=((1, -100.0),))).pick(logits) == 2
    assert Sampler(Settings(1, temperature=0, logit_bias=((0, 100.0), (2, 1.0)))).pick(logits) == 0
    assert logits.tolist() == [1.0, 3.0, 2.0]


@pytest.fixture(scope="module")
def client(full_llama, letters_tokenizer):
    with served(full_llama, letters_tokenizer) as found:
        yield found


@contextmanager
def served(model, tokenizer):
    app = build_app(model, tokenizer, model_id="tiny", key=None)
    sock = listen("127.0.0.1", 0)
    sock.listen()
    process = Process(app)
    thread = threading.Thread(target=process.run, kwargs={"sockets": [sock]})
    thread.start()
    address = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
    try:
        with openai.OpenAI(base_url=address, api_key="x", max_retries=0, timeout=30) as found:
            yield found
    finally:
        app.state.engine.stop()
        process.should_exit = True
        thread.join(20)
        sock.close()


def said(client, **fields):
    return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, **fields).choices[0].text


def test_the_openai_client_hears_by_name_what_is_not_worked_with(client):
    for fields in ({"typical_p": 0.5}, {"best_of": 3}, {"guided_json": {}}, {"tempreature": 0}):
        with pytest.raises(openai.BadRequestError) as caught:
            said(client, extra_body=fields)
        (name,) = fields
        assert (caught.value.status_code, caught.value.param, caught.value.code) == (400, name, "unsupported_parameter")
        assert name in caught.value.message
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], tools=[tool])


def test_the_openai_client_gets_what_it_asks_for(client):
    greedy = said(client, temperature=0)
    assert said(client, extra_body={"top_k": 1}) == greedy
    assert said(client, extra_body={"min_p": 1.0}) == greedy
    assert said(client, temperature=0, extra_body={"repetition_penalty": 1.0, "top_k": -1, "tools": []}) == greedy
    assert said(client, temperature=0, presence_penalty=0, frequency_penalty=0, logit_bias={}, n=1) == greedy
    assert said(client, temperature=0, frequency_penalty=2.0, presence_penalty=2.0) != greedy
    assert said(client, temperature=0, logit_bias={"40": 100}) == said(client, temperature=0.1, logit_bias={"40": 100})
    assert len(set(said(client, temperature=0, logit_bias={"40": 100}))) == 1


def test_a_bias_of_a_token_that_is_not_there_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="token ids are 0 to 258"):
        said(client, logit_bias={"259": 1})
