"""Rules: what an answer is worth, and what is no rule."""

from __future__ import annotations

import json

import pytest

from offsite.errors import ConfigError, DataError
from offsite.tasks.config import RuleSettings
from offsite.tasks.rules import LIMIT_BYTES, read_rules

FORM = {
    "type": "object",
    "properties": {"ill": {"type": "string", "enum": ["flu", "cold"]}, "days": {"type": "integer", "minimum": 0}},
    "required": ["ill"],
    "additionalProperties": False,
}


def worth(text: str, *, answer: str | None = None, num_tokens: int = 0, **rules: object) -> float:
    return read_rules(RuleSettings(**rules)).reward(text, num_tokens=num_tokens, answer=answer)


@pytest.mark.parametrize(
    ("text", "is_met"),
    [
        ("Flu", True),
        ("  fLU\n", True),
        ("\uff26lu", True),  # a full-width letter
        ("the  flu", False),
        ("flu.", False),
        ("", False),
    ],
)
def test_an_answer_is_the_rows_own_but_for_how_it_is_written(text, is_met):
    assert worth(text, answer=" flu", exact=2.0) == 2.0 * is_met


def test_signs_and_points_are_part_of_an_answer():
    assert worth("3.5", answer="3.5", exact=1.0) == 1
    assert worth("35", answer="3.5", exact=1.0) == worth("5", answer="-5", exact=1.0) == 0


@pytest.mark.parametrize(
    ("text", "is_met"),
    [
        ('{"ill": "flu"}', True),
        (' {"ill":"cold", "days": 3}\n', True),
        ('{"days": 3, "ill": "cold"}', True),
        ('{"days": 3}', False),
        ('{"ill": "plague"}', False),
        ('{"ill": "flu", "days": -1}', False),
        ('{"ill": "flu", "other": 1}', False),
        ('{"ill": "flu"', False),
        ('{"ill": "flu"} and more', False),
        ("flu", False),
        ("", False),
    ],
)
def test_an_answer_has_the_form(tmp_path, text, is_met):
    (tmp_path / "form.json").write_text(json.dumps(FORM))
    assert worth(text, json_schema=tmp_path / "form.json", json_schema_weight=0.5) == 0.5 * is_met


def test_ranges_and_weights_add_up():
    ranges = {"min_words": 2, "max_words": 3, "words_weight": 0.25, "max_tokens": 4}
    assert [worth(text, num_tokens=9, **ranges) for text in ("one", "one two", "a b c", "a b c d")] == [
        0,
        0.25,
        0.25,
        0,
    ]
    assert worth("one two", num_tokens=4, answer="One two", exact=2.0, **ranges) == 3.25


def test_a_schema_that_is_none_is_refused(tmp_path):
    path = tmp_path / "form.json"
    for text, error, told in (
        ("[1]", DataError, "form.json"),
        ("{", DataError, "form.json"),
        ('{"type": "nothing"}', ConfigError, "the schema cannot be followed: "),
        (json.dumps({"title": "x" * LIMIT_BYTES}), DataError, "over 65536 bytes"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=told):
            read_rules(RuleSettings(json_schema=path))


def test_a_resumed_run_is_bound_to_the_schemas_content_and_not_its_place(tmp_path):
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps(FORM))
    one, two = (read_rules(RuleSettings(json_schema=tmp_path / name)).binding() for name in ("one.json", "two.json"))
    assert one == two
    assert one["rules.json_schema"].startswith("sha256:")
