"""Prompts keep what opens a text and get nothing that closes one, whatever the tokenizer's post-processor writes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from offsite.text.prompts import for_prompts, frame, prompt_ids

TEMPLATES = {
    "nothing": ("$A", [], []),
    "opens": ("<s> $A", [1], []),
    "closes": ("$A </s>", [], [2]),
    "both": ("<s> $A </s>", [1], [2]),
    "twice": ("<s> <pad> $A </s> </s>", [1, 0], [2, 2]),
    "the same token": ("</s> $A </s>", [2], [2]),
}
TEXTS = st.text(max_size=8) | st.lists(st.sampled_from(["<s>", "</s>", "<pad>", "a", " b"]), max_size=5).map("".join)


@pytest.fixture(scope="module")
def framed(letters_tokenizer):
    """Return a tokenizer whose post-processor writes that template."""
    made = {}

    def make(name):
        if name not in made:
            core = type(letters_tokenizer.backend_tokenizer).from_str(letters_tokenizer.backend_tokenizer.to_str())
            special = [("<pad>", 0), ("<s>", 1), ("</s>", 2)]
            core.post_processor = processors.TemplateProcessing(single=TEMPLATES[name][0], special_tokens=special)
            made[name] = PreTrainedTokenizerFast(
                tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
            )
        return made[name]

    return make


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_what_was_appended_is_dropped(framed, name):
    tokenizer, (_, opening, closing) = framed(name), TEMPLATES[name]
    assert frame(tokenizer) == (opening, closing)

    @given(TEXTS)
    def check(text):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text)["input_ids"] == opening + bare + closing
        assert prompt_ids(tokenizer, text) == opening + bare
        assert copy(text)["input_ids"] == opening + bare
        assert copy(text, add_special_tokens=False)["input_ids"] == bare

    copy = for_prompts(tokenizer)
    check()
    assert tokenizer("x")["input_ids"][-1:] == (closing or tokenizer("x", add_special_tokens=False)["input_ids"])[-1:]


def test_a_copy_that_closes_nothing_pads_a_batch_as_before(framed):
    copy = for_prompts(framed("both"))
    found = copy(["ab", "a"], padding="longest", padding_side="left")["input_ids"]
    assert found[1] == [0, *found[0][:2]]
