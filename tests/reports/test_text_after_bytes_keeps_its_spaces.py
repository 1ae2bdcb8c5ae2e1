"""The first word of an answer lost its space when the prompt ended in characters that a tokenizer spells in bytes.

What people met: tokenizers of the Llama 2 kind write a rare character as several tokens of one byte each, and their
decoders turn a whole run of such tokens into question marks when it begins in the middle of a character. A window of
the last few tokens does begin there, and what is decoded with it comes out wrong.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from offsite.generation.generate import Detokenizer

WORDS = ["▁fox", "▁the", "ox", "▁", "▁a", "é", "\N{REPLACEMENT CHARACTER}"]
FIRST_BYTE = 3
FIRST_WORD = FIRST_BYTE + 256


def fallback_tokenizer(decoder):
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *WORDS])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    if decoder == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence(parts)
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["metaspace", "strip"])
def tokenizer(request):
    return fallback_tokenizer(request.param)


def in_bytes(text: bytes) -> list[int]:
    return [FIRST_BYTE + byte for byte in text]


def word(name: str) -> int:
    return FIRST_WORD + WORDS.index(name)


def streamed(tokenizer, ids, prompt=()):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


def spelled(ids, *, begins: bool, strips_bytes: bool) -> str:
    """What the tokens say, worked out here: runs of bytes are UTF-8, words have spaces for their marks."""
    text, run = "", b""
    for token in [token for token in ids if token >= FIRST_BYTE] + [None]:
        if token is not None and token < FIRST_WORD:
            run += bytes([token - FIRST_BYTE])
            continue
        text += run.decode("utf-8", "replace")
        run = b""
        if token is not None:
            text += WORDS[token - FIRST_WORD].replace("▁", " ")
    ids = [token for token in ids if token >= FIRST_BYTE]
    first = bool(ids) and begins and (ids[0] >= FIRST_WORD or strips_bytes)
    return text.removeprefix(" ") if first else text


@pytest.mark.parametrize("text", ["🙂🙃🙂", "日本語のテ", "é", "a🙂"])
def test_an_answer_keeps_the_space_behind_characters_in_bytes(tokenizer, text):
    pieces = streamed(tokenizer, [word("▁fox"), word("▁the")], prompt=in_bytes(text.encode()))
    assert pieces == [" fox", " the", ""]


def test_an_answer_keeps_the_space_behind_half_a_character(tokenizer):
    assert streamed(tokenizer, [word("▁fox")], prompt=in_bytes("🙂".encode()[:3])) == [" fox", ""]


BYTES = st.binary(min_size=1, max_size=6) | st.text("é日🙂👩‍ a", min_size=1, max_size=3).map(str.encode)
IDS = st.lists(
    BYTES.map(in_bytes) | st.sampled_from(WORDS).map(lambda name: [word(name)]) | st.sampled_from([[0], [1], [2]]),
    max_size=8,
).map(lambda parts: [token for part in parts for token in part])


@given(IDS, IDS)
def test_pieces_are_what_the_tokens_say(tokenizer, prompt, ids):
    strips_bytes = tokenizer.decode(in_bytes(b" ")) == ""
    pieces = streamed(tokenizer, ids, prompt)
    begins = not any(token >= FIRST_BYTE for token in prompt)
    assert "".join(pieces) == spelled(ids, begins=begins, strips_bytes=strips_bytes)
    if "\N{REPLACEMENT CHARACTER}" not in spelled(ids, begins=False, strips_bytes=False):
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@given(IDS)
def test_an_answer_in_pieces_is_the_answer_decoded_at_once(tokenizer, ids):
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    if "\N{REPLACEMENT CHARACTER}" not in whole:
        assert "".join(streamed(tokenizer, ids)) == whole


@given(st.text("é日🙂 ax", max_size=6).map(str.encode), IDS)
def test_an_answer_after_a_prompt_is_what_the_whole_has_more(tokenizer, text, ids):
    prompt = [word("▁a"), *in_bytes(text)]
    said, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids, skip_special_tokens=True)
    if "\N{REPLACEMENT CHARACTER}" not in whole:
        assert said + "".join(streamed(tokenizer, ids, prompt)) == whole


def test_characters_in_bytes_are_told_as_soon_as_they_are_whole(tokenizer):
    pieces = streamed(tokenizer, in_bytes("é🙂".encode()), prompt=[word("▁a")])
    assert pieces == ["", "é", "", "", "", "🙂", ""]
