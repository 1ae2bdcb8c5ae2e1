"""Rows that a head learns from: a text with its label or its value, words with their tags; and tags on tokens.

A value is a number. Words and tags are two lists of one length; the words stand apart by spaces in the text that is
tokenised, and the first token of a word carries its tag. Errors never repeat what a row holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from offsite.text.rows import NAME_COLUMNS, Row, checked_string

CLASSIFIED = "text/label"
CLASSIFIED_FIELDS = ("text", "label")
VALUED = "text/value"
VALUED_FIELDS = ("text", "value")
TAGGED = "tokens/tags"
TAGGED_FIELDS = ("tokens", "tags")

SHAPE_OF_HEAD = {"classify": CLASSIFIED, "regress": VALUED, "tag": TAGGED}
"""The shape of rows by what a head is for; a reward's are pairs of answers (`offsite.text.preferences`)."""

HEAD_FIELDS: dict[str, tuple[str, ...]] = {
    CLASSIFIED: CLASSIFIED_FIELDS,
    VALUED: VALUED_FIELDS,
    TAGGED: TAGGED_FIELDS,
}
WANTED = {
    CLASSIFIED: "give rows of 'text' and 'label', in any kind of file but .txt",
    VALUED: "give rows of 'text' and 'value', in any kind of file but .txt",
    TAGGED: "give rows of 'tokens' and 'tags', two lists of one length, in .jsonl, .json or .parquet",
}
"""What is said where rows are of another shape."""

MISSING = {
    CLASSIFIED: "a text or its label is missing",
    VALUED: "a text or its value is missing",
    TAGGED: "words or their tags are missing",
}
NAMED = {CLASSIFIED: "a text and its label", VALUED: "a text and its value", TAGGED: "words and their tags"}

LARGEST = 1e30
"""Values beyond it are refused: a head is held in float32."""


class Label(NamedTuple):
    """A row's label: its place among the names that were given, and its name."""

    number: int
    name: str


def shape_of(task: str, labels: Sequence[str]) -> str | None:
    """Return the shape of the rows of a head for `task`, or of a classifier where only labels are named; else None."""
    return SHAPE_OF_HEAD.get(task) or (CLASSIFIED if labels else None)


def label_in(row: Row, column: str, numbers: Mapping[str, int]) -> Label:
    """Return the row's label, which may be written as a whole number where that is a name.

    Raises:
        DataError: naming the row whose label is none of `numbers`.
    """
    return _label(row, row.values.get(column), f"field '{column}'", "its label", numbers)


def value_in(row: Row, column: str) -> float:
    """Return the row's value; of a table whose cells are text, the number that is written there.

    Raises:
        DataError: naming the row whose value is no finite number.
    """
    value = row.values.get(column)
    if value is None:
        raise row.error(f"field '{column}' is missing", hint=NAME_COLUMNS)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise row.error(f"field '{column}' is not a number", hint="a value is written as 3.5 or -2")
    if not abs(value) <= LARGEST:  # NaN is not either; of a whole number of any length no float is made before
        raise row.error(f"field '{column}' is not a finite number", hint=f"values are from -{LARGEST:g} to {LARGEST:g}")
    return float(value)


def words_in(
    row: Row, columns: Mapping[str, str], numbers: Mapping[str, int]
) -> tuple[tuple[str, ...], tuple[Label, ...]]:
    """Return the row's words and their tags, as many.

    Raises:
        DataError: naming the row where one is no list, their lengths differ, a word is empty or holds white space, or
            a tag is none of `numbers`.
    """
    lists = []
    for name in TAGGED_FIELDS:
        values = row.values.get(columns[name])
        if values is None:
            raise row.error(f"field '{columns[name]}' is missing", hint=NAME_COLUMNS)
        if not isinstance(values, list) or not values:
            raise row.error(f"field '{columns[name]}' is not a list of one text or more", hint=WANTED[TAGGED])
        lists.append(values)
    words, tags = lists
    if len(words) != len(tags):
        raise row.error(f"{len(words)} words and {len(tags)} tags, expected as many", hint=WANTED[TAGGED])
    texts = [checked_string(word, f"word {number}", row) for number, word in enumerate(words, 1)]
    for number, text in enumerate(texts, 1):
        if len(text.split()) != 1 or text != text.strip():
            raise row.error(f"word {number} holds white space", hint="each word has an entry and a tag of its own")
    found = [_label(row, tag, f"tag {number}", f"tag {number}", numbers) for number, tag in enumerate(tags, 1)]
    return tuple(texts), tuple(found)


def tag_labels(words: Sequence[str], tags: Sequence[Label], ends: Sequence[int]) -> list[int | None]:
    """Return for every token of the words, joined by single spaces, the number of the tag that it carries, if any.

    A token belongs to the word in which its last character lies: byte-level tokenizers may count the space before a
    word to it. The first of a word carries its tag. A word that the tokenizer gives no token is carried by none.

    Args:
        ends: of every token, the place behind its last character; 0 of one that stands for none.
    """
    labels: list[int | None] = [None] * len(ends)
    starts, stops, place = [], [], 0
    for word in words:
        starts.append(place)
        stops.append(place + len(word))
        place += len(word) + 1
    number, carried = 0, -1
    for token, end in enumerate(ends):
        if not end:
            continue
        while number < len(words) and end > stops[number]:
            number += 1
        if number < len(words) and end > starts[number] and carried != number:
            labels[token], carried = tags[number].number, number
    return labels


def _label(row: Row, value: object, what: str, told: str, numbers: Mapping[str, int]) -> Label:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    name = checked_string(value, what, row)
    if name not in numbers:
        raise row.error(f"{told} is none of the {len(numbers)} given", hint="--labels, or the job, names all of them")
    return Label(numbers[name], name)


__all__ = [
    "CLASSIFIED",
    "HEAD_FIELDS",
    "MISSING",
    "NAMED",
    "TAGGED",
    "VALUED",
    "WANTED",
    "Label",
    "label_in",
    "shape_of",
    "tag_labels",
    "value_in",
    "words_in",
]
