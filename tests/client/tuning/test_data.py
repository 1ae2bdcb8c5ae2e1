"""The client's text as batches: whole documents on one side, packed or not, and what does not fit is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from client.tuning.data import prepare, require_fit, split_records
from offsite.errors import ConfigError, DataError
from offsite.text.batches import IGNORED
from offsite.text.records import Record, read_records, split_by_document

SMALL = {"block_tokens": 32, "batch_size": 4}


@pytest.fixture
def records(notes_file):
    return read_records(notes_file)


def decoded(tokenizer, examples):
    return "".join(tokenizer.decode(example.input_ids) for example in examples)


def all_batches(text):
    return [text.batches.batch(step) for step in range(text.batches.num_steps_per_epoch)]


def test_every_document_is_on_one_side_as_a_whole(records, letters_tokenizer, notes):
    text = prepare(records, letters_tokenizer, block_tokens=128, batch_size=1, packed=False, validation=0.3)
    held = {example.document for example in text.validation}
    trained = [record.document for record in records if record.document not in held]
    assert text.num_records == len(trained)
    assert text.num_records + len(text.validation) == len(records)
    assert 5 <= len(text.validation) <= 30
    seen = "".join(letters_tokenizer.decode(row) for batch in all_batches(text) for row in batch["input_ids"])
    in_validation = decoded(letters_tokenizer, text.validation)
    for note in notes:
        assert (f"{note}</s>" in seen) != (f"{note}</s>" in in_validation)


def test_packed_blocks_are_full_and_hold_the_same_text(records, letters_tokenizer):
    packed = prepare(records, letters_tokenizer, **SMALL)
    plain = prepare(records, letters_tokenizer, block_tokens=128, batch_size=4, packed=False)
    assert packed.num_tokens == plain.num_tokens
    assert packed.num_truncated == plain.num_truncated == 0
    assert [len(example.input_ids) for example in packed.validation[:-1]] == [32] * (len(packed.validation) - 1)
    assert packed.longest_tokens == 32 < plain.longest_tokens
    assert decoded(letters_tokenizer, packed.validation) == decoded(letters_tokenizer, plain.validation)
    assert set(packed.batches.batch(0)["attention_mask"].flatten().tolist()) <= {0, 1}


def test_the_same_seed_gives_the_same_batches_and_another_gives_others(records, letters_tokenizer):
    first, again, other = (prepare(records, letters_tokenizer, **SMALL, seed=seed) for seed in (1, 1, 2))
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(all_batches(first), all_batches(again), strict=True)
    )
    assert not torch.equal(first.batches.batch(0)["input_ids"], other.batches.batch(0)["input_ids"])


def test_loss_counts_on_completions_only(answers_file, letters_tokenizer):
    text = prepare(read_records(answers_file), letters_tokenizer, block_tokens=96, batch_size=2, packed=False)
    batch = text.batches.batch(0)
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        shown = letters_tokenizer.decode(ids[mask.bool()])
        counted = letters_tokenizer.decode(ids[labels != IGNORED])
        assert shown.startswith("ward ")
        assert counted == shown[shown.index("?") + 1 :]
        assert counted.startswith(" case ")


def test_chat_through_the_tokenizers_template(tmp_path, letters_tokenizer):
    path = tmp_path / "chat.jsonl"
    turns = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}] for n in range(12)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    text = prepare(read_records(path), letters_tokenizer, block_tokens=64, batch_size=2, packed=False)
    example = text.validation[0]
    counted = letters_tokenizer.decode(
        [i for i, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    )
    assert "assistant:a" in counted
    assert "user" not in counted


def test_long_rows_are_cut_and_counted_or_refused(answers_file, letters_tokenizer):
    records = read_records(answers_file)
    text = prepare(records, letters_tokenizer, block_tokens=40, batch_size=2, packed=False)
    assert text.num_truncated == len(records)
    assert text.longest_tokens == 40
    with pytest.raises(DataError, match=r"answers.jsonl: line \d+: \d+ tokens, the context is 40") as caught:
        prepare(records, letters_tokenizer, block_tokens=40, batch_size=2, packed=False, on_long="error")
    assert caught.value.hint == "--on-long truncate cuts such rows and counts them"
    assert "case" not in str(caught.value)
    short = prepare(records, letters_tokenizer, block_tokens=8, batch_size=1, packed=False)
    assert short.num_dropped > 0  # of longer prompts nothing that counts was left


def test_plain_text_is_cut_into_blocks_and_never_too_long(records, letters_tokenizer):
    assert prepare(records, letters_tokenizer, **SMALL, on_long="error").num_truncated == 0
    with pytest.raises(DataError, match="the context is 32"):
        prepare(records, letters_tokenizer, **SMALL, on_long="error", packed=False)


def test_too_little_text(records, letters_tokenizer):
    with pytest.raises(DataError, match="too little text: 6 sequences of up to 32 tokens, one step needs 64"):
        prepare(records[:6], letters_tokenizer, block_tokens=32, batch_size=64)
    with pytest.raises(DataError, match=r"1 document\(s\), expected at least two"):
        prepare(records[:1], letters_tokenizer, **SMALL)


def test_text_that_the_model_cannot_read(records, letters_tokenizer, full_llama):
    text = prepare(records, letters_tokenizer, **SMALL)
    require_fit(text, full_llama)
    assert text.largest_id < 259
    longer = prepare(records, letters_tokenizer, block_tokens=129, batch_size=1)
    with pytest.raises(ConfigError, match="sequences of 129 tokens, the package's context is 128") as caught:
        require_fit(longer, full_llama)
    assert caught.value.hint == "use --block-tokens 128"
    narrow = copy.deepcopy(full_llama)
    narrow.set_input_embeddings(torch.nn.Embedding(text.largest_id, 2))
    with pytest.raises(ConfigError, match=f"gives token {text.largest_id}, its model knows {text.largest_id}"):
        require_fit(text, narrow)


def test_nothing_of_the_text_is_shown(records, letters_tokenizer):
    shown = repr(prepare(records, letters_tokenizer, **SMALL))
    assert "case" not in shown
    assert "input_ids" not in shown


# What is set aside for an audit


def test_documents_set_aside_are_chosen_by_name_and_seed_and_apart_from_validation(records):
    without = split_records(records, validation=0.3, audit_share=0.0, seed=1)
    assert without.audit == []
    assert (without.train, without.validation) == split_by_document(records, fraction=0.3, seed=1)
    sides = split_records(records, validation=0.3, audit_share=0.4, seed=1)
    rows = {name: {record.row for record in getattr(sides, name)} for name in ("train", "validation", "audit")}
    assert rows["train"] | rows["validation"] | rows["audit"] == {record.row for record in records}
    assert sum(map(len, rows.values())) == len(records)
    assert {record.row for record in without.train} - rows["audit"] == rows["train"]  # nobody else changes sides
    assert len(rows["audit"] & {record.row for record in without.validation}) >= 2  # nor are the two the same draw
    again = split_records(records[::-1], validation=0.3, audit_share=0.4, seed=1)
    assert {record.row for record in again.audit} == rows["audit"]
    other = split_records(records, validation=0.3, audit_share=0.4, seed=2)
    assert {record.row for record in other.audit} != rows["audit"]


def test_what_is_set_aside_is_not_read_and_canaries_are(records, letters_tokenizer):
    canaries = [Record((("zq" * 9, True),), f"made-up-{number}", number) for number in range(5)]
    plain = prepare(records, letters_tokenizer, **SMALL, packed=False)
    text = prepare(records, letters_tokenizer, **SMALL, packed=False, audit_share=0.4, canaries=canaries)
    sides = split_records(records, validation=0.1, audit_share=0.4, seed=0)
    shown = decoded(letters_tokenizer, text.examples) + decoded(letters_tokenizer, text.validation)
    for record in sides.audit:
        assert record.segments[0][0] not in shown
    assert shown.count("zqzq" * 4) == 5
    assert text.read == [*sides.train, *sides.validation, *canaries]
    assert (text.num_canaries, text.num_aside) == (5, len(sides.audit))
    assert text.num_records == len(sides.train) < plain.num_records
    assert len(text.examples) == len(sides.train) + 5
    assert text.num_tokens == sum(len(example.input_ids) for example in text.examples[:-5])
