"""JSON from strangers: each key once, finite, shallow, and one parser."""

from __future__ import annotations

import pytest
from pydantic import Field

from offsite.errors import BadSchema, WrongBinding
from offsite.strictjson import Strict, parse_object, parse_strict, write_compact


class Thing(Strict):
    format: str
    size: float = Field(ge=0)
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[1]",
        b'{"a": 1, "a": 1}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1} x',
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_refused(raw):
    with pytest.raises(BadSchema):
        parse_object(raw, "it")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"format": "x/1", "size": 1e400}', "not finite"),
        (b'{"format": "x/1", "size": "1"}', "size"),
        (b'{"format": "x/1", "size": 1, "names": ["\\ud800"]}', "it"),
        (b'{"format": "x/1", "size": 1, "more": 1}', "more"),
        (b'{"format": "x/1", "size": true}', "size"),
    ],
)
def test_what_does_not_fit_the_form(raw, message):
    with pytest.raises(BadSchema, match=message):
        parse_strict(raw, Thing, "it", {"format": "x/1"})


@pytest.mark.parametrize(("found", "shown"), [('"x/2"', "x/2"), ("1", "another one"), ('"\\u001b[2J"', "another one")])
def test_another_format_is_named_only_if_it_is_a_plain_word(found, shown):
    with pytest.raises(WrongBinding, match=f"format is {shown}, expected x/1"):
        parse_strict(f'{{"format": {found}, "size": 1}}'.encode(), Thing, "it", {"format": "x/1"})


def test_the_one_form_reads_back():
    thing = Thing(format="x/1", size=1.5, names=("a", "\N{SNOWMAN}"))
    raw = write_compact(thing)
    assert raw == b'{"format":"x/1","names":["a","\\u2603"],"size":1.5}\n'
    assert parse_strict(raw, Thing, "it", {"format": "x/1"}) == thing
