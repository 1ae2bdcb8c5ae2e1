"""Rows for heads: values and tags as files have them, what is refused and by which number, tags on first tokens."""

from __future__ import annotations

import json

import pytest
from encoders_lab import separating_tokenizer

from offsite.errors import ConfigError, DataError
from offsite.text.batches import IGNORED, cut, encode
from offsite.text.headrows import Label, tag_labels
from offsite.text.records import read_records
from offsite.text.writing import write_records

TAGS = ("O", "B-X", "I-X")


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("text", ["1.5", "-2", "3e2"])
def test_a_value_is_a_number_in_json_and_in_tables(text, tmp_path):
    path = file_of(tmp_path / "rows.jsonl", [{"text": "a", "value": json.loads(text)}])
    (tmp_path / "rows.csv").write_text(f"text,value\na,{text}\n")
    for record in [*read_records(path, of_head="regress"), *read_records(tmp_path / "rows.csv", of_head="regress")]:
        assert record.value == float(text)
        assert record.whole_text == "a"


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("regress", {"text": "a", "value": "warm"}, "line 2: field 'value' is not a number"),
        ("regress", {"text": "a", "value": True}, "line 2: field 'value' is not a number"),
        ("regress", {"text": "a", "value": None}, "line 2: field 'value' is missing"),
        ("regress", {"text": "a", "value": float("nan")}, "line 2: field 'value' is not a finite number"),
        ("regress", {"text": "a", "value": float("inf")}, "line 2: field 'value' is not a finite number"),
        ("regress", {"text": "a", "value": 10**400}, "line 2: field 'value' is not a finite number"),
        ("regress", {"text": " ", "value": 1}, "line 2: field 'text' is empty"),
        ("regress", {"text": "a"}, "line 2: field 'value' is missing"),
        ("tag", {"tokens": ["a", "b"], "tags": ["O"]}, "line 2: 2 words and 1 tags, expected as many"),
        ("tag", {"tokens": ["a"], "tags": ["B-Y"]}, "line 2: tag 1 is none of the 3 given"),
        ("tag", {"tokens": ["a b"], "tags": ["O"]}, "line 2: word 1 holds white space"),
        ("tag", {"tokens": ["a", ""], "tags": ["O", "O"]}, "line 2: word 2 is empty"),
        ("tag", {"tokens": "a", "tags": ["O"]}, "line 2: field 'tokens' is not a list"),
        ("tag", {"tokens": ["a"], "tags": [None]}, "line 2: tag 1 is missing"),
        ("tag", {"text": "a", "label": "O"}, "line 2: field 'tokens' is missing"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(task, row, message, tmp_path):
    good = {"regress": {"text": "a", "value": 1}, "tag": {"tokens": ["a"], "tags": ["O"]}}[task]
    path = file_of(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(DataError, match=message):
        read_records(path, labels=TAGS if task == "tag" else (), of_head=task)


def test_plain_text_and_columns_of_other_names(tmp_path):
    (tmp_path / "rows.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"line 1: words or their tags are missing"):
        read_records(file_of(tmp_path / "first.jsonl", [{"text": "a"}]), labels=TAGS, of_head="tag")
    with pytest.raises(DataError, match="plain text, expected rows of words and their tags"):
        read_records(tmp_path / "rows.txt", labels=TAGS, of_head="tag")
    path = file_of(tmp_path / "rows.jsonl", [{"words": ["a", "b"], "ner": ["B-X", "O"]}])
    (record,) = read_records(path, labels=TAGS, of_head="tag", fields={"tokens": "words", "tags": "ner"})
    assert (record.words, record.tags) == (("a", "b"), (Label(1, "B-X"), Label(0, "O")))
    with pytest.raises(ConfigError, match="unknown field name"):
        read_records(path, labels=TAGS, of_head="tag", fields={"value": "ner"})


def test_rows_that_are_written_are_read_as_they_were(tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": ["B-X", "O"]}, {"tokens": ["c"], "tags": ["O"]}]
    records = read_records(file_of(tmp_path / "rows.jsonl", rows), labels=TAGS, of_head="tag")
    write_records(tmp_path / "again.jsonl", records)
    again = read_records(tmp_path / "again.jsonl", labels=TAGS, of_head="tag")
    assert [one.content for one in again] == [one.content for one in records]
    values = read_records(file_of(tmp_path / "v.jsonl", [{"text": "a", "value": 0.1}]), of_head="regress")
    write_records(tmp_path / "v2.jsonl", values)
    assert read_records(tmp_path / "v2.jsonl", of_head="regress")[0].content == values[0].content


def test_the_first_token_of_a_word_carries_its_tag():
    words, tags = ("un", "happy", "x"), (Label(4, "a"), Label(5, "b"), Label(6, "c"))
    # [CLS] un | ha ppy | x [SEP]; then with the space counted to the word behind it, or a token of its own
    assert tag_labels(words, tags, [0, 2, 5, 8, 10, 0]) == [None, 4, 5, None, 6, None]
    assert tag_labels(words, tags, [1, 2, 3, 8, 9, 10]) == [4, None, None, 5, None, 6]
    # a tokenizer that passes over the second word
    assert tag_labels(words, tags, [2, 10]) == [4, 6]


def test_tagged_rows_are_encoded_and_cut_with_their_tags(tmp_path):
    path = file_of(tmp_path / "rows.jsonl", [{"tokens": ["ab", "c", "de"], "tags": ["B-X", "I-X", "O"]}])
    records = read_records(path, labels=TAGS, of_head="tag")
    tokenizer = separating_tokenizer()
    (example,) = encode(records, tokenizer, context=20, ended=False).examples
    assert example.input_ids == tokenizer("ab c de")["input_ids"]
    assert [label for label in example.labels if label != IGNORED] == [1, 2, 0]
    assert example.labels[1] == 1  # behind [CLS]
    assert example.tagged
    short = cut(example, 6)
    assert short.input_ids[-1] == tokenizer.sep_token_id
    assert [label for label in short.labels if label != IGNORED] == [1, 2]
