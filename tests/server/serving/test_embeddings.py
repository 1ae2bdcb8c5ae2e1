"""OpenAI's client, and what transformers computes by itself, against an encoder that is served."""

from __future__ import annotations

import asyncio
import base64
import struct

import httpx
import openai
import pytest
import torch
from encoders_lab import saved, separating_tokenizer
from transformers import AutoModel

from adapters.heads import attach_head
from offsite.artefacts.bundle import Head
from offsite.errors import ConfigError
from server.serving.classify import build_head_app
from server.serving.config import ServeConfig
from server.serving.serve import is_plain_encoder, load_served
from server.tenants.store import Tenants

TEXTS = ["card lost", "what of the transfer", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("encoder") / "bert", "bert", separating_tokenizer())


@pytest.fixture(scope="module")
def expected(folder):
    """Means of the states that transformers' own model gives of each text alone, at length 1."""
    tokenizer = separating_tokenizer()
    model = AutoModel.from_pretrained(folder).eval()
    rows = []
    with torch.no_grad():
        for text in TEXTS:
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            rows.append(states.mean(0) / states.mean(0).norm())
    return torch.stack(rows)


@pytest.fixture(scope="module")
def app(folder):
    settings = ServeConfig(adapted=folder, device="cpu", model_id="bert")
    assert is_plain_encoder(settings)
    model, tokenizer, name = load_served(settings)
    return build_head_app(model, tokenizer, None, model_id=name, key="k", context=30)


def asked(app, work, key="k"):
    """Run `work` on OpenAI's client of that application."""

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
            client = openai.AsyncOpenAI(api_key=key, base_url="http://here/v1", http_client=http, max_retries=0)
            return await work(client)

    return asyncio.run(ask())


def sent(app, path, body=None):
    """Send a request without OpenAI's client, as it stands."""

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
            method = "GET" if body is None else "POST"
            return await http.request(method, path, json=body, headers={"Authorization": "Bearer k"})

    return asyncio.run(send())


def test_the_vectors_are_those_of_transformers_in_every_form(app, expected):
    tokens = separating_tokenizer()(TEXTS)["input_ids"]
    for given, wanted in [
        (TEXTS, expected),
        (TEXTS[1], expected[1:2]),
        (tokens, expected),
        (tokens[0], expected[:1]),
        ([TEXTS[2], tokens[0]], expected[[2, 0]]),
    ]:
        found = asked(app, lambda client, given=given: client.embeddings.create(model="bert", input=given))
        vectors = torch.tensor([one.embedding for one in found.data])
        torch.testing.assert_close(vectors, wanted, atol=1e-5, rtol=1e-4)
        assert [one.index for one in found.data] == list(range(len(wanted)))
        assert (found.model, found.object, found.data[0].object) == ("bert", "list", "embedding")
    assert found.usage.prompt_tokens == found.usage.total_tokens == len(tokens[2]) + len(tokens[0])
    plain, packed = (
        sent(app, "/v1/embeddings", {"model": "bert", "input": TEXTS, "encoding_format": form, "user": "u"}).json()
        for form in ("float", "base64")
    )
    for one, two in zip(plain["data"], packed["data"], strict=True):
        raw = base64.b64decode(two["embedding"])
        assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == one["embedding"]


def test_what_cannot_be_honoured_is_refused_by_name(app):
    for body, status, words in [
        ({"input": "a", "dimensions": 8}, 400, "dimensions is not supported here"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": []}, 400, "holds 0 texts"),
        ({"input": [""]}, 400, "holds an empty text"),
        ({"input": [[]]}, 400, "must be a string"),
        ({"input": ["a"] * 65}, 400, "holds 65 texts, 1 to 64 are read"),
        ({"input": [[1, 999]]}, 400, "input 0: token ids are 0 to 258"),
        ({"input": ["a", "x" * 29]}, 400, "input 1 has 31 tokens, 1 to 30 are read"),
        ({"input": "a", "model": "other"}, 404, "no model of this name"),
    ]:
        answer = sent(app, "/v1/embeddings", {"model": "bert", **body})
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]
    assert sent(app, "/v1/classify", {"model": "bert", "input": "a"}).status_code == 404
    with pytest.raises(openai.AuthenticationError):
        asked(app, lambda client: client.embeddings.create(model="bert", input="a"), key="l")


def test_a_classifier_on_an_encoder_embeds_too_and_tenants_are_charged(folder, expected, tmp_path):
    model, tokenizer, _ = load_served(ServeConfig(adapted=folder, device="cpu"))
    head = Head(task="classify", labels=("a", "b"), hidden=32, encoder="bert")
    attach_head(model, head)
    with Tenants.open(tmp_path / "tenants.db", create=True) as tenants:
        key = tenants.add("anna", models=("bert",), tokens_per_day=20)
        app = build_head_app(model, tokenizer, head, model_id="bert", key="k", tenants=tenants)
        found = asked(app, lambda client: client.embeddings.create(model="bert", input=TEXTS[0]), key=key)
        torch.testing.assert_close(torch.tensor([found.data[0].embedding]), expected[:1], atol=1e-5, rtol=1e-4)
        assert sent(app, "/v1/classify", {"model": "bert", "input": "a"}).status_code == 200
        with pytest.raises(openai.RateLimitError, match="this key has 9 left today"):
            asked(app, lambda client: client.embeddings.create(model="bert", input=TEXTS[1]), key=key)
        assert 'offsite_prompt_tokens_total{model="bert",tenant="anna"} 11' in sent(app, "/metrics").text


def test_a_folder_that_is_no_encoder_is_not_taken_for_one(folder, tmp_path, llama_folder):
    assert not is_plain_encoder(ServeConfig(adapted=llama_folder))
    assert not is_plain_encoder(ServeConfig(adapted=tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="--mix goes with one adapted folder"):
        load_served(ServeConfig(adapted=folder, mix=0.5, device="cpu"))
