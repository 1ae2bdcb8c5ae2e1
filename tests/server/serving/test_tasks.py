"""Tasks over HTTP: the declared form, checked, one more try, and an error in place of what has not the form."""

from __future__ import annotations

import builtins
import json

import colours
import httpx
import pytest
from served import KEY, serving

from offsite.errors import ConfigError
from server.serving.serve import tasks_of
from server.serving.tasks import Question

LABELS = "type: labels\n  labels: [red, green, blue]"
JSON = colours.task(
    (LABELS, "type: json\n  schema: {type: object, properties: {kind: {type: string, enum: [a, b]}}, required: [kind],"
             " additionalProperties: false}"),
    ("accuracy", "json-validity"),
    ("name: colours", "name: kinds"),
    *((f"answer: {label}", "answer: {kind: a}") for label in colours.LABELS),
    ("value: blue", "value: {kind: b}"),
    ("value: green", "value: {kind: a}"),
)  # fmt: skip
TEXT = colours.task((LABELS, 'type: text\n  stop: ["\\n"]'), ("accuracy", "rouge-l"), ("name: colours", "name: words"))
TASKS = [colours.task(), JSON, TEXT]


def ask(address, name, body=None, **more):
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"vars": {"thing": "sea"}} if body is None else body
    return httpx.post(f"{address}/v1/tasks/{name}", json={**body, **more}, headers=headers, timeout=60)


@pytest.mark.parametrize("limit_rows", [16, 1])
def test_a_random_model_answers_in_every_form(spread_llama, bytes_tokenizer, limit_rows):
    with serving(spread_llama, bytes_tokenizer, limit_rows=limit_rows, tasks=TASKS) as (address, _):
        label = ask(address, "colours").json()
        assert label["answer"] in colours.LABELS
        assert (label["task"], label["model"], label["num_tries"]) == ("colours", "tiny", 1)
        assert label == ask(address, "colours", model="tiny").json()
        assert ask(address, "kinds").json()["answer"]["kind"] in ("a", "b")
        listed = httpx.get(f"{address}/v1/tasks", headers={"Authorization": f"Bearer {KEY}"}).json()["data"]
        assert [one["digest"] for one in listed] == [task.digest for task in TASKS]


def test_requests_that_are_none_of_the_task(spread_llama, bytes_tokenizer):
    with serving(spread_llama, bytes_tokenizer, tasks=TASKS) as (address, engine):
        for status, told, found in (
            (404, "no task of this name", ask(address, "nothing")),
            (400, "field 'thing' is missing", ask(address, "colours", {"vars": {}})),
            (400, "field 'thing' is a list", ask(address, "colours", {"vars": {"thing": ["a", "b"]}})),
            (400, "stream is not supported", ask(address, "colours", stream=True)),
            (404, "no model of this name", ask(address, "colours", model="other")),
        ):
            assert found.status_code == status
            assert told in found.json()["error"]["message"]
        assert httpx.post(f"{address}/v1/tasks/colours", json={"vars": {"thing": "sea"}}).status_code == 401
        assert engine.counts.num_completion_tokens == 0


@pytest.fixture
def no_grammar(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)


def test_without_a_grammar_what_was_written_is_checked(parrot, bytes_tokenizer, no_grammar):
    cases = [("colours", " Green.\nThing: x", "green"), ("kinds", '{"kind": "b"} and on and on', {"kind": "b"}),
             ("words", "\n some words\nmore", "some words")]  # fmt: skip
    for name, said, expected in cases:
        with serving(parrot(said), bytes_tokenizer, tasks=TASKS) as (address, engine):
            found = ask(address, name).json()
            assert found["answer"] == expected
            assert found["usage"]["completion_tokens"] < len(bytes_tokenizer(said)["input_ids"])  # ended when whole
            assert engine.num_inside == 0


def test_what_has_not_the_form_twice_is_an_error(parrot, bytes_tokenizer, no_grammar):
    for task, said in zip(TASKS, (" purple\n", '{"kind": "c"}', " \n "), strict=True):
        with serving(parrot(said), bytes_tokenizer, tasks=TASKS) as (address, engine):
            found = ask(address, task.name)
            assert (found.status_code, found.json()["error"]["code"]) == (502, "malformed_answer")
            assert "purple" not in found.text
            prompt = Question(task, {"thing": "sea"}).prompt
            assert engine.counts.num_prompt_tokens == 2 * len(bytes_tokenizer(prompt)["input_ids"])


def test_files_and_names(tmp_path):
    (tmp_path / "a.yaml").write_text(colours.TEXT)
    (tmp_path / "b.yaml").write_text(json.dumps(JSON.model_dump(mode="json")))
    assert [task.name for task in tasks_of([tmp_path / "a.yaml", tmp_path / "b.yaml"])] == ["colours", "kinds"]
    with pytest.raises(ConfigError, match="two tasks are called 'colours'"):
        tasks_of([tmp_path / "a.yaml", tmp_path / "a.yaml"])
