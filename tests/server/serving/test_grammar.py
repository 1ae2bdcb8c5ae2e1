"""Answers that are held to a JSON schema."""

from __future__ import annotations

import builtins
import json

import openai
import pytest
import torch
from served import calling, serving

from server.serving.grammar import LIMIT_BYTES, Grammars
from server.serving.protocol import ApiError

PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["anna", "bert"]}, "sick": {"type": "boolean"}, "age": {"enum": [1, 22]}},
    "required": ["name", "sick", "age"],
    "additionalProperties": False,
}


def asked(schema):
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}


@pytest.mark.parametrize("limit_rows", [16, 1])
def test_a_random_model_answers_in_the_schema_and_the_others_as_ever(spread_llama, bytes_tokenizer, limit_rows):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "who"}], "max_tokens": 80, "temperature": 1.0}
    with serving(spread_llama, bytes_tokenizer, limit_rows=limit_rows) as (address, _), calling(address) as client:
        plain = client.chat.completions.create(**ask, seed=1, n=2)
        found = client.chat.completions.create(**ask, seed=1, n=4, response_format=asked(PERSON))
        for choice in found.choices:
            person = json.loads(choice.message.content)
            assert set(person) == {"name", "sick", "age"}
            assert person["name"] in ("anna", "bert")
            assert person["age"] in (1, 22)
            assert isinstance(person["sick"], bool)
            assert choice.finish_reason == "stop"
        assert len({choice.message.content for choice in found.choices}) > 1
        again = client.chat.completions.create(**ask, seed=1, n=2, response_format={"type": "text"})
        assert again.choices == plain.choices
        cut = client.chat.completions.create(
            **{**ask, "max_tokens": 3}, seed=1, response_format={"type": "json_object"}
        )
        assert cut.choices[0].message.content.startswith("{")
        for wrong in (asked({"type": "nonsense"}), {"type": "json_schema"}, {"type": "xml"}):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**ask, response_format=wrong)
            assert caught.value.param.startswith("response_format")


def test_what_may_not_come_next_has_no_chance(bytes_tokenizer):
    grammar = Grammars(bytes_tokenizer, len(bytes_tokenizer) + 9, [bytes_tokenizer.eos_token_id]).of(PERSON)
    scores = torch.arange(float(len(bytes_tokenizer) + 9))
    other = grammar.copy()
    for token in bytes_tokenizer('{"name":"anna","sick":')["input_ids"]:
        assert grammar.allowed(scores)[token] == scores[token]
        grammar.take(token)
    allowed = grammar.allowed(scores).isfinite().nonzero().flatten().tolist()
    assert {bytes_tokenizer.decode([token])[0] for token in allowed} == {"t", "f"}
    assert scores.isfinite().all()
    opening = other.allowed(scores).isfinite().nonzero().flatten().tolist()
    assert all(bytes_tokenizer.decode([token]).startswith("{") for token in opening)


def test_a_schema_is_bounded_and_a_missing_extra_is_told(bytes_tokenizer, monkeypatch):
    grammars = Grammars(bytes_tokenizer, len(bytes_tokenizer), [bytes_tokenizer.eos_token_id])
    with pytest.raises(ApiError, match="over 65536 bytes"):
        grammars.of({"enum": ["x" * LIMIT_BYTES]})
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ApiError, match="without the extra 'structured'") as caught:
        grammars.of(PERSON)
    assert caught.value.body["error"]["code"] == "unsupported_parameter"
