"""Prompts with or without an answer: what is read, what is refused by its row, and what becomes of it as tokens."""

from __future__ import annotations

import json

import pytest

from offsite.errors import ConfigError, DataError
from offsite.text.batches import IGNORED, encode, encode_questions
from offsite.text.records import answer_of, read_records
from offsite.text.writing import write_records

ASK = {"role": "user", "content": "ward?"}
SAY = {"role": "assistant", "content": "nine"}


def read(folder, *rows, **given):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(path, questions=True, **given)


def test_prompts_and_answers_in_every_way_of_writing_them(tmp_path):
    rows = [{"prompt": "ward?", "completion": " nine"}, {"prompt": "ward?"}, {"prompt": "ward?", "completion": None}]
    rows += [{"prompt": [ASK], "completion": "nine"}, {"prompt": [ASK, SAY, ASK]}]
    found = read(tmp_path, *rows)
    assert [answer_of(one) for one in found] == [" nine", None, None, "nine", None]
    assert [one.num_given for one in found] == [0, 0, 0, 1, 3]
    assert found[0].document == found[1].document == found[2].document != found[3].document
    write_records(tmp_path / "again.jsonl", found[:2])
    again = read_records(tmp_path / "again.jsonl", questions=True)
    assert [one.content for one in again] == [one.content for one in found[:2]]
    dialogues = read(tmp_path, {"messages": [ASK, SAY]}, {"messages": [ASK]})
    assert [(answer_of(one), one.num_given) for one in dialogues] == [("nine", 1), (None, 1)]
    named = read(tmp_path, {"q": "ward?", "a": "nine"}, fields={"prompt": "q", "completion": "a"})
    assert answer_of(named[0]) == "nine"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "ward"}, "line 1: a field is missing, expected 'prompt'; or 'messages'"),
        ({"prompt": " "}, "line 1: field 'prompt' is empty"),
        ({"prompt": "ward?", "completion": 9}, "line 1: field 'completion' is a number"),
        ({"prompt": [ASK, SAY]}, "line 1: the prompt's last message is the assistant's"),
        ({"messages": [SAY]}, "line 1: an answer and nothing before it"),
        ({"prompt": "ward?", "messages": [ASK]}, "line 1: has the fields of prompt and messages"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_row(tmp_path, row, told):
    with pytest.raises(DataError, match=told):
        read(tmp_path, row)


def test_a_prompt_is_what_would_be_asked_and_its_answer_what_counts(tmp_path, letters_tokenizer):
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "ab"}, {"prompt": [ASK], "completion": "nine"}]
    records = read(tmp_path, *rows)
    given = {"context": 32, "num_new": 8}
    told, asked, chat = encode_questions(records, letters_tokenizer, **given).examples
    prompt = letters_tokenizer("ab")["input_ids"]
    assert told.prompt == asked.prompt == tuple(prompt)
    assert (told.answer, asked.answer) == ("cd", None)
    assert (asked.input_ids, asked.labels) == (prompt, [IGNORED] * len(prompt))
    (plain,) = encode(records[:1], letters_tokenizer, context=32).examples
    assert (told.input_ids, told.labels) == (plain.input_ids, plain.labels)
    text = letters_tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    assert list(chat.prompt) == letters_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "nine" in letters_tokenizer.decode([label for label in chat.labels if label != IGNORED])


def test_a_prompt_without_room_for_an_answer_is_left_out_or_refused(tmp_path, letters_tokenizer):
    records = read(tmp_path, {"prompt": "a" * 9, "completion": "b" * 20}, {"prompt": "a" * 8, "completion": "b" * 20})
    found = encode_questions(records, letters_tokenizer, context=16, num_new=8)
    assert (len(found.examples), found.num_dropped, found.num_truncated) == (1, 1, 1)
    assert len(found.examples[0].input_ids) == 16
    with pytest.raises(DataError, match=r"line 1: a prompt of 9 tokens leaves no room for 8 more in a context of 16"):
        encode_questions(records, letters_tokenizer, context=16, num_new=8, on_long="error")
    with pytest.raises(DataError, match="none of 1 prompts leaves room"):
        encode_questions(records[:1], letters_tokenizer, context=16, num_new=8)
    with pytest.raises(ConfigError, match="16 new tokens leave no room"):
        encode_questions(records, letters_tokenizer, context=16, num_new=16)
