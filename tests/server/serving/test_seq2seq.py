"""An encoder-decoder that is served answers what transformers' own generation writes of it."""

from __future__ import annotations

import openai
import pytest
from seq2seq_lab import closing_tokenizer, seq2seq
from served import calling, serving

PROMPT = "which of all? sea"


@pytest.fixture(scope="module", params=["gated-t5", "bart"])
def served(request):
    model, tokenizer = seq2seq(request.param), closing_tokenizer()
    with serving(model, tokenizer, context=40) as (address, engine), calling(address) as client:
        yield model, tokenizer, client, engine


def written(model, tokenizer, num_tokens):
    """Return the text that transformers writes greedily, and how many tokens it has."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    model.generation_config.forced_bos_token_id = None
    theirs = model.generate(**prompt, do_sample=False, max_new_tokens=num_tokens)[0, 1:]
    return tokenizer.decode(theirs, skip_special_tokens=True), len(theirs), prompt["input_ids"].shape[1]


def test_a_greedy_answer_equals_transformers(served):
    model, tokenizer, client, _ = served
    text, num, num_read = written(model, tokenizer, 12)
    reply = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    assert reply.choices[0].text == text
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (num_read, num)
    streamed = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    assert "".join(one.choices[0].text for one in streamed) == text
    tokens = tokenizer(PROMPT)["input_ids"]
    again = client.completions.create(model="tiny", prompt=[tokens, tokens], max_tokens=12, temperature=0)
    assert [one.text for one in again.choices] == [text, text]


def test_draws_are_repeatable_and_either_text_has_the_context(served):
    *_, client, engine = served

    def drawn(seed):
        asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 2.0, "seed": seed, "logprobs": 2}
        return client.completions.create(model="tiny", **asked).choices[0]

    one, other = drawn(3), drawn(3)
    assert one.text == other.text
    assert one.logprobs.token_logprobs == other.logprobs.token_logprobs
    assert len({drawn(seed).text for seed in range(6)}) > 1
    whole = client.completions.create(
        model="tiny", prompt="x" * 39, max_tokens=999, temperature=0, extra_body={"logit_bias": {"2": -100}}
    )
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (40, 40)
    with pytest.raises(openai.BadRequestError, match="the prompt has 41 tokens; the context is 40"):
        client.completions.create(model="tiny", prompt="x" * 40)
    assert engine.batch is None
