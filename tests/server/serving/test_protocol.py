"""What a request may hold, and how a refusal names what is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offsite.generation.generate import Piece
from server.serving.protocol import _NEUTRAL, ApiError, ChatAsk, CompletionAsk, Reply, Usage, parse

SECRET = "the patient's name"


def completion(**fields):
    return parse(json.dumps({"model": "m", "prompt": "p", **fields}).encode(), CompletionAsk)


def chat(**fields):
    turns = {"messages": [{"role": "user", "content": "hello"}]}
    return parse(json.dumps({"model": "m", **turns, **fields}).encode(), ChatAsk)


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("p", ("p",)),
        ("", ("",)),
        (None, ("",)),
        (["p", "q"], ("p", "q")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_a_prompt_is_text_or_tokens_or_a_list_of_either(value, prompts):
    assert completion(prompt=value).prompt == prompts


def test_fields_that_change_nothing_pass():
    neutral = {"n": 1, "echo": False, "logprobs": None, "logit_bias": {}, "presence_penalty": 0, "tools": []}
    ask = completion(user="u", store=False, metadata={"a": 1}, made_up=None, **neutral)
    assert (ask.stop, ask.temperature, ask.num_tokens) == ((), None, 16)
    assert chat(logprobs=False, response_format={"type": "text"}).num_tokens is None


def test_limits_of_both_spellings():
    assert completion(max_tokens=3).num_tokens == 3
    assert chat(max_tokens=3).num_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=4).num_tokens == 4


def test_text_parts_are_joined_and_developers_are_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask = chat(messages=[{"role": "developer", "content": parts}, {"role": "user", "content": "", "name": None}])
    assert [message.for_template for message in ask.messages] == [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": ""},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"store": True}, "store"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"ignore_eos": 0}, "ignore_eos"),
        ({"made_up": False}, "made_up"),
        ({"top_kk": 5}, "top_kk"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"stream": True, "stream_options": {"include_everything": True}}, "stream_options.include_everything"),
        ({"temperature": "hot", "made_up": 1}, "made_up"),
        ({"tools": [{}]}, "tools"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, param):
    for make in (completion, chat):
        with pytest.raises(ApiError) as caught:
            make(**fields)
        error = caught.value.body["error"]
        assert (caught.value.status, error["param"], error["code"]) == (400, param, "unsupported_parameter")
        assert error["message"].startswith(param)
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("number", [0, 17, True, "2"])
def test_a_number_of_answers_is_bounded(number):
    for make in (completion, chat):
        with pytest.raises(ApiError) as caught:
            make(n=number)
        assert caught.value.body["error"]["param"] == "n"


def test_a_field_of_the_other_kind_of_request_is_refused():
    for make, fields in (
        (completion, {"messages": []}),
        (completion, {"max_completion_tokens": 5}),
        (chat, {"prompt": "p"}),
    ):
        with pytest.raises(ApiError, match="not supported here"):
            make(**fields)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "x", "name": "y"}, "messages.0.name"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages.0.tool_calls"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": 1}]},
            "messages.0.content.cache_control",
        ),
    ],
)
def test_what_a_message_holds_beside_its_text_is_refused_by_name(message, param):
    with pytest.raises(ApiError) as caught:
        chat(messages=[message])
    assert caught.value.body["error"]["param"] == param


def test_a_turn_as_the_openai_client_gives_it_back_is_taken():
    said = {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "tool_calls": None}
    assert [turn.content for turn in chat(messages=[said]).messages] == ["hi"]


def test_a_name_that_is_no_name_is_not_repeated():
    for name in (SECRET, "x" * 65, "", "\u202ex"):
        with pytest.raises(ApiError) as caught:
            completion(**{name: 1})
        assert name == "" or name not in json.dumps(caught.value.body, ensure_ascii=False)


def test_how_tokens_are_drawn_is_read():
    ask = completion(top_k=-1, min_p=0, repetition_penalty=1.5, presence_penalty=-2, logit_bias={"5": 1, "7": -100.0})
    assert (ask.top_k, ask.min_p, ask.repetition_penalty, ask.presence_penalty) == (-1, 0, 1.5, -2)
    assert ask.logit_bias == ((5, 1.0), (7, -100.0))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [SECRET] * 65}, "prompt"),
        ({"prompt": {SECRET: 1}}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": "a"}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": {SECRET: 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [SECRET, 1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
)
def test_wrong_fields_are_named_and_never_repeated(fields, param):
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    error = caught.value.body["error"]
    assert (caught.value.status, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param}: ")
    assert SECRET not in str(caught.value.body)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "wizard", "content": SECRET}], "messages.0.role"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages.0.content"),
    ],
)
def test_wrong_messages_are_named_and_never_repeated(messages, param):
    with pytest.raises(ApiError) as caught:
        chat(messages=messages)
    assert caught.value.body["error"]["param"] == param
    assert SECRET not in str(caught.value.body)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"model": "m", "temperature": NaN}', b'"m"', b"[]", b"[" * 5000, b'{"model":"\\ud800"}'],
)
def test_what_is_not_a_json_object_is_refused(body):
    with pytest.raises(ApiError, match="the body"):
        parse(body, CompletionAsk)


FIELDS = sorted({*CompletionAsk.model_fields, *ChatAsk.model_fields, *_NEUTRAL, "role", "content", "type", "text"})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=15,
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine drawing is
@given(st.dictionaries(st.sampled_from(FIELDS), ANY_JSON, max_size=6))
def test_any_json_is_a_request_or_a_refusal(fields):
    for cls, usual in (CompletionAsk, {}), (ChatAsk, {"messages": [{"role": "user", "content": "x"}]}):
        try:
            found = parse(json.dumps({"model": "m", **usual, **fields}).encode(), cls)
        except ApiError as refusal:
            found = refusal
        assert getattr(found, "status", 400) == 400


def test_usage_is_in_a_stream_only_when_asked_for():
    told = Reply("m", is_chat=False, wants_usage=True)
    assert '"usage":null' in told.part(0, Piece(5, "a"))
    assert '"prompt_tokens":2,"completion_tokens":3,"total_tokens":5' in told.closing(Usage(2, 3))
    assert told.closing(Usage(2, 3)).endswith("data: [DONE]\n\n")
    assert "usage" not in Reply("m", is_chat=True).part(0, Piece(5, "a", "stop"))
