from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from offsite.tasks.forms import JsonForm, label_in, object_in

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"type": "string", "enum": ["red", "blue"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "maxItems": 2},
        "model_config": {"type": "object", "properties": {"deep": {"type": "boolean"}}, "required": ["deep"]},
        "share": {"type": "number", "maximum": 1},
    },
    "required": ["colour"],
    "additionalProperties": False,
}
RIGHT = [
    {"colour": "red"},
    {"colour": "blue", "sizes": [0], "share": 1, "model_config": {"deep": True, "more": 1}},
]
WRONG = [
    {},
    {"colour": "green"},
    {"colour": "red", "other": 1},
    {"colour": "red", "sizes": []},
    {"colour": "red", "sizes": [1, 2, 3]},
    {"colour": "red", "sizes": [-1]},
    {"colour": "red", "sizes": ["1"]},
    {"colour": "red", "sizes": [True]},
    {"colour": "red", "share": None},
    {"colour": "red", "share": 1.5},
    {"colour": "red", "model_config": {}},
]


def test_answers_are_held_to_the_schema() -> None:
    JsonForm.model_validate_json(json.dumps({"type": "json", "schema": SCHEMA}))
    for value in RIGHT:
        assert object_in(json.dumps(value), SCHEMA) == value
    for value in WRONG:
        assert object_in(json.dumps(value), SCHEMA) is None, value
    for text in (
        "",
        "[]",
        '{"colour": "red"} and more',
        '{"colour": "red", "colour": "blue"}',
        '{"colour":',
        "[" * 9000,
    ):
        assert object_in(text, SCHEMA) is None
    assert object_in('{"share": NaN, "colour": "red"}', SCHEMA) is None


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array"},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(a+)+$"}}},
        {"type": "object", "properties": {"a": {"$ref": "https://example.org/schema.json"}}},
        {"type": "object", "properties": {"a": {"type": "string", "minItems": 1}}},
        {"type": "object", "required": ["b"]},
        {"type": "object", "properties": {"a": {"enum": [1]}}},
    ],
)
def test_schemas_that_are_not_taken(schema: dict) -> None:
    with pytest.raises(ValidationError):
        JsonForm.model_validate_json(json.dumps({"type": "json", "schema": schema}))


def test_a_schema_is_not_too_deep() -> None:
    schema: dict = {"type": "boolean"}
    for _ in range(9):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(ValidationError, match="deeper"):
        JsonForm.model_validate_json(json.dumps({"type": "json", "schema": schema}))


def test_a_label_is_the_first_line() -> None:
    labels = ("Card arrival", "lost card")
    assert label_in("  card arrival.\nThing: x", labels) == "Card arrival"
    assert label_in("the card arrival", labels) is None
    assert label_in("", labels) is None
