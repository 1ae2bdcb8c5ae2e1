"""Rows of preferences: every way of writing one, what is refused, what is written again, and both rows as tokens."""

from __future__ import annotations

import json

import pytest

from offsite.errors import ConfigError, DataError
from offsite.text.batches import encode
from offsite.text.records import read_files, read_records
from offsite.text.writing import write_by_shape

SECRET = "hidden-words"
ASK = [{"role": "user", "content": "why?"}]
YES, NO = ({"role": "assistant", "content": text} for text in ("because", "never"))
TALK = "\n\nHuman: why?\n\nAssistant:"


@pytest.fixture
def written(tmp_path):
    """Write rows into a file, and return its path."""

    def write(*rows, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def sides(record):
    """What a pair's two rows hold."""
    return [(one.segments, one.messages, one.num_given) for one in (record, record.rejected)]


TEXT = [((("why?", False), (" because", True)), (), 0), ((("why?", False), (" never", True)), (), 0)]
CHAT = [((), (("user", "why?"), ("assistant", text)), 1) for text in ("because", "never")]
DIALOGUE = [(((TALK, False), (f" {text}", True)), (), 0) for text in ("because", "never")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "why?", "chosen": " because", "rejected": " never"}, TEXT),
        ({"prompt": ASK, "chosen": [YES], "rejected": [NO]}, CHAT),
        ({"prompt": ASK, "chosen": "because", "rejected": "never"}, CHAT),
        ({"prompt": "why?", "chosen": [YES], "rejected": [NO]}, CHAT),
        ({"prompt": "why?", "chosen": [*ASK, YES], "rejected": [*ASK, NO]}, CHAT),
        ({"chosen": [*ASK, YES], "rejected": [*ASK, NO]}, CHAT),
        ({"chosen": f"{TALK} because", "rejected": f"{TALK} never"}, DIALOGUE),
    ],
)
def test_every_way_of_writing_a_pair(written, tmp_path, row, expected):
    (record,) = read_records(written(row), pairs=True)
    assert sides(record) == expected
    assert "because" in record.whole_text
    assert "never" in record.whole_text
    assert "because" not in repr(record)
    (name,) = write_by_shape(tmp_path, "again", [record])
    (again,) = read_records(tmp_path / name, pairs=None)
    assert (sides(again), again.document, again.content) == (expected, record.document, record.content)


def test_a_dialogue_is_alike_up_to_the_last_answer_both_begin(written, tmp_path):
    early = f"{TALK} because it\n\nHuman: what?\n\nAssistant:"
    row = {"chosen": f"{early} b\n\nHuman: and?\n\nAssistant: c\n\nHuman: bye", "rejected": f"{early} bad"}
    (record,) = read_records(written(row), pairs=True)
    assert record.segments == (
        (early, False), (" b", True), ("\n\nHuman: and?\n\nAssistant:", False), (" c", True), ("\n\nHuman: bye", False),
    )  # fmt: skip
    assert record.rejected.segments == ((early, False), (" bad", True))
    (name,) = write_by_shape(tmp_path, "again", [record])
    assert sides(read_records(tmp_path / name, pairs=True)[0]) == sides(record)


def test_answers_to_one_prompt_are_one_document_and_the_fields_may_have_other_names(written):
    rows = [{"q": "why?", "good": one, "bad": two} for one, two in (("a", "b"), ("a", "c"), ("c", "b"))]
    rows.append({"q": "who?", "good": "a", "bad": "b"})
    fields = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    documents = [record.document for record in read_records(written(*rows), fields=fields, pairs=True)]
    assert len(set(documents[:3])) == 1
    assert documents[3] != documents[0]
    named = read_records(
        written(*[{**row, "who": "x"} for row in rows]), fields=fields, document_field="who", pairs=True
    )
    assert {record.document for record in named} == {"x"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": SECRET, "chosen": SECRET, "rejected": SECRET}, "both answers are the same"),
        ({"prompt": " ", "chosen": SECRET, "rejected": "b"}, "field 'prompt' is empty"),
        ({"prompt": SECRET, "chosen": SECRET, "rejected": ""}, "field 'rejected' is empty"),
        ({"prompt": None, "chosen": SECRET, "rejected": "b"}, "field 'prompt' is missing"),
        ({"chosen": SECRET, "rejected": f"not {SECRET}"}, "share no beginning"),
        ({"chosen": f"{TALK} {SECRET}", "rejected": "\n\nHuman: who?\n\nAssistant: b"}, "share no beginning"),
        ({"chosen": f"{TALK} {SECRET}", "rejected": TALK}, "nothing stands behind the beginning"),
        ({"chosen": [*ASK, YES], "rejected": SECRET}, "one answer is a list of messages and the other is not"),
        ({"chosen": [YES], "rejected": [NO]}, "share no beginning"),
        ({"chosen": [*ASK, YES], "rejected": ASK}, "one dialogue is the beginning of the other"),
        ({"prompt": ASK, "chosen": [*ASK], "rejected": [NO]}, "one dialogue is the beginning|first differ"),
        ({"chosen": [*ASK, YES], "rejected": [*ASK, *ASK]}, "first differ in message 2, which is not the assistant's"),
        ({"prompt": [{"role": SECRET}], "chosen": "a", "rejected": "b"}, "message 1 of the prompt does not have"),
        ({"prompt": ASK, "chosen": [{"role": 3, "content": SECRET}], "rejected": "b"}, "one answer is a list"),
        (
            {"prompt": ASK, "chosen": [{"role": 3, "content": ""}], "rejected": [NO]},
            "message 1 of the chosen answer is",
        ),
    ],
)
def test_a_bad_row_is_refused_by_its_number_and_not_repeated(written, row, told):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match=told) as caught:
        read_records(written(good, row), pairs=True)
    assert str(caught.value).startswith("pairs.jsonl: line 2: ")
    assert SECRET not in f"{caught.value} {caught.value.hint}"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": SECRET}, "holds text, expected a chosen and a rejected answer"),
        ({"prompt": SECRET, "completion": SECRET}, "holds prompt/completion, expected a chosen"),
        ({"answer": SECRET}, "a field is missing, expected 'chosen' and 'rejected'"),
    ],
)
def test_other_rows_are_no_pairs(written, row, told):
    with pytest.raises(DataError, match=f"line 1: {told}") as caught:
        read_records(written(row), pairs=True)
    assert SECRET not in f"{caught.value} {caught.value.hint}"


def test_pairs_are_for_dpo_and_dpo_is_for_pairs(written, tmp_path):
    pairs = written({"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(DataError, match="line 1: holds pairs of a chosen and a rejected answer") as caught:
        read_records(pairs)
    assert "--objective dpo" in caught.value.hint
    with pytest.raises(ConfigError, match="unknown field name") as refused:
        read_records(pairs, fields={"chosen": "better"})
    assert "--objective dpo" in refused.value.hint
    with pytest.raises(DataError, match="line 1: holds text") as caught:
        read_records(written({"text": "a"}, name="text.jsonl"), pairs=True)
    assert "--objective next-token" in caught.value.hint
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.txt: plain text, expected pairs"):
        read_records(tmp_path / "a.txt", pairs=True)
    both = [tmp_path / "text.jsonl", pairs]
    for files, told in ((both, "where earlier files hold none"), (both[::-1], "where earlier files do")):
        with pytest.raises(DataError, match=f"line 1: holds .*preferences {told}"):
            read_files(files, pairs=None)


def test_both_rows_are_tokens_and_only_the_answers_count(written, letters_tokenizer):
    turns = [*ASK, YES, {"role": "user", "content": "and?"}]
    rows = [
        {"prompt": "why?", "chosen": " because", "rejected": " no"},
        {"prompt": turns, "chosen": "a", "rejected": "b"},
    ]
    one, two = (read_records(written(row, name=f"{n}.jsonl"), pairs=True)[0] for n, row in enumerate(rows))
    found = encode([one, two], letters_tokenizer, context=200)
    assert found.num_tokens == sum(len(side.input_ids) for pair in found.examples for side in pair.sides)
    for record, example in zip((one, two), found.examples, strict=True):
        for row, side in zip((record, record.rejected), example.sides, strict=True):
            counted = letters_tokenizer.decode([label for label in side.labels if label != -100])
            said = row.segments[1][0] if row.segments else row.messages[-1][1]
            assert said.strip() in counted
            assert "because" not in counted or said == " because"
            assert side.labels.count(-100) > 3
    assert len(letters_tokenizer.decode([label for label in found.examples[1].labels if label != -100])) < 30


def test_a_pair_is_cut_at_its_end_and_dropped_when_nothing_tells_its_answers_apart(written, letters_tokenizer):
    rows = [
        {"prompt": "long prompt " * 3, "chosen": "a", "rejected": "b"},
        {"prompt": "why", "chosen": "the very same beginning, a", "rejected": "the very same beginning, b"},
        {"prompt": "why", "chosen": "a" * 40, "rejected": "b"},
    ]
    records = read_records(written(*rows), pairs=True)
    found = encode(records, letters_tokenizer, context=20)
    assert (len(found.examples), found.num_truncated, found.num_dropped) == (1, 3, 2)
    assert len(found.examples[0].input_ids) == 20
    with pytest.raises(DataError, match=r"pairs\.jsonl: line 1: \d+ tokens, the context is 20"):
        encode(records, letters_tokenizer, context=20, on_long="error")


def test_answers_that_hold_the_prompt_again_are_whole_texts(written):
    rows = [{"prompt": TALK, "chosen": f"{TALK} because", "rejected": f"{TALK} never"}]
    (record,) = read_records(written(*rows), pairs=True)
    assert sides(record) == DIALOGUE


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": TALK, "chosen": TALK, "rejected": f"{TALK} {SECRET}"}, "an answer is the prompt and nothing more"),
        (
            {"prompt": "why?", "chosen": [{"role": "system", "content": SECRET}, *ASK, YES], "rejected": [*ASK, NO]},
            "the chosen answer begins neither with the prompt's messages nor with the assistant's",
        ),
        (
            {
                "chosen": f"{TALK} a\n\nHuman: {SECRET}\n\nAssistant: b",
                "rejected": f"{TALK} a\n\nHuman: x\n\nAssistant: b",
            },
            "first differ in a turn of the person's",
        ),
        (
            {"chosen": f"{TALK} a", "rejected": f"{TALK} a\n\nHuman: {SECRET}\n\nAssistant: b"},
            "one dialogue is the beginning of the other",
        ),
    ],
)
def test_rows_that_would_be_doubled_or_differ_elsewhere_than_in_an_answer_are_refused(written, row, words):
    with pytest.raises(DataError, match=f"line 1: .*{words}") as caught:
        read_records(written(row), pairs=True)
    assert caught.value.hint
    assert SECRET not in str(caught.value) + caught.value.hint
