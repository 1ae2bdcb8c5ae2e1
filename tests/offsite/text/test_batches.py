"""Records to batches: the loss counts exactly where it should, and nothing is lost without being counted."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from offsite.errors import ConfigError, DataError
from offsite.text.batches import IGNORED, Batches, Encoded, Example, collate, cut, encode, pack, pad_id
from offsite.text.records import Record

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(*, trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, as GPT-2's with no merges but ` b`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "Ġb"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """A mark before every word, the first too, and a beginning-of-sequence token, as LLaMA 2's."""
    words = ["<s>", "</s>", "<unk>", "▁a", "▁b", "▁c", "▁"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def text(value: str, row: int = 1) -> Record:
    return Record(((value, True),), value, row, place=f"a.txt: line {row}")


def pair(prompt: str, completion: str, row: int = 1) -> Record:
    return Record(((prompt, False), (completion, True)), prompt, row, place=f"a.jsonl: line {row}")


def chat(*messages: tuple[str, str]) -> Record:
    return Record((), "chat", 1, messages, place="a.jsonl: line 1")


def learnt(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


def test_running_text_is_learnt_whole_and_closed_once() -> None:
    tokenizer = byte_tokenizer()
    eos = tokenizer.eos_token_id
    encoded = encode([text("a b é"), text("ab<|end|>", 2)], tokenizer, context=100)
    assert [tokenizer.decode(example.input_ids) for example in encoded.examples] == ["a b é<|end|>", "ab<|end|>"]
    assert all(example.labels == example.input_ids for example in encoded.examples)
    assert all(example.input_ids.count(eos) == 1 for example in encoded.examples)
    assert [example.document for example in encoded.examples] == ["a b é", "ab<|end|>"]
    assert encoded == Encoded(encoded.examples, 0, 0, num_tokens=9, num_loss_tokens=7)


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Q: a\nA:", " b a", " b a<|end|>"),
        ("Q: a\nA:", " é", " é<|end|>"),
        ("a  ", "  a", "  a<|end|>"),
        ("a ", "b", " b<|end|>"),  # the one token straddles the border
        ("", "ba", "ba<|end|>"),
        ("é", "é", "é<|end|>"),
    ],
)
def test_the_loss_counts_on_the_completion_and_its_end(prompt, completion, expected, trim_offsets) -> None:
    tokenizer = byte_tokenizer(trim_offsets=trim_offsets)
    (example,) = encode([pair(prompt, completion)], tokenizer, context=100).examples
    assert tokenizer.decode(example.input_ids) == prompt + completion + "<|end|>"
    assert learnt(tokenizer, example) == expected


def test_a_completion_has_the_tokens_of_the_running_text() -> None:
    tokenizer = sentencepiece_like_tokenizer()
    (as_pair,) = encode([pair("a b", " c a")], tokenizer, context=100).examples
    (as_text,) = encode([text("a b c a")], tokenizer, context=100).examples
    assert as_pair.input_ids == as_text.input_ids == [0, 3, 4, 5, 3, 1]
    assert as_pair.labels == [IGNORED, IGNORED, IGNORED, 5, 3, 1]


def test_only_the_assistants_turns_are_learnt() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    turns = [("system", "s"), ("user", "u b"), ("assistant", "one"), ("user", "v"), ("assistant", "two b")]
    open_end = [*turns, ("user", "w")]
    (example,) = encode([chat(*turns)], tokenizer, context=200).examples
    (unanswered,) = encode([chat(*open_end)], tokenizer, context=200).examples
    assert learnt(tokenizer, example) == learnt(tokenizer, unanswered) == "one<|end|>\ntwo b<|end|>\n"
    assert tokenizer.decode(example.input_ids).endswith("<|assistant|>two b<|end|>\n")


def test_a_template_without_an_end_mark_gets_one() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (example,) = encode([chat(("user", "u"), ("assistant", "a"))], tokenizer, context=200).examples
    assert learnt(tokenizer, example) == "assistant: a\n<|end|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('SECRET ' + messages[0]['content']) }}", "refuses the conversation"),
        # earlier answers are shortened once a later one follows, as by templates that hide old reasoning
        ("{% for m in messages %}{{ m['content'] if loop.last else '.' }}{% endfor %}", "turn 2 differently"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template: str | None, expected: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    turns = [("user", "SECRET"), ("assistant", "SECRET"), ("user", "x"), ("assistant", "y")]
    with pytest.raises(DataError, match=expected) as caught:
        encode([chat(*turns)], tokenizer, context=200)
    assert "SECRET" not in str(caught.value)
    assert caught.value.hint


def test_long_rows_are_cut_and_counted() -> None:
    tokenizer = byte_tokenizer()
    rows = [text("aaaa"), text("aaaaa"), pair("pp", "ccc"), pair("ppppp", "c"), pair("pppp", "c")]
    encoded = encode(rows, tokenizer, context=5)
    assert (encoded.num_truncated, encoded.num_dropped) == (4, 1)
    assert [tokenizer.decode(example.input_ids) for example in encoded.examples] == [
        "aaaa<|end|>",
        "aaaaa",
        "ppccc",
        "ppppc",
    ]
    assert encoded.num_tokens == 20
    assert encoded.num_loss_tokens == 4 + 4 + 3 + 1


def test_long_rows_are_refused_with_their_row() -> None:
    rows = [text("aaaa"), text("SECRETSECRET", 7)]
    with pytest.raises(DataError, match=r"^a\.txt: line 7: 13 tokens, the context is 5$"):
        encode(rows, byte_tokenizer(), context=5, on_long="error")


def test_text_for_packing_is_left_whole_but_completions_are_not() -> None:
    encoded = encode([text("a" * 40), pair("pp", "c" * 40)], byte_tokenizer(), context=5, whole_text=True)
    assert [len(example.input_ids) for example in encoded.examples] == [41, 5]
    assert encoded.num_truncated == 1


def test_nothing_left_to_learn_is_refused() -> None:
    with pytest.raises(DataError, match="none of 1 rows"):
        encode([pair("ppppppp", "c")], byte_tokenizer(), context=5)


def test_a_tokenizer_without_an_end_or_a_context_of_one_is_refused() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match="at least 2"):
        encode([text("a")], tokenizer, context=1)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        encode([text("a")], tokenizer, context=9)


rows_of_tokens = st.lists(st.integers(0, 99), min_size=1, max_size=30)


@given(st.lists(rows_of_tokens, min_size=1, max_size=20), st.integers(2, 17))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # on a busy machine drawing is
def test_packing_keeps_every_token_in_order(rows: list[list[int]], block_tokens: int) -> None:
    blocks = pack([Example(row, list(row)) for row in rows], block_tokens=block_tokens)
    joined = [token for row in rows for token in row]
    kept = len(joined) - (len(joined) % block_tokens == 1)  # one token alone predicts nothing
    assert [token for block in blocks for token in block.input_ids] == joined[:kept]
    assert all(len(block.input_ids) == block_tokens for block in blocks[:-1])
    assert all(block.labels == block.input_ids for block in blocks)


def test_packing_leaves_out_blocks_that_teach_nothing() -> None:
    blocks = pack([Example([1, 2, 3, 4, 5, 6], [IGNORED] * 5 + [6])], block_tokens=3)
    assert blocks == [Example([4, 5, 6], [IGNORED, IGNORED, 6])]


def test_a_batch_is_padded_on_the_right() -> None:
    batch = collate([Example([1, 2, 3], [IGNORED, 2, 3]), Example([4], [4])], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert pad_id(byte_tokenizer()) == byte_tokenizer().eos_token_id


def test_a_batch_follows_from_seed_and_step_alone() -> None:
    examples = [Example([number] * (number + 2), [number] * (number + 2)) for number in range(10)]
    batches = Batches(examples, batch_size=4, seed=1, pad_id=99)
    in_order = [batches.batch(step)["input_ids"] for step in range(12)]
    fresh = Batches(examples, batch_size=4, seed=1, pad_id=99)
    for step in (11, 0, 7, 2, 3, 5):
        assert torch.equal(fresh.batch(step)["input_ids"], in_order[step])
        assert fresh.num_tokens(step) == int((in_order[step] != 99).sum())
    later = Batches(examples, batch_size=4, seed=1, pad_id=99, first_step=5)
    assert torch.equal(later.batch(3)["input_ids"], in_order[8])
    other = Batches(examples, batch_size=4, seed=2, pad_id=99)
    assert any(not torch.equal(other.batch(step)["input_ids"], in_order[step]) for step in range(3))


def test_every_epoch_sees_every_example_in_another_order() -> None:
    examples = [Example([number, number], [number, number]) for number in range(10)]
    batches = Batches(examples, batch_size=4, seed=1, pad_id=99)
    seen = [int(row[0]) for step in range(5) for row in batches.batch(step)["input_ids"]]
    assert batches.num_steps_per_epoch == 3
    assert Counter(seen) == Counter([*range(10), *range(10)])
    assert sorted(seen[:10]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_batches_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError):
        Batches([], batch_size=4, seed=1, pad_id=0)
    with pytest.raises(ConfigError):
        Batches([Example([1, 2], [1, 2])], batch_size=0, seed=1, pad_id=0)


CLOSINGS = [
    processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)),
    processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1)),
    processors.TemplateProcessing(single="[CLS] $A [SEP] [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]),
    processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)]),
]


@pytest.mark.parametrize("processor", CLOSINGS)
@pytest.mark.parametrize("context", [8, 11, 12, 40])
def test_a_row_that_a_head_reads_is_cut_as_the_tokenizer_cuts_it(processor, context) -> None:
    """What closes a text stays; a pair's rows and rows that are cut again, too."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: n for n, token in enumerate(["[PAD]", "[CLS]", "[SEP]", *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processor
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, cls_token="[CLS]", sep_token="[SEP]")
    texts = ["a b", "a  [SEP] b c d e f g", "abcdefghi", "é" * 30 + " "]
    wanted = tokenizer(texts, truncation=True, max_length=context)["input_ids"]
    found = encode([text(one) for one in texts], tokenizer, context=context, ended=False)
    assert [example.input_ids for example in found.examples] == wanted
    assert all(len(example.labels) == len(example.input_ids) for example in found.examples)
    assert found.num_truncated == sum(len(ids) > context for ids in tokenizer(texts)["input_ids"])
    again = [cut(example, 8).input_ids for example in found.examples]
    assert again == tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    two = Record((("Q ", False), (texts[1], True)), "d", 1, rejected=Record((("Q ", False), (texts[3], True)), "d", 1))
    sides = encode([two], tokenizer, context=context, ended=False).examples[0].sides
    both = [f"Q {texts[1]}", f"Q {texts[3]}"]
    assert [side.input_ids for side in sides] == tokenizer(both, truncation=True, max_length=context)["input_ids"]
    with nullcontext() if processor is CLOSINGS[-1] else pytest.raises(ConfigError, match="of 2 tokens has no room"):
        encode([text("a")], tokenizer, context=2, ended=False)
